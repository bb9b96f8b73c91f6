"""Losses between the logits of classifiers beyond Hinton's: decoupled, standardized, of relations, of transport.

Logits are (batch, classes), labels (batch,).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.losses.shared import kl, product, same_shape, unit

NEVER = -1e9  # the logarithm of a probability that is to be zero; minus infinity would have no gradient


def standardized(logits: Tensor) -> Tensor:
    """(logits - mean) / (standard deviation + 1e-7) of each sample, as LSKD has it (arXiv:2403.01427), in fp32.

    The deviation is the unbiased one. A shift of all logits of a sample, and their scale, say nothing any more. Raises
    ValueError for a single class, which has no deviation.
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
    beta = 1 - p_label of the teacher it is Hinton's KL. Computed with logarithms throughout. Raises ValueError for
    fewer than three classes, of which the others are no distribution, and for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 3:
        raise ValueError(f"decoupled KD needs at least 3 classes, got {student_logits.shape[1]}")
    own = F.log_softmax(student_logits.float() / temperature, dim=1)
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    (own_binary, own_others), (binary, others) = _decoupled(own, labels), _decoupled(target, labels)
    divergence = alpha * kl(binary, own_binary, dim=1) + beta * kl(others, own_others, dim=1)  # (batch,)
    return temperature**2 * divergence.mean()


def correlation_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """DIST (arXiv:2205.10536): T^2 [beta (1 - mean_i r(p_i^s, p_i^t)) + gamma (1 - mean_c r(p_c^s, p_c^t))].

    r is Pearson's correlation, p the softmax at T: over the classes of each sample (rows p_i), and over the samples of
    the batch for each class (columns p_c). What is constant has no correlation, and counts as 0. Raises ValueError for
    shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    own = F.softmax(student_logits.float() / temperature, dim=1)
    target = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    between = 1 - _correlations(own, target).mean()
    within = 1 - _correlations(own.T, target.T).mean()
    return temperature**2 * (beta * between + gamma * within)


def class_relations(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """||P_t^T P_t - P_s^T P_s||_F^2 / classes, P (batch, classes) being the softmax at T (MLKD, CVPR 2023).

    Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    own, target = _probabilities(student_logits, teacher_logits, temperature)
    return (product(target.T, target) - product(own.T, own)).square().sum() / own.shape[1]


def sample_relations(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """||P_t P_t^T - P_s P_s^T||_F^2 / batch, otherwise as `class_relations` (MLKD, CVPR 2023)."""
    same_shape(student_logits, teacher_logits)
    own, target = _probabilities(student_logits, teacher_logits, temperature)
    return (product(target, target.T) - product(own, own.T)).square().sum() / own.shape[0]


def label_probability(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-p_t log p_s of the label, at temperature 1, averaged over the batch: the label's share in WKD-L
    (arXiv:2412.08139). Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    weight = F.softmax(teacher_logits.detach().float(), dim=1).gather(1, labels[:, None]).squeeze(1)  # (batch,)
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
    """What it costs to move the student's distribution over the classes other than the label to the teacher's.

    WKD-L (arXiv:2412.08139): both are softmaxes at T without the label; `cost` (classes, classes) is that of moving
    probability from one class to another. The plan is that of entropic optimal transport, by Sinkhorn's `iterations`,
    here with logarithms, so that it is finite for any logits. Averaged over the batch; needs batch * classes^2 floats
    an iteration. Not zero at equality: the entropy spreads the plan. Raises ValueError for fewer than three classes
    and for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    if student_logits.shape[1] < 3:
        raise ValueError(
            f"transport between the other classes needs at least 3 classes, got {student_logits.shape[1]}"
        )
    is_label = F.one_hot(labels, student_logits.shape[1]).bool()
    own, target = (
        F.log_softmax((x.float() / temperature).masked_fill(is_label, NEVER), dim=1)
        for x in (student_logits, teacher_logits.detach())
    )
    kernel = -cost.float() / regularization  # (classes, classes)
    start = torch.full_like(own, -math.log(own.shape[1] - 1))  # as published: uniform over the other classes
    rows = start.masked_fill(is_label, NEVER)
    for _ in range(iterations):
        columns = target - torch.logsumexp(kernel + rows[:, :, None], dim=1)  # (batch, classes)
        rows = own - torch.logsumexp(kernel + columns[:, None, :], dim=2)
    plan = (rows[:, :, None] + kernel + columns[:, None, :]).exp()  # (batch, classes, classes)
    return (plan * cost.float()).sum((1, 2)).mean()


def class_similarity(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How alike the features (samples, width) of any two classes vary: (classes, classes), from 0 to 1 for equals.

    Linear centred kernel alignment (arXiv:1905.00414): tr(G_i G_j) / sqrt(tr(G_i^2) tr(G_j^2)), G = X^T X (width,
    width) of a class's features less their mean. Kernels between features rather than between samples, as samples of
    two classes are no pairs (the generator of WKD's authors pairs them by their order). A class without two samples is
    like itself alone.
    """
    features = features.float()
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    centred = features - (sums / labels.bincount(minlength=classes).clamp(min=1)[:, None])[labels]
    of_none = features.new_zeros(classes)
    alignment = torch.stack(  # (classes, classes); tr(G_i G_j) is the sum of the squares of X_i X_j^T
        [
            of_none.index_add(0, labels, product(centred[labels == c], centred.T).square().sum(0))
            for c in range(classes)
        ]
    )
    lengths = alignment.diagonal().sqrt()
    similarity = alignment / (lengths[:, None] * lengths).clamp(min=torch.finfo(torch.float32).tiny)
    return similarity.clamp(max=1).fill_diagonal_(1.0)


def _decoupled(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of (p_label, 1 - p_label) (batch, 2), and of the softmax over the others (batch, classes - 1)."""
    before = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    others = log_p.gather(1, before + (before >= labels[:, None]))  # all but the label
    no_label = torch.logsumexp(others, dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, labels[:, None]), no_label], dim=1), others - no_label


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row; 0 where one of them is constant."""
    first, second = (unit(x - x.mean(1, keepdim=True)) for x in (first, second))
    return (first * second).sum(1)


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    own = F.softmax(student_logits.float() / temperature, dim=1)
    return own, F.softmax(teacher_logits.detach().float() / temperature, dim=1)
