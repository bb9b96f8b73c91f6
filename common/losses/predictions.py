"""Losses between predictions: distributions over classes, tokens or continuous actions, and numbers."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kd.common.losses.shared import check_direction, kl, same_shape, weighted_mean


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
    check_direction(direction)
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
    suits teachers whose outputs are no probabilities, such as Q-values. Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


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
    check_direction(direction)
    same_shape(student_mean, teacher_mean)
    if student_mean.dim() != 2:
        raise ValueError(f"means must be (batch, actions), got {tuple(student_mean.shape)}")
    student = student_mean.float(), _expanded(student_log_std, student_mean)
    teacher = teacher_mean.detach().float(), _expanded(teacher_log_std.detach(), teacher_mean)
    (p_mean, p_log_std), (q_mean, q_log_std) = (teacher, student) if direction == "forward" else (student, teacher)
    log_ratio = 2 * (p_log_std - q_log_std)  # of the variances
    distance = (p_mean - q_mean) * (-q_log_std).exp()
    # exp(x) - 1 - x cancels near zero: expm1 keeps the digits.
    divergence = (torch.expm1(log_ratio) - log_ratio + distance.square()).sum(dim=-1).clamp(min=0) / 2  # (batch,)
    return weighted_mean(divergence, sample_weights)


def _expanded(log_std: Tensor, mean: Tensor) -> Tensor:
    try:
        return log_std.float().expand_as(mean)
    except RuntimeError as error:
        raise ValueError(f"log_std {tuple(log_std.shape)} does not expand to means {tuple(mean.shape)}") from error
