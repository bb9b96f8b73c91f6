"""Methods that match the output maps of stages one by one.

The defaults are those of the papers for CIFAR-100 with, as in the common toolboxes, a cross-entropy of weight 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods import Feature, Method, TaskSpec, depth_map, labels, match
from kd.common.objective import FeatureLoss, average_down
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.matching import maps_before_relu, pre_activations
from kd.image_classification.teacher_model.backbones.base import conv_norm, initialize

FIRST_VARIANCE, LEAST_VARIANCE = 5.0, 1e-5  # of VID


def fitnet(spec: TaskSpec, *, weight: float = 100.0) -> Method:
    """A hint at the middle stage, through a regressor (FitNets, Romero et al., arXiv:1412.6550), plus the labels.

    As in the toolboxes, the regressor is a convolution, chosen by the sizes of the two maps, and a batch norm. There
    are three differences: it ends in a ReLU only if the teacher's map follows one (a wide ResNet's does not), the
    convolution has He's normal initialization, and it has no bias, which the batch norm would cancel.
    """
    student, teacher = _middle(spec.student_features.stages), _middle(spec.teacher_features.stages)
    return labels() + match("hint", weight, student, teacher, losses.feature_l2, hint_regressor(student, teacher))


def attention(spec: TaskSpec, *, weight: float = 1000.0) -> Method:
    """Attention maps of every stage (Zagoruyko and Komodakis, arXiv:1612.03928), plus the labels."""
    return _every_stage(spec, "attention", weight, lambda student, teacher: (losses.attention_transfer, None))


def nst(spec: TaskSpec, *, weight: float = 50.0) -> Method:
    """Neuron selectivity of every stage (NST, Huang and Wang, arXiv:1707.01219), plus the labels."""
    return _every_stage(spec, "selectivity", weight, lambda student, teacher: (losses.nst, None))


def vid(spec: TaskSpec, *, weight: float = 1.0) -> Method:
    """Mutual information of the maps of every stage (VID, Ahn et al., arXiv:1904.05835), plus the labels: the
    likelihood of the teacher's maps under Gaussians whose means and variances are trained with the student.
    """

    def variance_and_means(student: Feature, teacher: Feature) -> tuple[FeatureLoss, nn.Module]:
        means = three_convolutions(student, teacher)
        return TrainedVariance(teacher.width), means

    return _every_stage(spec, "information", weight, variance_and_means)


def ofd(spec: TaskSpec, *, weight: float = 1e-3) -> Method:
    """Maps of every stage before its last ReLU (OFD, Heo et al., arXiv:1904.01866), plus the labels.

    A stage weighs half as much as the next one. The weight is small because differences are summed over a map and
    averaged only over the batch, as in the authors' code. The teacher must expose its maps before the ReLU. For a
    student that does not, the outputs of its stages are matched. If one network has more stages, its first stages are
    left out. The teacher stays in eval mode, as in the paper; in mdistiller it uses the statistics of each batch.
    """
    norms = [spec.teacher.get_submodule(norm) for _, norm in pre_activations(spec.teacher)]
    maps, teacher_maps = maps_before_relu(spec.student), maps_before_relu(spec.teacher)
    pairs = depth_map(len(maps), len(teacher_maps), "last")
    method = labels()
    for number, (i, j) in enumerate(pairs):
        connector = Regressor(
            *conv_norm(maps[i].width, teacher_maps[j].width, 1, relu=False), size=teacher_maps[j].size
        )
        initialize(connector)
        loss, halved = PartialL2(margins(norms[j])), weight * 0.5 ** (len(pairs) - 1 - number)
        method += match(f"overhaul_{number}", halved, maps[i], teacher_maps[j], loss, connector)
    return method


def margins(norm: nn.Module) -> Tensor:
    """The mean (channels,) of the negative values of each channel, from the batch norm before a ReLU."""
    assert isinstance(norm, nn.BatchNorm2d), "margins need a teacher whose batch norms are not folded"
    return losses.mean_below_zero(norm.bias.detach(), norm.weight.detach())


class PartialL2(nn.Module):
    """`losses.partial_l2` with fixed margins (channels,)."""

    margin: Tensor

    def __init__(self, margin: Tensor) -> None:
        super().__init__()
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return losses.partial_l2(student, teacher, self.margin, mask)


class TrainedVariance(nn.Module):
    """`losses.variational` with a trained variance for each channel: softplus(parameter) + LEAST_VARIANCE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        before_softplus = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.variance = nn.Parameter(torch.full((channels,), before_softplus))

    def forward(self, means: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return losses.variational(means, teacher, F.softplus(self.variance) + LEAST_VARIANCE, mask)


class Regressor(nn.Sequential):
    """Layers from a student's map to a teacher's channels. A map larger than `size` is averaged down first."""

    def __init__(self, *layers: Any, size: int | None = None) -> None:
        super().__init__(*layers)
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps if self.size is None else average_down(maps, self.size))


def regressor(student: Feature, teacher: Feature) -> nn.Module:
    """A 1x1 convolution to the teacher's channels, a batch norm, and a ReLU if the teacher's map follows one."""
    return Regressor(*_normalized(nn.Conv2d(student.width, teacher.width, 1, bias=False), teacher), size=teacher.size)


def hint_regressor(student: Feature, teacher: Feature) -> nn.Module:
    """A convolution from the student's map to the channels and the size of the teacher's, a batch norm, and a ReLU if
    the teacher's map follows one.

    The convolution has stride 2 for half the size, is transposed for twice the size, and has no padding for any other
    smaller size. If the teacher's map is larger by another factor, the student's map keeps its size, and the teacher's
    is averaged down.
    """
    channels = student.width, teacher.width
    conv: nn.Module
    if student.size == 2 * teacher.size:
        conv = nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    elif 2 * student.size == teacher.size:
        conv = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False)
    elif student.size >= teacher.size:
        conv = nn.Conv2d(*channels, 1 + student.size - teacher.size, bias=False)
    else:
        conv = nn.Conv2d(*channels, 3, padding=1, bias=False)
    return _normalized(conv, teacher)


def _normalized(conv: nn.Module, teacher: Feature) -> nn.Sequential:
    layers = nn.Sequential(conv, nn.BatchNorm2d(teacher.width), nn.ReLU() if teacher.positive else nn.Identity())
    initialize(layers)
    return layers


def three_convolutions(student: Feature, teacher: Feature) -> nn.Module:
    """Three 1x1 convolutions with ReLUs between them; their output may be negative."""
    return Regressor(
        nn.Conv2d(student.width, teacher.width, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher.width, teacher.width, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher.width, teacher.width, 1, bias=False),
        size=teacher.size,
    )


def _every_stage(
    spec: TaskSpec,
    name: str,
    weight: float,
    loss_and_projector: Callable[[Feature, Feature], tuple[FeatureLoss, nn.Module | None]],
) -> Method:
    """The labels, and a term `name`_i for each stage. Raises UserError for different numbers of stages."""
    stages, teacher_stages = spec.student_features.stages, spec.teacher_features.stages
    if len(stages) != len(teacher_stages):
        raise UserError(
            f"this method matches stages one by one, but {spec.student.config.architecture} has {len(stages)} and "
            f"{spec.teacher.config.architecture} {len(teacher_stages)}: choose networks with equally many stages"
        )
    method = labels()
    for i, (student, teacher) in enumerate(zip(stages, teacher_stages, strict=True)):
        method += match(f"{name}_{i}", weight, student, teacher, *loss_and_projector(student, teacher))
    return method


def _middle(stages: Sequence[Feature]) -> Feature:
    return stages[(len(stages) - 1) // 2]
