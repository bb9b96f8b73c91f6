"""Losses between the logits (batch, classes) of classifiers, of published methods; labels are (batch,).

They decouple or standardize the logits, compare relations between samples or classes, or transport probability.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from kd.common.losses.shared import LOG_ZERO, einsum, kl, same_shape, unit, weighted_mean


def standardized(logits: Tensor) -> Tensor:
    """(logits - mean) / (standard deviation + 1e-7) of each sample, in fp32, as in LSKD (arXiv:2403.01427).

    The standard deviation is the unbiased one. The result does not depend on shift and scale of a sample's logits.
    Raises ValueError for a single class, which has no deviation.
    """
    if logits.shape[-1] < 2:
        raise ValueError("standardized logits need at least 2 classes, got 1")
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """DKD (arXiv:2203.08679): T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)], averaged over the batch.

    b = (p_label, 1 - p_label) of the softmax p at T, q the softmax at T over the other classes. With alpha = 1 and
    beta = 1 - p_label of the teacher it is Hinton's KL. Computed in log space. Raises ValueError for fewer than three
    classes, which leave no distribution over the others, and for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 3:
        raise ValueError(f"decoupled KD needs at least 3 classes, got {student_logits.shape[1]}")
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    (student_binary, student_others), (binary, others) = _decoupled(student, labels), _decoupled(teacher, labels)
    divergence = alpha * kl(binary, student_binary, dim=1) + beta * kl(others, student_others, dim=1)  # (batch,)
    return temperature**2 * divergence.mean()


def refined_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """RLD (arXiv:2408.07703): T^2 [alpha KL(c_t || c_s) + beta KL(m_t || m_s)], averaged over the batch.

    c is (probability, 1 - probability) of the softmax at T, for the class that the teacher predicts in c_t and for the
    label in c_s: a teacher that is wrong gives its confidence but not its class. m is the softmax at T over the
    classes whose teacher logit is below that of the label; without such a class its KL is zero. Where the teacher is
    right, the loss is that of `decoupled_kd`. Computed in log space. Raises ValueError for a single class, and for
    shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 2:
        raise ValueError("refined KD needs at least 2 classes, got 1")
    student, teacher = (x.float() / temperature for x in (student_logits, teacher_logits.detach()))
    student_confidence, _ = _decoupled(F.log_softmax(student, dim=1), labels)
    confidence, _ = _decoupled(F.log_softmax(teacher, dim=1), teacher.argmax(dim=1))
    masked = teacher >= teacher.gather(1, rearrange(labels, "batch -> batch 1"))
    student_below, below = (F.log_softmax(x.masked_fill(masked, LOG_ZERO), dim=1) for x in (student, teacher))
    divergence = alpha * kl(confidence, student_confidence, dim=1) + beta * kl(below, student_below, dim=1)  # (batch,)
    return temperature**2 * divergence.mean()


def correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """DIST (arXiv:2205.10536): T^2 [beta (1 - mean_i r(p_i^s, p_i^t)) + gamma (1 - mean_c r(p_c^s, p_c^t))].

    r is Pearson's correlation, p the softmax at T: over the classes of each sample (rows p_i), and over the samples of
    the batch for each class (columns p_c). The correlation with a constant counts as 0. Raises ValueError for shapes
    that differ.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    between = 1 - _correlations(student, teacher).mean()
    within = 1 - _correlations(student.T, teacher.T).mean()
    return temperature**2 * (beta * between + gamma * within)


def class_relations(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """||P_t^T P_t - P_s^T P_s||_F^2 / classes, P (batch, classes) being the softmax at T (MLKD, CVPR 2023).

    Raises ValueError for shapes that differ.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    pattern = "sample i, sample j -> i j"
    return (einsum(teacher, teacher, pattern) - einsum(student, student, pattern)).square().sum() / student.shape[1]


def sample_relations(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """||P_t P_t^T - P_s P_s^T||_F^2 / batch, otherwise as `class_relations` (MLKD, CVPR 2023)."""
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    pattern = "i c, j c -> i j"
    return (einsum(teacher, teacher, pattern) - einsum(student, student, pattern)).square().sum() / student.shape[0]


def sample_directions(student_logits: Tensor, teacher_logits: Tensor, views: int = 1, keep: float = 0.5) -> Tensor:
    """Huber loss between the directions (z_m - v_n) / ||z_m - v_n|| of pairs of samples (VRM, arXiv:2502.20760).

    z are standardized logits of the first view of each sample and v those of its last, virtual view; logits are
    (views * batch, classes), first view one of all samples. With a single view, v is z. Summed over classes, averaged
    over the share `keep` of the pairs (m, n) with the smallest joint entropy of the student's predictions, which is
    the sum of their entropies if the two are taken as independent. Needs batch^2 * classes floats. Raises ValueError
    for a single class, and for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    size = len(student_logits) // views
    student, teacher = (
        unit(rearrange(z[:size], "m c -> m 1 c") - rearrange(z[-size:], "n c -> 1 n c"))
        for z in (standardized(student_logits), standardized(teacher_logits.detach()))
    )
    log_p = F.log_softmax(student_logits.detach().float(), dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)  # (views * batch,)
    joint = rearrange(entropy[:size], "m -> m 1") + rearrange(entropy[-size:], "n -> 1 n")
    limit = joint.flatten().kthvalue(math.ceil(keep * joint.numel())).values
    distances = F.huber_loss(student, teacher, reduction="none").sum(dim=-1)  # (batch, batch)
    return weighted_mean(distances, joint <= limit)


def class_directions(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Like `sample_directions`, but between the standardized logits of two classes for all rows (batch, classes),
    which are all views of all samples; summed over rows, averaged over all pairs of classes. Needs classes^2 / 2 *
    batch floats.
    """
    same_shape(student_logits, teacher_logits)
    classes = torch.arange(student_logits.shape[1], device=student_logits.device)
    first, second = torch.combinations(classes).T  # all pairs
    student, teacher = (
        unit(z.T[first] - z.T[second]) for z in (standardized(student_logits), standardized(teacher_logits.detach()))
    )
    return F.huber_loss(student, teacher, reduction="none").sum(dim=-1).mean()


def label_probability(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-p_t log p_s of the label, at temperature 1, averaged over the batch: the label's term in WKD-L
    (arXiv:2412.08139). Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    probabilities = F.softmax(teacher_logits.detach().float(), dim=1)
    weight = probabilities[torch.arange(len(labels), device=labels.device), labels]  # (batch,)
    return (weight * F.cross_entropy(student_logits.float(), labels, reduction="none")).mean()


def transport(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 8.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """Cost of transporting the student's distribution over the classes other than the label to the teacher's.

    WKD-L (arXiv:2412.08139): both are softmaxes at T without the label; `cost` (classes, classes) is the cost of
    moving probability between two classes. The plan of entropic optimal transport comes from Sinkhorn `iterations` in
    log space, which is finite for any logits. Averaged over the batch; needs batch * classes^2 floats per iteration.
    The loss is not zero for equal logits, because the entropy spreads the plan. Raises ValueError for fewer than three
    classes and for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 3:
        raise ValueError(
            f"transport between the other classes needs at least 3 classes, got {student_logits.shape[1]}"
        )
    is_label = F.one_hot(labels, student_logits.shape[1]).bool()
    student, teacher = (
        F.log_softmax((x.float() / temperature).masked_fill(is_label, LOG_ZERO), dim=1)
        for x in (student_logits, teacher_logits.detach())
    )
    kernel = -cost.float() / regularization  # (classes, classes)
    start = torch.full_like(
        student, -math.log(student.shape[1] - 1)
    )  # uniform over the other classes, as in the authors' code
    rows = rearrange(start.masked_fill(is_label, LOG_ZERO), "batch row -> batch row 1")
    for _ in range(iterations):
        columns = rearrange(teacher - torch.logsumexp(kernel + rows, dim=1), "batch column -> batch 1 column")
        rows = rearrange(student - torch.logsumexp(kernel + columns, dim=2), "batch row -> batch row 1")
    plan = (rows + kernel + columns).exp()  # (batch, row, column)
    return reduce(plan * cost.float(), "batch row column -> batch", "sum").mean()


def class_similarity(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Similarity (classes, classes) of the covariances of the features (samples, width) of two classes, from 0 to 1.

    Linear centred kernel alignment (arXiv:1905.00414): tr(G_i G_j) / sqrt(tr(G_i^2) tr(G_j^2)), G = X^T X (width,
    width) of the centred features of a class. Kernels are between features, because samples of two classes do not
    correspond (the generator of WKD's authors pairs them by their order). A class with fewer than two samples has
    similarity 0 to all other classes.
    """
    features = features.float()
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    counts = rearrange(labels.bincount(minlength=classes).clamp(min=1), "c -> c 1")
    centred = features - (sums / counts)[labels]
    zeros = features.new_zeros(classes)
    alignment = torch.stack(  # (classes, classes); tr(G_i G_j) is the sum of the squares of X_i X_j^T
        [
            zeros.index_add(0, labels, einsum(centred[labels == c], centred, "i w, j w -> i j").square().sum(0))
            for c in range(classes)
        ]
    )
    lengths = alignment.diagonal().sqrt()
    scale = einsum(lengths, lengths, "i, j -> i j").clamp(min=torch.finfo(torch.float32).tiny)
    return (alignment / scale).clamp(max=1).fill_diagonal_(1.0)


def _decoupled(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (p_label, 1 - p_label) (batch, 2), and of the softmax over the others (batch, classes - 1)."""
    labels = rearrange(labels, "batch -> batch 1")
    before = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    others = log_p.gather(1, before + (before >= labels))  # all but the label
    no_label = torch.logsumexp(others, dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, labels), no_label], dim=1), others - no_label


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row; 0 if a row is constant."""
    first, second = (unit(x - x.mean(1, keepdim=True)) for x in (first, second))
    return (first * second).sum(1)


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    same_shape(student_logits, teacher_logits)
    student = F.softmax(student_logits.float() / temperature, dim=1)
    return student, F.softmax(teacher_logits.detach().float() / temperature, dim=1)
