"""Methods that match how the samples of a batch relate to one another, for classifiers of any domain.

The defaults are the papers' for CIFAR-100, as the common toolboxes run them: with a cross-entropy of weight 1.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods.method import Method, TaskSpec, labels, match


def rkd(spec: TaskSpec, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Method:
    """Relative distances and angles of pooled features (Park et al., arXiv:1904.05068), plus the labels."""
    distances = spec.match_pooled("distances", distance_weight, losses.rkd_distance)
    return labels() + distances + spec.match_pooled("angles", angle_weight, losses.rkd_angle)


def sp(spec: TaskSpec, *, weight: float = 3000.0) -> Method:
    """Similarities of the last features before pooling (SP, arXiv:1907.09682), plus the labels."""
    last, teacher_last = spec.student_features.last, spec.teacher_features.last
    loss = losses.similarity_preserving
    return labels() + match("similarities", weight, last, teacher_last, loss, transform=spec.flatten)


def pkt(spec: TaskSpec, *, weight: float = 30000.0) -> Method:
    """Neighbours by the cosine of pooled features (Passalis and Tefas, arXiv:1803.10837), plus the labels."""
    return labels() + spec.match_pooled("neighbours", weight, losses.pkt)


def cc(spec: TaskSpec, *, weight: float = 0.02, width: int = 128) -> Method:
    """Correlation congruence of embedded features (Peng et al., arXiv:1904.01802), plus the labels.

    The embedding of the student's features is trained, that of the teacher's stays as it was drawn. The toolbox of CRD
    trains both, and so can make the loss vanish by shrinking both to zero, whatever the student does.
    """
    widths = spec.student_features.head.width, spec.teacher_features.head.width
    return labels() + spec.match_pooled("congruence", weight, EmbeddedCongruence(*widths, width))


class EmbeddedCongruence(nn.Module):
    """`correlation_congruence` of linear embeddings (batch, width): a trained one of the student's pooled features, a
    fixed random one of the teacher's.
    """

    teacher_embedding: Tensor

    def __init__(self, student_width: int, teacher_width: int, width: int) -> None:
        super().__init__()
        self.student_embedding = nn.Linear(student_width, width)
        drawn = nn.Linear(teacher_width, width, bias=False)
        self.register_buffer("teacher_embedding", drawn.weight.detach())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.correlation_congruence(
            self.student_embedding(student), F.linear(teacher, self.teacher_embedding)
        )


RELATION_METHODS: dict[str, Callable[..., Method]] = {"rkd": rkd, "sp": sp, "pkt": pkt, "cc": cc}
