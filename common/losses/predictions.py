"""Losses between predictions: distributions over classes or tokens, labels, Gaussian policies, and numbers.

Logits are (batch, classes), or (batch, positions, vocabulary) if a docstring lists that shape; labels are (batch,).
Those of published methods for classifiers are in `classifiers.py`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kd.common.losses.shared import kl, positive_temperature, same_shape, weighted_mean

Reduction = Literal["mean", "none"]


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Hinton's soft targets (arXiv:1503.02531): scale * KL(softmax(teacher / T_t) || softmax(student / T)).

    Logits are (batch, classes), or (batch, positions, vocabulary) of a language model; summed over classes, averaged
    over the other dimensions, weighted by `sample_weights`, such as a mask (batch, positions); zero if all weights are
    zero. With `reduction="none"`, the result is (batch,) or (batch, positions), times the weights if there are any.
    `teacher_temperature` defaults to `temperature`, `scale` to the product of the two, which keeps gradients
    comparable across temperatures. `direction="reverse"` is KL(student || teacher). Raises ValueError for a
    temperature that is not positive, for another direction and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check_direction(direction)
    teacher, student = _log_probabilities(student_logits, teacher_logits, temperature, teacher_temperature)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    scale = temperature * teacher_temperature if scale is None else scale
    return scale * _reduced(kl(p, q, dim=-1), sample_weights, reduction)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    skew: float = 0.1,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Skewed KL divergence (DistiLLM, arXiv:2402.03898, section 3.1): KL(p || skew p + (1 - skew) q).

    p is the teacher's distribution and q the student's, both at `temperature`; scaled by temperature^2. The mixture
    bounds the divergence by temperature^2 * -log(skew), and its gradient where q is near zero. `direction="reverse"`
    is KL(q || skew q + (1 - skew) p). The limit of skew -> 0 is `soft_target_kl`. Shapes, averages and reduction as in
    soft_target_kl. Raises ValueError unless 0 < skew < 1, and as soft_target_kl does.
    """
    if not 0 < skew < 1:
        raise ValueError(f"need 0 < skew < 1, got {skew}")
    _check_direction(direction)
    teacher, student = _log_probabilities(student_logits, teacher_logits, temperature)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    divergence = kl(p, _log_mixture(p, q, skew), dim=-1)
    return temperature**2 * _reduced(divergence, sample_weights, reduction)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalized Jensen-Shannon divergence (arXiv:2306.13649, eq. 3): beta KL(p || m) + (1 - beta) KL(q || m).

    p is the teacher's distribution and q the student's, both at `temperature`, m = beta p + (1 - beta) q; scaled by
    temperature^2. Shapes, averages and reduction as in soft_target_kl. Symmetric for beta = 1/2, and then at most
    temperature^2 * log 2. Raises ValueError unless 0 < beta < 1, and as soft_target_kl does.
    """
    if not 0 < beta < 1:
        raise ValueError(f"need 0 < beta < 1, got {beta}")
    teacher, student = _log_probabilities(student_logits, teacher_logits, temperature)
    mixture = _log_mixture(teacher, student, beta)
    divergence = beta * kl(teacher, mixture, dim=-1) + (1 - beta) * kl(student, mixture, dim=-1)
    return temperature**2 * _reduced(divergence, sample_weights, reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Total variation distance (f-distill, arXiv:2307.15190): 1/2 sum_c |p - q|, scaled by the temperature.

    p is the teacher's distribution and q the student's, both at `temperature`. The distance is of first order in p - q
    and the other divergences are of second order: so its factor is T instead of T^2. At most T, and its gradient does
    not vanish near p = q: it suits small learning rates, or a sum with another loss. Shapes, averages and reduction as
    in soft_target_kl. Raises ValueError as soft_target_kl does.
    """
    teacher, student = _log_probabilities(student_logits, teacher_logits, temperature)
    distance = (teacher.exp() - student.exp()).abs().sum(dim=-1) / 2
    return temperature * _reduced(distance, sample_weights, reduction)


def alpha_beta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.8,
    beta: float = 0.3,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Alpha-beta divergence (ABKD, arXiv:2505.04560, definition 4.1), scaled by temperature^2.

    D(p || q) = sum_c [alpha p^s + beta q^s - s p^alpha q^beta] / (alpha beta s), with s = alpha + beta, the teacher's
    distribution p and the student's q, both at `temperature`. beta = 0 is its limit, sum_c [p^alpha log(p^alpha /
    q^alpha) - p^alpha + q^alpha] / alpha^2, and alpha = 0 the same with p and q exchanged. So (1, 0) is the forward KL
    of `soft_target_kl`, (0, 1) the reverse KL, and (1, 1) half the squared distance of p and q. (The published code
    divides the limits by alpha instead of alpha^2.) Shapes, averages and reduction as in soft_target_kl. Raises
    ValueError for a negative alpha or beta, if both are zero, and as soft_target_kl does.
    """
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise ValueError(f"need alpha and beta of at least 0, not both 0: got {alpha} and {beta}")
    teacher, student = _log_probabilities(student_logits, teacher_logits, temperature)
    if beta == 0:
        divergence = _power_kl(teacher, student, alpha)
    elif alpha == 0:
        divergence = _power_kl(student, teacher, beta)
    else:
        total = alpha + beta
        both = alpha * (total * teacher).exp() + beta * (total * student).exp()
        mixed = total * (alpha * teacher + beta * student).exp()
        divergence = (both - mixed).sum(dim=-1) / (alpha * beta * total)
    return temperature**2 * _reduced(divergence.clamp(min=0), sample_weights, reduction)


def _log_probabilities(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of teacher and student in fp32. Raises ValueError for a temperature that is not positive
    and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    positive_temperature(temperature, teacher_temperature)
    same_shape(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / teacher_temperature, dim=-1)
    return teacher, student


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight * p + (1 - weight) * q) of log-probabilities, for 0 < weight < 1."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _reduced(values: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return weighted_mean(values, weights)
    if reduction != "none":
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values if weights is None else values * weights


def _power_kl(log_p: Tensor, log_q: Tensor, power: float) -> Tensor:
    """The alpha-beta divergence with alpha = `power` and beta = 0, summed over the last dimension."""
    log_p, log_q = power * log_p, power * log_q
    return (log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()).sum(dim=-1) / power**2


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
    positive_temperature(temperature)
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
