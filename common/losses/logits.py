"""Losses between classifiers' logits beyond soft targets: decoupled, standardized, relational, optimal transport.

Logits are (batch, classes), labels (batch,).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from kd.common.losses.shared import einsum, kl, same_shape, unit

NEVER = -1e9  # log of a probability of zero; minus infinity would have no gradient


def standardized(logits: Tensor) -> Tensor:
    """(logits - mean) / (standard deviation + 1e-7) of each sample, in fp32, as in LSKD (arXiv:2403.01427).

    The deviation is the unbiased one. Shift and scale of a sample's logits no longer matter. Raises ValueError for a
    single class, which has no deviation.
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


def correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """DIST (arXiv:2205.10536): T^2 [beta (1 - mean_i r(p_i^s, p_i^t)) + gamma (1 - mean_c r(p_c^s, p_c^t))].

    r is Pearson's correlation, p the softmax at T: over the classes of each sample (rows p_i), and over the samples of
    the batch for each class (columns p_c). A constant has no correlation, and counts as 0. Raises ValueError for
    shapes that differ.
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

    WKD-L (arXiv:2412.08139): both are softmaxes at T without the label; `cost` (classes, classes) is that of moving
    probability between two classes. The plan is that of entropic optimal transport, by Sinkhorn's `iterations` in log
    space, which is finite for any logits. Averaged over the batch; needs batch * classes^2 floats per iteration. Not
    zero at equality: the entropy spreads the plan. Raises ValueError for fewer than three classes and for shapes that
    differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 3:
        raise ValueError(
            f"transport between the other classes needs at least 3 classes, got {student_logits.shape[1]}"
        )
    is_label = F.one_hot(labels, student_logits.shape[1]).bool()
    student, teacher = (
        F.log_softmax((x.float() / temperature).masked_fill(is_label, NEVER), dim=1)
        for x in (student_logits, teacher_logits.detach())
    )
    kernel = -cost.float() / regularization  # (classes, classes)
    start = torch.full_like(student, -math.log(student.shape[1] - 1))  # as published: uniform over the other classes
    rows = rearrange(start.masked_fill(is_label, NEVER), "batch row -> batch row 1")
    for _ in range(iterations):
        columns = rearrange(teacher - torch.logsumexp(kernel + rows, dim=1), "batch column -> batch 1 column")
        rows = rearrange(student - torch.logsumexp(kernel + columns, dim=2), "batch row -> batch row 1")
    plan = (rows + kernel + columns).exp()  # (batch, row, column)
    return reduce(plan * cost.float(), "batch row column -> batch", "sum").mean()


def class_similarity(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Similarity (classes, classes) of how the features (samples, width) of two classes vary, from 0 to 1 (equal).

    Linear centred kernel alignment (arXiv:1905.00414): tr(G_i G_j) / sqrt(tr(G_i^2) tr(G_j^2)), G = X^T X (width,
    width) of a class's centred features. Kernels are between features, not samples, since samples of two classes do
    not correspond (the generator of WKD's authors pairs them by their order). A class without two samples is similar
    to itself alone.
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
    """Pearson's correlation of each row; 0 if one of the two is constant."""
    first, second = (unit(x - x.mean(1, keepdim=True)) for x in (first, second))
    return (first * second).sum(1)


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    same_shape(student_logits, teacher_logits)
    student = F.softmax(student_logits.float() / temperature, dim=1)
    return student, F.softmax(teacher_logits.detach().float() / temperature, dim=1)
