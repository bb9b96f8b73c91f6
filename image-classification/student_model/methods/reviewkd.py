"""Knowledge review: what a student knows at all depths, fused from the deepest up, for each map of the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.losses import hierarchical_l2
from kd.common.methods import Method
from kd.common.objective import task_loss, warm_up
from kd.common.outputs import Outputs
from kd.common.utils.ranges import Share
from kd.image_classification.student_model.matching import deepest_pairs, hooked, maps_before_relu, stage_paths
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.teacher_model.backbones.base import conv_norm

POOLED = "pooled"
WIDEST = 512  # of the maps that are fused


def reviewkd(pair: Pair, *, weight: float = 5.0, warmup: Share = 20 / 240) -> Method:
    """Knowledge review (Chen et al., arXiv:2104.09044), beside the labels: the student's stages and pooled features,
    fused from the last to the first, against the teacher's maps before their last ReLU and its pooled features.

    A teacher of a family that does not show its maps before a ReLU is reviewed by the maps that its stages yield.
    Where one network has more stages, its first ones are left out. `warmup` is the share of the training over which
    the weight rises with every step; in the authors' code it rises with every epoch, from 0 in the first. Their weight
    differs by pair, and they train in batches of 128 with a learning rate of 0.1 (ShuffleNets 0.02) and Nesterov's
    momentum, where the protocol of the tables has 64, 0.05 and none.
    """
    pairs = deepest_pairs(stage_paths(pair.student), maps_before_relu(pair.teacher))
    own, target = [path for path, _ in pairs], [path for _, path in pairs]
    own_shapes, shapes = pair.shapes(own, target)
    channels = [(own_shapes[a].channels, shapes[b].channels) for a, b in [*pairs, ("map", "map")]]
    review = Review([*pairs, (POOLED, POOLED)], channels)
    return Method(
        {"task": (1.0, task_loss()), "review": (warm_up(weight, warmup), review)},
        {path: path for path in own} | hooked(pair.student, "map"),
        {path: path for path in target} | hooked(pair.teacher, "map"),
    )


class Review(nn.Module):
    """A term: the sum over levels of `losses.hierarchical_l2` between what was fused there and the teacher's map.

    Args:
        names: of the student's and the teacher's features, for each level, the deepest last.
        channels: of both.
    """

    def __init__(self, names: list[tuple[str, str]], channels: list[tuple[int, int]]) -> None:
        super().__init__()
        self.names = names
        middle = min(WIDEST, channels[-1][0])
        deepest = len(names) - 1
        self.levels = nn.ModuleList(
            Fusion(own, middle, target, fuses=level < deepest) for level, (own, target) in enumerate(channels)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "a review needs a teacher's features"
        losses, deeper = [], None
        for level, (name, teacher_name) in zip(reversed(self.levels), reversed(self.names), strict=True):
            own, target = as_map(student.features[name]), as_map(teacher.features[teacher_name])
            reviewed, deeper = level(own, deeper, target.shape[-1])
            losses.append(hierarchical_l2(reviewed, target))
        return torch.stack(losses).sum()


class Fusion(nn.Module):
    """A map of the student (batch, channels, h, w) and what was fused below it -> (a map for the teacher's (batch,
    target_channels, size, size), what was fused here (batch, middle, size, size)).

    The two are added with weights that attention gives to either at each place. `fuses` is false for the deepest
    level, which has nothing below it.
    """

    def __init__(self, channels: int, middle: int, target_channels: int, fuses: bool) -> None:
        super().__init__()
        self.enter = conv_norm(channels, middle, kernel=1, relu=False)
        self.leave = conv_norm(middle, target_channels, relu=False)
        for layers in (self.enter, self.leave):
            nn.init.kaiming_uniform_(layers[0].get_parameter("weight"), a=1)
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, own: Tensor, deeper: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        fused = self.enter(own)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, own.shape[2:])
            shares = self.attention(torch.cat([fused, deeper], dim=1))  # (batch, 2, h, w)
            fused = shares[:, :1] * fused + shares[:, 1:] * deeper
        if fused.shape[-1] != size:
            fused = F.interpolate(fused, (size, size))
        return self.leave(fused), fused


def as_map(features: Tensor) -> Tensor:
    """Maps as they are, pooled features (batch, channels) as maps of one place."""
    return features if features.dim() == 4 else features[:, :, None, None]
