"""Losses between predictions: distributions over classes or tokens, and numbers."""

import math

import torch
import torch.nn.functional as F
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

    Logits are (batch, classes), or (batch, positions, vocabulary) for what predicts tokens; summed over classes,
    averaged over all the rest, with `sample_weights`, such as a mask (batch, positions), as a weighted mean (zero
    where all weights are zero). `teacher_temperature` defaults to `temperature`, `scale` to the product of the two,
    which keeps gradients comparable across temperatures. `direction="reverse"` is KL(student || teacher). Raises
    ValueError for a temperature that is not positive, for another direction and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    given = [t for t in (temperature, teacher_temperature) if not isinstance(t, Tensor)]  # a look at one would wait
    if any(t <= 0 for t in given):
        raise ValueError(f"temperatures must be positive, got {temperature} and {teacher_temperature}")
    check_direction(direction)
    same_shape(student_logits, teacher_logits)
    own = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.detach().float() / teacher_temperature, dim=-1)
    p, q = (target, own) if direction == "forward" else (own, target)
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
    """Generalised Jensen-Shannon divergence (arXiv:2306.13649, eq. 3): beta KL(p || m) + (1 - beta) KL(q || m).

    p is the teacher's distribution and q the student's, both at `temperature`, m = beta p + (1 - beta) q; times
    temperature^2 as in soft_target_kl, whose shapes and means these are. Symmetric for beta = 1/2, and then at most
    temperature^2 * log 2. Raises ValueError unless 0 < beta < 1, and as soft_target_kl does.
    """
    if temperature <= 0 or not 0 < beta < 1:
        raise ValueError(f"need a positive temperature and 0 < beta < 1, got {temperature} and {beta}")
    same_shape(student_logits, teacher_logits)
    own = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    mixture = torch.logaddexp(target + math.log(beta), own + math.log(1 - beta))
    divergence = beta * kl(target, mixture, dim=-1) + (1 - beta) * kl(own, mixture, dim=-1)
    return temperature**2 * weighted_mean(divergence, sample_weights)


def cross_entropy_mix(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """alpha * cross-entropy with the labels (batch,) + (1 - alpha) * soft_target_kl (arXiv:1503.02531).

    Logits are (batch, classes); both terms are means over the batch. alpha weights the hard labels. Raises ValueError
    unless 0 <= alpha <= 1, and as soft_target_kl does.
    """
    _check_alpha(alpha)
    hard = F.cross_entropy(student_logits.float(), labels)
    return alpha * hard + (1 - alpha) * soft_target_kl(student_logits, teacher_logits, temperature)


def hard_targets(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher chooses: -log softmax(student)[argmax(teacher)].

    Logits are (batch, classes); averaged over the batch. The NLL of policy distillation (arXiv:1511.06295), which
    takes teachers whose outputs are no probabilities, such as Q-values. Raises ValueError for shapes that differ.
    """
    same_shape(student_logits, teacher_logits)
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def regression_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch; either side may be (batch,) or (batch, 1), which do not broadcast.

    Raises ValueError for shapes that differ otherwise.
    """
    return F.mse_loss(*_aligned(prediction, target))


def regression_huber(prediction: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Mean over the batch of e^2 / 2 where |e| <= delta, else delta * (|e| - delta / 2), e being the difference.

    Shapes and errors as in regression_mse.
    """
    return F.huber_loss(*_aligned(prediction, target), delta=delta)


def regression_mix(student_prediction: Tensor, teacher_prediction: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """alpha * MSE(labels) + (1 - alpha) * MSE(teacher), without softmax, for tasks like STS-B.

    Shapes as in regression_mse. Raises ValueError unless 0 <= alpha <= 1, and as regression_mse does.
    """
    _check_alpha(alpha)
    hard, soft = regression_mse(student_prediction, labels), regression_mse(student_prediction, teacher_prediction)
    return alpha * hard + (1 - alpha) * soft


def _aligned(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    prediction, target = (t.squeeze(-1) if t.dim() > 1 else t for t in (prediction, target))  # (batch,)
    same_shape(prediction, target)
    return prediction.float(), target.detach().float()


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
