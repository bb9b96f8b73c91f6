"""Methods that match the maps at the ends of a network's stages, each a function (pair, *, settings) -> Method.

The defaults are the papers' for CIFAR-100, as the common toolboxes run them: beside a cross-entropy of weight 1.
"""

from torch import nn

from common.losses import attention_transfer, feature_l2
from common.methods import Method
from common.objective import Objective, Terms, task_loss
from image_classification.student_model.matching import FeatureMatch, MapShape, stage_paths
from image_classification.student_model.methods.pair import Pair
from image_classification.teacher_model.backbones.base import initialize


def fitnet(pair: Pair, *, weight: float = 100.0) -> Method:
    """A hint at the middle stage, through a regressor (Romero et al., arXiv:1412.6550), beside the labels."""
    own, target = _middle(stage_paths(pair.student)), _middle(stage_paths(pair.teacher))
    own_shapes, shapes = pair.shapes([own], [target])
    hint = FeatureMatch(own, target, feature_l2, regressor(own_shapes[own].channels, shapes[target]))
    return Method(Objective(task=(1.0, task_loss()), hint=(weight, hint)), {own: own}, {target: target})


def attention(pair: Pair, *, weight: float = 1000.0) -> Method:
    """Attention maps of every stage (Zagoruyko and Komodakis, arXiv:1612.03928), beside the labels."""
    own, target = pair.stages()
    terms: Terms = {
        f"attention_{number}": (weight, FeatureMatch(a, b, attention_transfer))
        for number, (a, b) in enumerate(zip(own, target, strict=True))
    }
    return Method(Objective(task=(1.0, task_loss()), **terms), {path: path for path in own}, {p: p for p in target})


def regressor(channels: int, wanted: MapShape) -> nn.Module:
    """A 1x1 convolution and batch norm to a teacher's channels, and a ReLU where its map is after one."""
    layers = nn.Sequential(
        nn.Conv2d(channels, wanted.channels, 1, bias=False),
        nn.BatchNorm2d(wanted.channels),
        nn.ReLU() if wanted.positive else nn.Identity(),
    )
    initialize(layers)
    return layers


def _middle(stages: list[str]) -> str:
    return stages[(len(stages) - 1) // 2]
