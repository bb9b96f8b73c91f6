"""Losses between continuous policies."""

import torch
from torch import Tensor

from kd.common.losses.shared import check_direction, same_shape, weighted_mean


def gaussian_kl(
    student_mean: Tensor,
    student_log_std: Tensor,
    teacher_mean: Tensor,
    teacher_log_std: Tensor,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of Gaussian policies with diagonal covariance, as distilled in PPD (arXiv:2407.15134).

    KL(p || q) = log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2, m and s being mean and standard deviation.
    Means are (batch, actions), log_std anything that expands to them, such as (actions,). Summed over actions,
    averaged over the batch, with `sample_weights` as in soft_target_kl. `direction="reverse"` is
    KL(student || teacher).

    Invariant under a tanh that both sides share, so for squashed policies it takes what goes into the tanh. From any
    distribution to a Gaussian student, the forward KL has its minimum at the means and variances of the distribution.
    Overflows for log_std far outside of what policies clip it to (SAC: -20 to 2). Raises ValueError for another
    direction, for means that are not (batch, actions) and for shapes that differ.
    """
    check_direction(direction)
    same_shape(student_mean, teacher_mean)
    if student_mean.dim() != 2:
        raise ValueError(f"means must be (batch, actions), got {tuple(student_mean.shape)}")
    own = student_mean.float(), _expanded(student_log_std, student_mean)
    target = teacher_mean.detach().float(), _expanded(teacher_log_std.detach(), teacher_mean)
    (p_mean, p_log_std), (q_mean, q_log_std) = (target, own) if direction == "forward" else (own, target)
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
