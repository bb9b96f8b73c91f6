"""Overhaul of feature distillation: maps before the last ReLU of every stage."""

from torch import Tensor, nn

from kd.common.losses import mean_below_zero, partial_l2
from kd.common.methods import Method
from kd.common.objective import Terms, task_loss
from kd.image_classification.student_model.matching import (
    FeatureMatch,
    deepest_pairs,
    maps_before_relu,
    pre_activations,
)
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.teacher_model.backbones.base import conv_norm, initialize


def ofd(pair: Pair, *, weight: float = 1e-3) -> Method:
    """Maps of every stage before its last ReLU (OFD, Heo et al., arXiv:1904.01866), beside the labels.

    A stage counts half as much as the one behind it. The weight is small because differences are summed over a map and
    averaged over the batch alone, as in the authors' code. The teacher has to show its maps before their ReLU; a
    student of a family that does not is matched by the maps that its stages yield. Where one network has more stages,
    its first ones are left out. The teacher stays in evaluation mode, as in the paper; mdistiller's runs on the
    statistics of each batch.
    """
    pairs = deepest_pairs(maps_before_relu(pair.student), pre_activations(pair.teacher))
    own, target = [path for path, _ in pairs], [wanted.path for _, wanted in pairs]
    own_shapes, shapes = pair.shapes(own, target)
    terms: Terms = {"task": (1.0, task_loss())}
    for number, (path, wanted) in enumerate(pairs):
        connector = conv_norm(own_shapes[path].channels, shapes[wanted.path].channels, kernel=1, relu=False)
        initialize(connector)
        loss = PartialL2(margins(pair.teacher.get_submodule(wanted.norm)))
        match = FeatureMatch(path, wanted.path, loss, connector)
        terms[f"overhaul_{number}"] = (weight * 0.5 ** (len(pairs) - 1 - number), match)
    return Method(terms, {path: path for path in own}, {path: path for path in target})


def margins(norm: nn.Module) -> Tensor:
    """Of each channel (channels,) the mean of what is negative, as the batch norm before a ReLU describes it."""
    assert isinstance(norm, nn.BatchNorm2d), "margins are those of a teacher whose batch norms are not folded away"
    return mean_below_zero(norm.bias.detach(), norm.weight.detach())


class PartialL2(nn.Module):
    """`losses.partial_l2` with fixed margins (channels,)."""

    margin: Tensor

    def __init__(self, margin: Tensor) -> None:
        super().__init__()
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return partial_l2(student, teacher, self.margin, mask)
