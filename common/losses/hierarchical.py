"""Losses between maps on several levels: before the ReLUs of stages, at several sizes, of all stages with all."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.losses.features import feature_l2
from kd.common.losses.shared import product, same_shape, weighted_mean

LEAST_DEVIATION = 1e-30
COARSE_SIZES = (4, 2, 1)


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared differences to max(teacher, margin), summed over channels and places, averaged over the batch.

    Maps are (batch, channels, height, width), of one shape, before a ReLU; `margin` (channels,) is negative. Where the
    ReLU shows nothing of either, student <= max(teacher, margin) <= 0, nothing counts. Overhaul of feature
    distillation (arXiv:1904.01866, section 3.2); as the sum grows with the maps, its weight is small. `mask` (batch,)
    restricts the mean to the samples that it keeps. Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    own = student.float()
    target = torch.maximum(teacher.detach().float(), margin.float().view(-1, 1, 1))
    counts = (own > target) | (target > 0)
    return weighted_mean(((own - target).square() * counts).flatten(1).sum(1), mask)


def mean_below_zero(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[x | x < 0] of Gaussians, of any shape: mean - deviation * pdf(z) / cdf(-z), z = mean / deviation.

    Computed through erfcx in double precision, which holds however improbable it is that x < 0: there the result
    approaches -deviation^2 / mean. (The published code of arXiv:1904.01866 takes -3 * deviation where that has a
    probability below 0.001.) The sign of `deviation` does not matter.
    """
    mean, deviation = mean.double(), deviation.double().abs().clamp(min=LEAST_DEVIATION)
    hazard = math.sqrt(2 / math.pi) / torch.special.erfcx(mean / deviation / math.sqrt(2))
    return (mean - deviation * hazard).clamp(max=0).float()


def hierarchical_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the mean squared differences at full size and of averages down to 4x4, 2x2 and 1x1.

    Maps are (batch, channels, height, width), of one shape. Sizes not below the height drop out; of those that remain,
    full size first, each weighs half as much as the one before. The hierarchical context loss of knowledge review
    (arXiv:2104.09044). Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    own, target = student.float(), teacher.detach().float()
    sizes = [size for size in COARSE_SIZES if size < own.shape[2]]
    loss, total = feature_l2(own, target), 1.0
    for level, size in enumerate(sizes, start=1):
        loss = loss + 0.5**level * feature_l2(F.adaptive_avg_pool2d(own, size), F.adaptive_avg_pool2d(target, size))
        total += 0.5**level
    return loss / total


def stage_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """How much each stage of the student looks at each of the teacher: softmax(queries @ keys^T).

    Queries are (batch, stages, width), keys (batch, teacher's stages, width); each row of the result (batch, stages,
    teacher's stages) sums to 1. SemCKD (arXiv:2012.03236).
    """
    return F.softmax(product(queries, keys.transpose(1, 2)), dim=-1)


def attended_mean(distances: Tensor, attention: Tensor) -> Tensor:
    """Distances (batch, stages, teacher's stages), summed over the teacher's with the weights `attention`, which has
    their shape, and averaged over batch and stages. SemCKD (arXiv:2012.03236).
    """
    same_shape(distances, attention)
    return (distances.float() * attention.float()).sum(-1).mean()
