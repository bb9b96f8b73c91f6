"""Losses between predictions: distributions over classes or tokens, labels, Gaussian policies, and numbers.

Logits are (batch, classes), or (batch, positions, vocabulary) if a docstring lists that shape; labels are (batch,).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from kd.common.losses.shared import einsum, kl, same_shape, unit, weighted_mean

LOG_ZERO = -1e9  # log of a probability of zero; minus infinity would have no gradient


# ---- soft targets, hard targets, labels, numbers and Gaussians ----


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Hinton's soft targets (arXiv:1503.02531): scale * KL(softmax(teacher / T_t) || softmax(student / T)).

    Logits are (batch, classes), or (batch, positions, vocabulary) of a language model; summed over classes, averaged
    over the other dimensions, weighted by `sample_weights`, such as a mask (batch, positions); zero if all weights are
    zero. `teacher_temperature` defaults to `temperature`, `scale` to the product of the two, which keeps gradients
    comparable across temperatures. `direction="reverse"` is KL(student || teacher). Raises ValueError for a
    temperature that is not positive, for another direction and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    # Tensors are not checked: reading a value would wait for the device.
    if any(t <= 0 for t in (temperature, teacher_temperature) if not isinstance(t, Tensor)):
        raise ValueError(f"temperatures must be positive, got {temperature} and {teacher_temperature}")
    _check_direction(direction)
    same_shape(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / teacher_temperature, dim=-1)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    divergence = kl(p, q, dim=-1)  # (batch,) or (batch, positions)
    scale = temperature * teacher_temperature if scale is None else scale
    return scale * weighted_mean(divergence, sample_weights)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence (arXiv:2306.13649, eq. 3): beta KL(p || m) + (1 - beta) KL(q || m).

    p is the teacher's distribution and q the student's, both at `temperature`, m = beta p + (1 - beta) q; scaled by
    temperature^2. Shapes and averages as in soft_target_kl. Symmetric for beta = 1/2, and then at most
    temperature^2 * log 2. Raises ValueError unless 0 < beta < 1, and as soft_target_kl does.
    """
    if temperature <= 0 or not 0 < beta < 1:
        raise ValueError(f"need a positive temperature and 0 < beta < 1, got {temperature} and {beta}")
    same_shape(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    divergence = beta * kl(teacher, mixture, dim=-1) + (1 - beta) * kl(student, mixture, dim=-1)
    return temperature**2 * weighted_mean(divergence, sample_weights)


def hard_targets(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher predicts: -log softmax(student)[argmax(teacher)].

    Logits are (batch, classes); averaged over the batch. The NLL of policy distillation (arXiv:1511.06295), which
    suits teachers whose outputs are not log-probabilities, such as Q-values. Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def binary_cross_entropy(student_logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of independent labels: -y log sigmoid(z) - (1 - y) log sigmoid(-z).

    Averaged over batch and labels. `labels` (batch, labels) are 1 for the labels of a sample and 0 for all others.
    `smoothing` moves them towards 1/2: y (1 - smoothing) + smoothing / 2. Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, labels)
    targets = labels.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(student_logits.float(), targets)


def binary_soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft targets of independent labels: T^2 KL(Bernoulli(sigmoid(teacher / T)) || Bernoulli(sigmoid(student / T))).

    Logits are (batch, labels); averaged over batch and labels, as `binary_cross_entropy`. The divergence of each label
    is that of multi-label logits distillation (MLD, Yang et al., arXiv:2308.06453), which sums it over the labels and
    has no temperature; T and T^2 are Hinton's (arXiv:1503.02531). It is `soft_target_kl` of the logits (0, z) of each
    label. Raises ValueError for a temperature that is not positive and for shapes that differ.
    """
    if temperature <= 0:
        raise ValueError(f"temperatures must be positive, got {temperature}")
    same_shape(student_logits, teacher_logits)
    student, teacher = (
        _both_outcomes(student_logits / temperature),
        _both_outcomes(teacher_logits.detach() / temperature),
    )
    return temperature**2 * kl(teacher, student, dim=-1).mean()


def _both_outcomes(logits: Tensor) -> Tensor:
    """Logits (...) -> log-probabilities (..., 2) of the label and of its absence."""
    return torch.stack([F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())], dim=-1)


def regression_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch; each side may be (batch,) or (batch, 1), and they never broadcast.

    Raises ValueError for other shapes that differ.
    """
    return F.mse_loss(*_aligned(prediction, target))


def regression_huber(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Mean over the batch of e^2 / 2 where |e| <= delta, else delta * (|e| - delta / 2), e being the difference.

    Shapes and errors as in regression_mse.
    """
    return F.huber_loss(*_aligned(prediction, target), delta=delta)


def _aligned(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    prediction, target = (
        rearrange(t, "... 1 -> ...") if t.dim() > 1 and t.shape[-1] == 1 else t for t in (prediction, target)
    )
    same_shape(prediction, target)
    return prediction.float(), target.detach().float()


def gaussian_kl(
    student_mean: Tensor,
    student_log_std: Tensor,
    teacher_mean: Tensor,
    teacher_log_std: Tensor,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of Gaussian policies with diagonal covariance, as distilled in PPD (arXiv:2407.15134).

    KL(p || q) = log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2 for means m and standard deviations s.
    Means are (batch, actions), log_std anything that expands to them, such as (actions,). Summed over actions,
    averaged over the batch, weighted by `sample_weights` (batch,). `direction="reverse"` is KL(student || teacher).

    Invariant under a tanh on both sides: for squashed policies, pass the parameters before the tanh. From any
    distribution to a Gaussian student, the forward KL is minimal at the mean and variance of the distribution.
    Overflows for log_std far outside the range that policies clip it to (SAC: -20 to 2). Raises ValueError for another
    direction, for means that are not (batch, actions) and for shapes that differ.
    """
    _check_direction(direction)
    same_shape(student_mean, teacher_mean)
    if student_mean.dim() != 2:
        raise ValueError(f"means must be (batch, actions), got {tuple(student_mean.shape)}")
    student = student_mean.float(), _expanded(student_log_std, student_mean)
    teacher = teacher_mean.detach().float(), _expanded(teacher_log_std.detach(), teacher_mean)
    (p_mean, p_log_std), (q_mean, q_log_std) = (teacher, student) if direction == "forward" else (student, teacher)
    log_ratio = 2 * (p_log_std - q_log_std)  # log of the ratio of the variances
    distance = (p_mean - q_mean) * (-q_log_std).exp()
    # exp(x) - 1 - x cancels near zero: expm1 keeps the digits.
    divergence = (torch.expm1(log_ratio) - log_ratio + distance.square()).sum(dim=-1).clamp(min=0) / 2  # (batch,)
    return weighted_mean(divergence, sample_weights)


def _expanded(log_std: Tensor, mean: Tensor) -> Tensor:
    try:
        return log_std.float().expand_as(mean)
    except RuntimeError as error:
        raise ValueError(f"log_std {tuple(log_std.shape)} does not expand to means {tuple(mean.shape)}") from error


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")


# ---- decoupled, standardized, relational, and by optimal transport ----


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
