"""Methods that match the maps at the ends of a network's stages, each a function (pair, *, settings) -> Method.

The defaults are the papers' for CIFAR-100, as the common toolboxes run them: beside a cross-entropy of weight 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods import Method
from kd.common.objective import Terms, task_loss
from kd.image_classification.student_model.matching import FeatureMatch, MapShape, stage_paths
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.teacher_model.backbones.base import initialize

FIRST_VARIANCE, LEAST_VARIANCE = 5.0, 1e-5  # of VID


def fitnet(pair: Pair, *, weight: float = 100.0) -> Method:
    """A hint at the middle stage, through a regressor (Romero et al., arXiv:1412.6550), and the labels' cross-entropy.

    As in the toolboxes, the regressor is a convolution, chosen by the two maps' sizes, and a batch norm. It differs in
    three ways: it ends in a ReLU only where the teacher's map is after one (that of a wide ResNet is not), the
    convolution begins with He's normal initialization, and it has no bias, which the batch norm would remove.
    """
    own, target = _middle(stage_paths(pair.student)), _middle(stage_paths(pair.teacher))
    own_shapes, shapes = pair.shapes([own], [target])
    layers = hint_regressor(own_shapes[own], shapes[target])
    hint = FeatureMatch(own, target, losses.feature_l2, layers, projector_resizes=True)
    return Method({"task": (1.0, task_loss()), "hint": (weight, hint)}, {own: own}, {target: target})


def attention(pair: Pair, *, weight: float = 1000.0) -> Method:
    """Attention maps of every stage (Zagoruyko and Komodakis, arXiv:1612.03928), beside the labels."""
    return _every_stage(
        pair, "attention", weight, lambda own, target: FeatureMatch(own, target, losses.attention_transfer)
    )


def nst(pair: Pair, *, weight: float = 50.0) -> Method:
    """What the neurons of every stage select (Huang and Wang, arXiv:1707.01219), beside the labels."""
    return _every_stage(pair, "selectivity", weight, lambda own, target: FeatureMatch(own, target, losses.nst))


def vid(pair: Pair, *, weight: float = 1.0) -> Method:
    """Information on the teacher's maps in the student's, at every stage (Ahn et al., arXiv:1904.05835), beside the
    labels: the teacher's likelihood under Gaussians whose means and variances are learnt with the student.
    """
    own_shapes, shapes = pair.shapes(*pair.stages())

    def match(own: str, target: str) -> FeatureMatch:
        channels = shapes[target].channels
        means = _three_convolutions(own_shapes[own].channels, channels)
        return FeatureMatch(own, target, LearntVariance(channels), means)

    return _every_stage(pair, "information", weight, match)


class LearntVariance(nn.Module):
    """`losses.variational` with a learnt variance for each channel, softplus(parameter) + LEAST_VARIANCE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        before_softplus = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.variance = nn.Parameter(torch.full((channels,), before_softplus))

    def forward(self, means: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return losses.variational(means, teacher, F.softplus(self.variance) + LEAST_VARIANCE, mask)


def regressor(channels: int, wanted: MapShape) -> nn.Module:
    """A 1x1 convolution and batch norm to a teacher's channels, and a ReLU where its map is after one."""
    return _normalized(nn.Conv2d(channels, wanted.channels, 1, bias=False), wanted)


def hint_regressor(own: MapShape, wanted: MapShape) -> nn.Module:
    """A convolution from a student's map to the channels and the size of a teacher's, a batch norm, and a ReLU where
    the teacher's map is after one.

    Of stride 2 to half the size, transposed to twice the size, without padding to any other smaller size. Where the
    teacher's map is larger by another factor, the student's keeps its size, and the teacher's is to be averaged down.
    """
    channels = own.channels, wanted.channels
    conv: nn.Module
    if own.size == 2 * wanted.size:
        conv = nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    elif 2 * own.size == wanted.size:
        conv = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False)
    elif own.size >= wanted.size:
        conv = nn.Conv2d(*channels, 1 + own.size - wanted.size, bias=False)
    else:
        conv = nn.Conv2d(*channels, 3, padding=1, bias=False)
    return _normalized(conv, wanted)


def _normalized(conv: nn.Module, wanted: MapShape) -> nn.Module:
    layers = nn.Sequential(conv, nn.BatchNorm2d(wanted.channels), nn.ReLU() if wanted.positive else nn.Identity())
    initialize(layers)
    return layers


def _three_convolutions(channels: int, wanted: int) -> nn.Module:
    """1x1 all of them, with a ReLU in between; what they end in may be negative."""
    return nn.Sequential(
        nn.Conv2d(channels, wanted, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(wanted, wanted, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(wanted, wanted, 1, bias=False),
    )


def _every_stage(pair: Pair, name: str, weight: float, match: Callable[[str, str], FeatureMatch]) -> Method:
    """The labels, and a term `name`_i for each pair of stages, made by `match` of their paths."""
    own, target = pair.stages()
    terms: Terms = {f"{name}_{i}": (weight, match(*paths)) for i, paths in enumerate(zip(own, target, strict=True))}
    return Method({"task": (1.0, task_loss())} | terms, {path: path for path in own}, {p: p for p in target})


def _middle(stages: list[str]) -> str:
    return stages[(len(stages) - 1) // 2]
