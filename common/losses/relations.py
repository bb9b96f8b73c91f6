"""Losses between how the samples of a batch relate to one another: similarities, distances and angles.

Features are (batch, width), in the same order on both sides; the two widths may differ unless a docstring says
otherwise, and only correlation_congruence depends on that order. Between samples whose features coincide there is
neither distance nor direction, nor a gradient of either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.losses.shared import product, same_shape, unit

SMALLEST_MEAN = 1e-12  # of distances, so that a batch at one point is divided by something


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 / batch^2) * ||Q_s - Q_t||_F^2 (SP, arXiv:1907.09682), rows of Q = F F^T being scaled to length 1.

    F are features (batch, anything), such as flattened maps: the mean over all pairs of samples of the squared
    difference of their similarities. Raises ValueError for batches of different size.
    """
    own, target = (unit(product(x, x.T)) for x in (student, teacher.detach()))  # (batch, batch)
    same_shape(own, target)
    return (own - target).square().mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between relative distances, RKD-D (arXiv:1904.05068, eq. 6): |x_i - x_j| over the batch's mean.

    The mean is over those distances that are not zero; the loss is averaged over all pairs (batch, batch), those of a
    sample with itself included, as published weights expect. Raises ValueError for batches of different size.
    """
    own, target = (_relative_distances(x.float()) for x in (student, teacher.detach()))
    same_shape(own, target)
    return F.smooth_l1_loss(own, target)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of all angles, RKD-A (arXiv:1904.05068, eq. 9): that at x_i from x_j to x_k.

    Averaged over all triplets (batch, batch, batch), also those with a sample twice, as published weights expect.
    Raises ValueError for batches of different size.
    """
    own, target = (_angles(x.float()) for x in (student, teacher.detach()))
    same_shape(own, target)
    return F.smooth_l1_loss(own, target)


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean over (batch, batch) of P_t * log((P_t + eps) / (P_s + eps)) (PKT, arXiv:1803.10837).

    Row i of P is the probability of each sample as a neighbour of sample i: (cosine similarity + 1) / 2, over the sum
    of the row. KL(P_t || P_s) of a row is thus summed over samples, averaged over rows and divided by the batch once
    more, as the authors' code does. Raises ValueError for batches of different size.
    """
    own, target = (_neighbours(x.float()) for x in (student, teacher.detach()))
    same_shape(own, target)
    return (target * ((target + eps) / (own + eps)).log()).mean()


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i of sum_d |D_i| * |D_(i+1)|, D = student - teacher, for samples that follow each other in the batch.

    CC (arXiv:1904.01802) as the toolbox of CRD has it from the authors, and as its published figures were measured:
    not the difference of correlation matrices that the paper writes. Embeddings are (batch, width), of one width; zero
    for a single sample. It depends on the order of the batch, which training shuffles. Raises ValueError for shapes
    that differ.
    """
    same_shape(student, teacher)
    gaps = (student.float() - teacher.detach().float()).abs()
    congruence = (gaps[:-1] * gaps[1:]).sum(1)  # (batch - 1,)
    return congruence.sum() / max(len(congruence), 1)


def _relative_distances(features: Tensor) -> Tensor:
    # Without matrix products: |a|^2 + |b|^2 - 2ab cancels between close points. The slope at distance zero is zero.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # (batch, batch)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=SMALLEST_MEAN)


def _angles(features: Tensor) -> Tensor:
    directions = unit(features - features[:, None])  # (batch, batch, width), [i, j] from sample i to sample j
    return product(directions, directions.transpose(1, 2))  # [i, j, k] of the angle at i


def _neighbours(features: Tensor) -> Tensor:
    directions = unit(features)
    similarities = ((product(directions, directions.T) + 1) / 2).clamp(min=0)  # (batch, batch)
    return similarities / similarities.sum(1, keepdim=True)
