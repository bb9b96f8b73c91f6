"""Losses between features: hidden states, attention distributions, maps (batch, channels, height, width), and the
relations between the samples of a batch.

Most take a `mask` of the leading dimensions of the features, such as (batch,) or (batch, positions). The mean is then
over the samples or positions that the mask keeps, and zero if it keeps none.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from kd.common.losses.shared import einsum, kl, positive_temperature, product, same_shape, unit, weighted_mean

LEAST_DEVIATION = 1e-30
COARSE_SIZES = (4, 2, 1)
SMALLEST_MEAN = 1e-12  # minimum mean distance, to avoid dividing by zero if all samples are equal


# ---- hidden states and attention ----


def feature_l2(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over all elements of features of one shape (FitNets, arXiv:1412.6550).

    For hidden states (batch, positions, channels), `mask` is (batch, positions). Raises ValueError for shapes that
    differ.
    """
    same_shape(student, teacher)
    return weighted_mean((student.float() - teacher.detach().float()).square(), mask)


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean of 1 - cosine similarity along `dim` of features of one shape (DistilBERT, arXiv:1910.01108).

    `mask` has leading dimensions of the shape without `dim`. A zero vector has distance 1 from every vector. Raises
    ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    return weighted_mean(1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=dim), mask)


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of self-attention distributions, from queries and keys (MiniLM, arXiv:2002.10957).

    Queries and keys are (batch, positions, width); student and teacher may differ in width, and both are split into
    `heads` equal heads (MiniLMv2, arXiv:2012.15828). Averaged over batch, heads and positions; positions that `mask`
    (batch, positions) excludes count neither as queries nor as keys. Raises ValueError if `heads` does not divide a
    width, and for shapes that do not match.
    """
    student = _attention(student_query, student_key, heads, mask)
    teacher = _attention(teacher_query.detach(), teacher_key.detach(), heads, mask)
    same_shape(student, teacher)
    divergence = kl(teacher, student, dim=-1)
    return weighted_mean(rearrange(divergence, "batch head position -> batch position head"), mask)


def _attention(query: Tensor, key: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Log-probabilities (batch, heads, positions, positions): for each query position, over key positions."""
    same_shape(query, key)
    if query.shape[-1] % heads:
        raise ValueError(f"a width of {query.shape[-1]} does not split into {heads} heads")
    query, key = (
        rearrange(x.float(), "batch position (head width) -> batch head position width", head=heads)
        for x in (query, key)
    )
    scores = einsum(query, key, "batch head q width, batch head k width -> batch head q k")
    scores = scores / math.sqrt(query.shape[-1])
    if mask is not None:
        excluded = rearrange(mask == 0, "batch position -> batch 1 1 position")
        scores = scores.masked_fill(excluded, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


# ---- maps ----


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of spatial attention: the mean square over channels, L2-normalized over positions.

    Maps are (batch, channels, height, width), of one size but any number of channels; `mask` is (batch,). Zagoruyko
    and Komodakis, arXiv:1612.03928, with p = 2. Raises ValueError for maps of different size.
    """
    student, teacher = (
        F.normalize(rearrange(x.float().square().mean(1), "batch h w -> batch (h w)"), dim=1)
        for x in (student, teacher.detach())
    )
    same_shape(student, teacher)
    return weighted_mean((student - teacher).square(), mask)


def channel_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), with the softmax over the channels at each position.

    Maps are (batch, channels, height, width), `mask` is (batch,); summed over channels, averaged over batch and
    positions. Never negative, unlike KL on raw features. Raises ValueError for a temperature that is not positive and
    for shapes that differ.
    """
    same_shape(student, teacher)
    return weighted_mean(_softmax_kl(student, teacher, temperature, dim=1), mask)


def spatial_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Like `channel_kl`, but with the softmax over the positions of each channel (channel-wise distillation,
    arXiv:2011.13256); summed over positions, averaged over batch and channels.
    """
    same_shape(student, teacher)
    student, teacher = (rearrange(x, "batch channel h w -> batch channel (h w)") for x in (student, teacher))
    return weighted_mean(_softmax_kl(student, teacher, temperature, dim=-1), mask)


def _softmax_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    positive_temperature(temperature)
    log_student = F.log_softmax(student.float() / temperature, dim=dim)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=dim)
    return temperature**2 * kl(log_teacher, log_student, dim)


def nst(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps (NST, arXiv:1707.01219).

    mean k(t, t') + mean k(s, s') - 2 mean k(s, t) over all pairs of channels, k(a, b) = (a^T b)^2; a channel is the
    L2-normalized vector of its values at all positions. Maps are (batch, channels, height, width), of one size but any
    number of channels; averaged over the batch, with `mask` (batch,). Raises ValueError for maps of different size.
    """
    student, teacher = (
        unit(rearrange(x.float(), "batch channel h w -> batch channel (h w)")) for x in (student, teacher.detach())
    )
    same_shape(student[:, 0], teacher[:, 0])
    discrepancy = _mean_kernel(teacher, teacher) + _mean_kernel(student, student) - 2 * _mean_kernel(student, teacher)
    return weighted_mean(discrepancy, mask)


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Mean (batch,) of the squared products of all pairs of channels."""
    products = einsum(first, second, "batch i position, batch j position -> batch i j")
    return reduce(products.square(), "batch i j -> batch", "mean")


def variational(student: Tensor, teacher: Tensor, variance: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all elements of 0.5 * [(student - teacher)^2 / variance + log variance] (VID, arXiv:1904.05835).

    The negative log-likelihood, up to a constant, of the teacher's map under a Gaussian around the student's
    prediction, with one variance per channel (channels,). Its negative is a lower bound on the mutual information. It
    can be negative, and has its minimum if the variance is the mean squared difference. Maps are (batch, channels,
    height, width), `mask` is (batch,). Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    variance = rearrange(variance.float(), "channel -> channel 1 1")
    squares = (student.float() - teacher.detach().float()).square()
    return weighted_mean((squares / variance + variance.log()) / 2, mask)


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared differences to max(teacher, margin), summed over channels and positions, averaged over the batch.

    Maps are (batch, channels, height, width), of one shape, before a ReLU; `margin` (channels,) is negative, `mask` is
    (batch,). Elements with student <= max(teacher, margin) <= 0, which the ReLU zeroes in both, do not count. Overhaul
    of feature distillation (arXiv:1904.01866, section 3.2). The sum grows with the map, so its weight is small. Raises
    ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    student = student.float()
    teacher = torch.maximum(teacher.detach().float(), rearrange(margin.float(), "channel -> channel 1 1"))
    counts = (student > teacher) | (teacher > 0)
    return weighted_mean(reduce((student - teacher).square() * counts, "batch ... -> batch", "sum"), mask)


def mean_below_zero(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[x | x < 0] of Gaussians, of any shape: mean - deviation * pdf(z) / cdf(-z), z = mean / deviation.

    Computed with erfcx in double precision, which is accurate for any probability of x < 0. As the probability
    vanishes, the result approaches -deviation^2 / mean. (The published code of arXiv:1904.01866 uses -3 * deviation
    for probabilities below 0.001.) The sign of `deviation` has no effect.
    """
    device = mean.device
    mean, deviation = mean.cpu().double(), deviation.cpu().double()  # Apple's GPUs have no double precision
    deviation = deviation.abs().clamp(min=LEAST_DEVIATION)
    hazard = math.sqrt(2 / math.pi) / torch.special.erfcx(mean / deviation / math.sqrt(2))
    return (mean - deviation * hazard).clamp(max=0).float().to(device)


def hierarchical_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of the mean squared differences at full size and after average pooling to 4x4, 2x2 and 1x1.

    Maps are (batch, channels, height, width), of one shape. Sizes that are not below the height are skipped. Each
    size weighs half as much as the next larger one. The hierarchical context loss of knowledge review
    (arXiv:2104.09044). Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    student, teacher = student.float(), teacher.detach().float()
    sizes = [size for size in COARSE_SIZES if size < student.shape[2]]
    loss, total = feature_l2(student, teacher), 1.0
    for level, size in enumerate(sizes, start=1):
        pooled = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        loss = loss + 0.5**level * feature_l2(*pooled)
        total += 0.5**level
    return loss / total


def stage_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of each student stage over the teacher's stages: softmax(queries @ keys^T) (SemCKD, arXiv:2012.03236).

    Queries are (batch, student stages, width), keys (batch, teacher stages, width); each row of the result (batch,
    student stages, teacher stages) sums to 1.
    """
    scores = einsum(queries, keys, "batch student width, batch teacher width -> batch student teacher")
    return F.softmax(scores, dim=-1)


def attended_mean(distances: Tensor, attention: Tensor) -> Tensor:
    """Distances (batch, student stages, teacher stages), weighted by `attention` of the same shape and summed over the
    teacher's stages, averaged over batch and student stages. SemCKD (arXiv:2012.03236).
    """
    same_shape(distances, attention)
    return (distances.float() * attention.float()).sum(-1).mean()


# ---- relations between the samples of a batch ----
#
# Features are (batch, width), in the same order for student and teacher. The two widths may differ unless a docstring
# excludes it, and only correlation_congruence depends on the order. For samples with equal features, the distance is
# zero, the direction is undefined, and neither has a gradient.


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 / batch^2) * ||Q_s - Q_t||_F^2 (SP, arXiv:1907.09682), Q = F F^T with rows of length 1.

    F are features (batch, width), such as flattened maps. The loss is the mean squared difference of the similarities
    of all pairs of samples. Raises ValueError for batches of different size.
    """
    student, teacher = (unit(_gram(x)) for x in (student, teacher.detach()))
    same_shape(student, teacher)
    return (student - teacher).square().mean()


def similarity_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of samples, (batch, batch).

    Unlike in `similarity_preserving`, the rows of similarities are not normalized, so their absolute size is matched
    too. That of a sample with itself is 1 in both. Raises ValueError for batches of different size.
    """
    student, teacher = (_gram(unit(x.float())) for x in (student, teacher.detach()))
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

    CC (arXiv:1904.01802) as in the toolbox of CRD, whose code is from the authors and gave the published figures. The
    paper instead writes the difference of correlation matrices. Embeddings are (batch, width), of one width. Zero for
    a single sample. The loss depends on the order of the batch, which training shuffles. Raises ValueError for shapes
    that differ.
    """
    same_shape(student, teacher)
    gaps = (student.float() - teacher.detach().float()).abs()
    congruence = (gaps[:-1] * gaps[1:]).sum(1)  # (batch - 1,)
    return congruence.sum() / max(len(congruence), 1)


def noise_contrastive(log_scores: Tensor, samples: int) -> Tensor:
    """-log(P / (P + c)) of the positive, minus the sum of log(c / (P + c)) over the negatives (CRD, arXiv:1910.10699).

    `log_scores` are log P (batch, 1 + negatives), with the positive first. c = negatives / samples is the score of
    noise drawn from that number of samples. Summed over negatives, averaged over the batch. The authors' code also
    adds 1e-7 to the denominators. Raises ValueError if there are no negatives.
    """
    negatives = log_scores.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"log_scores must have a positive and negatives, got {tuple(log_scores.shape)}")
    log_odds = log_scores.float() - math.log(
        negatives / samples
    )  # log odds that a sample is the positive and not noise
    return -(F.logsigmoid(log_odds[:, 0]) + F.logsigmoid(-log_odds[:, 1:]).sum(1)).mean()


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over i of -log softmax(cos(first_i, second) / temperature)[i], over the samples of a batch (InfoNCE,
    arXiv:1807.03748).

    `first` and `second` (batch, width) are two views of the same samples; both have gradients. With two dropout masks
    as views it is the loss of unsupervised SimCSE (arXiv:2104.08821). Raises ValueError for a temperature that is not
    positive and for shapes that differ.
    """
    same_shape(first, second)
    positive_temperature(temperature)
    similarities = product(unit(first.float()), rearrange(unit(second.float()), "j width -> width j")) / temperature
    return F.cross_entropy(similarities, torch.arange(len(first), device=first.device))


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
