"""Losses between how the samples of a batch relate to one another: similarities, distances, angles, contrasts.

Features are (batch, width), in the same order for student and teacher; the two widths may differ unless a docstring
says otherwise, and only correlation_congruence depends on that order. Samples with equal features have neither a
distance nor a direction between them, nor a gradient of either.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kd.common.losses.shared import product, same_shape, unit

SMALLEST_MEAN = 1e-12  # of distances, to avoid dividing by zero if all samples coincide


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 / batch^2) * ||Q_s - Q_t||_F^2 (SP, arXiv:1907.09682), Q = F F^T with rows of length 1.

    F are features (batch, width), such as flattened maps: the mean over all pairs of samples of the squared difference
    of their similarities. Raises ValueError for batches of different size.
    """
    student, teacher = (unit(_gram(x)) for x in (student, teacher.detach()))
    same_shape(student, teacher)
    return (student - teacher).square().mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between relative distances, RKD-D (arXiv:1904.05068, eq. 6): |x_i - x_j| over the batch's mean.

    The mean is over nonzero distances; the loss is averaged over all pairs (batch, batch), including those of a sample
    with itself, as published weights expect. Raises ValueError for batches of different size.
    """
    student, teacher = (_relative_distances(x.float()) for x in (student, teacher.detach()))
    same_shape(student, teacher)
    return F.smooth_l1_loss(student, teacher)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of all angles, RKD-A (arXiv:1904.05068, eq. 9): that at x_i from x_j to x_k.

    Averaged over all triplets (batch, batch, batch), including those with a sample twice, as published weights expect.
    Raises ValueError for batches of different size.
    """
    student, teacher = (_angles(x.float()) for x in (student, teacher.detach()))
    same_shape(student, teacher)
    return F.smooth_l1_loss(student, teacher)


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean over (batch, batch) of P_t * log((P_t + eps) / (P_s + eps)) (PKT, arXiv:1803.10837).

    Row i of P is the probability of each sample as a neighbour of sample i: (cosine similarity + 1) / 2, normalized
    over the row. KL(P_t || P_s) of a row is thus summed over samples, averaged over rows and divided by the batch once
    more, as in the authors' code. Raises ValueError for batches of different size.
    """
    student, teacher = (_neighbours(x.float()) for x in (student, teacher.detach()))
    same_shape(student, teacher)
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i of sum_d |D_i| * |D_(i+1)|, D = student - teacher, for consecutive samples of the batch.

    CC (arXiv:1904.01802) as in the toolbox of CRD, which has it from the authors and published its figures: not the
    difference of correlation matrices that the paper writes. Embeddings are (batch, width), of one width; zero for a
    single sample. It depends on the order of the batch, which training shuffles. Raises ValueError for shapes that
    differ.
    """
    same_shape(student, teacher)
    gaps = (student.float() - teacher.detach().float()).abs()
    congruence = (gaps[:-1] * gaps[1:]).sum(1)  # (batch - 1,)
    return congruence.sum() / max(len(congruence), 1)


def noise_contrastive(log_scores: Tensor, samples: int) -> Tensor:
    """-log(P / (P + c)) of the positive pair - the sum of log(c / (P + c)) over the negatives (CRD, arXiv:1910.10699).

    `log_scores` are log P (batch, 1 + negatives), with the positive first; c = negatives / samples is the score of
    noise that is drawn from that number of samples. Summed over negatives, averaged over the batch. Without the 1e-7
    that the authors' code adds to the denominators. Raises ValueError if there are no negatives.
    """
    negatives = log_scores.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"log_scores must hold a pair and its negatives, got {tuple(log_scores.shape)}")
    log_odds = log_scores.float() - math.log(negatives / samples)  # of a positive against noise
    return -(F.logsigmoid(log_odds[:, 0]) + F.logsigmoid(-log_odds[:, 1:]).sum(1)).mean()


def _gram(vectors: Tensor) -> Tensor:
    """Inner products (..., i, j) of vectors (..., i, width)."""
    return product(vectors, rearrange(vectors, "... j width -> ... width j"))  # faster than an einsum


def _relative_distances(features: Tensor) -> Tensor:
    # Without matrix products: |a|^2 + |b|^2 - 2ab cancels between close points. The slope at distance zero is zero.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # (batch, batch)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=SMALLEST_MEAN)


def _angles(features: Tensor) -> Tensor:
    """Cosines [i, j, k] of the angle at sample i between the directions to samples j and k."""
    return _gram(unit(features - rearrange(features, "i width -> i 1 width")))


def _neighbours(features: Tensor) -> Tensor:
    similarities = ((_gram(unit(features)) + 1) / 2).clamp(min=0)  # (batch, batch)
    return similarities / similarities.sum(1, keepdim=True)
