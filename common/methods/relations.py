"""Methods that match how the samples of a batch relate to one another, for classifiers of any domain.

Each is a function (spec, *, settings) -> Method; the defaults are its paper's for CIFAR-100, as the
common toolboxes run them: beside a cross-entropy of weight 1.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods import Method, TaskSpec
from kd.common.objective import task_loss
from kd.common.outputs import Outputs


def rkd(spec: TaskSpec, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Method:
    """Relative distances and angles of pooled features (Park et al., arXiv:1904.05068), beside the labels."""
    return Method(
        {
            "task": (1.0, task_loss()),
            "distances": (distance_weight, spec.pooled(losses.rkd_distance)),
            "angles": (angle_weight, spec.pooled(losses.rkd_angle)),
        },
        spec.features,
        spec.teacher_features,
    )


def sp(spec: TaskSpec, *, weight: float = 3000.0) -> Method:
    """Similarities of the last features before pooling (SP, arXiv:1907.09682), beside the labels."""
    return Method(
        {"task": (1.0, task_loss()), "similarities": (weight, spec.last(losses.similarity_preserving))},
        spec.features,
        spec.teacher_features,
    )


def pkt(spec: TaskSpec, *, weight: float = 30000.0) -> Method:
    """Neighbours by the cosine of pooled features (Passalis and Tefas, arXiv:1803.10837), beside the labels."""
    return Method(
        {"task": (1.0, task_loss()), "neighbours": (weight, spec.pooled(losses.pkt))},
        spec.features,
        spec.teacher_features,
    )


def cc(spec: TaskSpec, *, weight: float = 0.02, width: int = 128) -> Method:
    """Correlation congruence of embedded features (Peng et al., arXiv:1904.01802), beside the labels.

    The embedding of the student's features is learnt, that of the teacher's stays as it was drawn. The toolbox of CRD
    trains both, and so can make the loss vanish by shrinking both to zero, whatever the student does.
    """
    return Method(
        {"task": (1.0, task_loss()), "congruence": (weight, EmbeddedCongruence(spec, width))},
        spec.features,
        spec.teacher_features,
    )


class EmbeddedCongruence(nn.Module):
    """`correlation_congruence` of linear embeddings (batch, width): a learnt one of the student's pooled features, a
    fixed random one of the teacher's.
    """

    teacher_embedding: Tensor

    def __init__(self, spec: TaskSpec, width: int) -> None:
        super().__init__()
        self.pooled = spec.pooled
        self.student_embedding = nn.Linear(spec.student_width, width)
        drawn = nn.Linear(spec.teacher_width, width, bias=False)
        self.register_buffer("teacher_embedding", drawn.weight.detach())

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        return self.pooled(self._of_embeddings)(student, teacher, labels)

    def _of_embeddings(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.correlation_congruence(
            self.student_embedding(student), F.linear(teacher, self.teacher_embedding)
        )


RELATION_METHODS: dict[str, Callable[..., Method]] = {"rkd": rkd, "sp": sp, "pkt": pkt, "cc": cc}
