"""Methods that match how the samples of a batch relate to one another, for classifiers of any domain.

Each is a function (task, *, settings) -> terms of an objective; the defaults are its paper's for CIFAR-100, as the
common toolboxes run them: beside a cross-entropy of weight 1.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods import Task
from kd.common.objective import Terms, task_loss
from kd.common.outputs import Outputs


def rkd(task: Task, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Terms:
    """Relative distances and angles of pooled features (Park et al., arXiv:1904.05068), beside the labels."""
    return {
        "task": (1.0, task_loss()),
        "distances": (distance_weight, task.pooled(losses.rkd_distance)),
        "angles": (angle_weight, task.pooled(losses.rkd_angle)),
    }


def sp(task: Task, *, weight: float = 3000.0) -> Terms:
    """Similarities of the last features before pooling (SP, arXiv:1907.09682), beside the labels."""
    return {"task": (1.0, task_loss()), "similarities": (weight, task.last(losses.similarity_preserving))}


def pkt(task: Task, *, weight: float = 30000.0) -> Terms:
    """Neighbours by the cosine of pooled features (Passalis and Tefas, arXiv:1803.10837), beside the labels."""
    return {"task": (1.0, task_loss()), "neighbours": (weight, task.pooled(losses.pkt))}


def cc(task: Task, *, weight: float = 0.02, width: int = 128) -> Terms:
    """Correlation congruence of embedded features (Peng et al., arXiv:1904.01802), beside the labels.

    The embedding of the student's features is learnt, that of the teacher's stays as it was drawn. The toolbox of CRD
    trains both, and so can make the loss vanish by shrinking both to zero, whatever the student does.
    """
    return {"task": (1.0, task_loss()), "congruence": (weight, EmbeddedCongruence(task, width))}


class EmbeddedCongruence(nn.Module):
    """`correlation_congruence` of linear embeddings (batch, width): a learnt one of the student's pooled features, a
    fixed random one of the teacher's.
    """

    teacher_embedding: Tensor

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.pooled = task.pooled
        self.student_embedding = nn.Linear(task.student_width, width)
        drawn = nn.Linear(task.teacher_width, width, bias=False)
        self.register_buffer("teacher_embedding", drawn.weight.detach())

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        return self.pooled(self._of_embeddings)(student, teacher, labels)

    def _of_embeddings(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.correlation_congruence(
            self.student_embedding(student), F.linear(teacher, self.teacher_embedding)
        )


RELATION_METHODS: dict[str, Callable[..., Terms]] = {"rkd": rkd, "sp": sp, "pkt": pkt, "cc": cc}
