"""Distillation losses: pure functions, tensors in, scalar out, computed in fp32. Teacher tensors are never trained."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale: float | None = None,
    direction: str = "forward",
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Hinton's soft targets (arXiv:1503.02531): scale * KL(softmax(teacher / T_t) || softmax(student / T)).

    Logits are (batch, classes); summed over classes, averaged over the batch, with `sample_weights` (batch,) as a
    weighted mean (zero where all weights are zero). `teacher_temperature` defaults to `temperature`, `scale` to the
    product of the two, which keeps gradients comparable across temperatures. `direction="reverse"` is
    KL(student || teacher). Raises ValueError for a temperature that is not positive and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    if temperature <= 0 or teacher_temperature <= 0:
        raise ValueError(f"temperatures must be positive, got {temperature} and {teacher_temperature}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    _same_shape(student_logits, teacher_logits)
    own = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.detach().float() / teacher_temperature, dim=-1)
    p, q = (target, own) if direction == "forward" else (own, target)
    divergence = _kl(p, q, dim=-1)  # (batch,)
    scale = temperature * teacher_temperature if scale is None else scale
    if sample_weights is None:
        return scale * divergence.mean()
    weights = sample_weights.float()
    return scale * (weights * divergence).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def cross_entropy_mix(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """alpha * cross-entropy with the labels (batch,) + (1 - alpha) * soft_target_kl. Raises unless 0 <= alpha <= 1."""
    _check_alpha(alpha)
    hard = F.cross_entropy(student_logits.float(), labels)
    return alpha * hard + (1 - alpha) * soft_target_kl(student_logits, teacher_logits, temperature)


def feature_l2(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of features (..., channels), over the places that `mask` (...) keeps."""
    _same_shape(student, teacher)
    squared = (student.float() - teacher.detach().float()).square()
    return squared.mean() if mask is None else _masked_mean(squared.flatten(mask.dim()).mean(-1), mask)


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean of 1 - cosine similarity along `dim`, over the places that `mask` (the other dimensions) keeps."""
    _same_shape(student, teacher)
    distance = 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=dim)
    return distance.mean() if mask is None else _masked_mean(distance, mask)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL between softmaxes over the channels of maps (batch, channels, height, width), mean over batch and places."""
    _same_shape(student, teacher)
    return _softmax_kl(student, teacher, temperature, dim=1)


def spatial_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL between softmaxes over the places of each channel of maps (batch, channels, height, width), mean over
    batch and channels (channel-wise distillation, arXiv:2011.13256).
    """
    _same_shape(student, teacher)
    return _softmax_kl(student.flatten(2), teacher.flatten(2), temperature, dim=-1)


def regression_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of predictions (batch,) or (batch, 1); a (batch, 1) against (batch,) does not broadcast."""
    return F.mse_loss(*_columns(prediction, target))


def regression_huber(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Huber loss: squared below `delta`, linear above. Shapes as in regression_mse."""
    return F.huber_loss(*_columns(prediction, target), delta=delta)


def regression_mix(student_prediction: Tensor, teacher_prediction: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """alpha * MSE(labels) + (1 - alpha) * MSE(teacher), for tasks like STS-B. Raises unless 0 <= alpha <= 1."""
    _check_alpha(alpha)
    hard, soft = regression_mse(student_prediction, labels), regression_mse(student_prediction, teacher_prediction)
    return alpha * hard + (1 - alpha) * soft


def _kl(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """KL(p || q) along `dim`; rounding below zero is clamped."""
    return (log_p.exp() * (log_p - log_q)).sum(dim).clamp(min=0)


def _softmax_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    own = F.log_softmax(student.float() / temperature, dim=dim)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=dim)
    return temperature**2 * _kl(target, own, dim).mean()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _columns(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    prediction, target = prediction.float(), target.detach().float()
    if prediction.numel() != target.numel():
        raise ValueError(f"shapes differ: {tuple(prediction.shape)} and {tuple(target.shape)}")
    return prediction.flatten(), target.flatten()


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
