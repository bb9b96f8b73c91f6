"""Distillation losses: pure functions, tensors in, scalar out, computed in fp32. Teacher tensors are never trained."""

import math

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

    Logits are (batch, classes), or (batch, positions, vocabulary) for what predicts tokens; summed over classes,
    averaged over all the rest, with `sample_weights`, such as a mask (batch, positions), as a weighted mean (zero
    where all weights are zero). `teacher_temperature` defaults to `temperature`, `scale` to the product of the two,
    which keeps gradients comparable across temperatures. `direction="reverse"` is KL(student || teacher). Raises
    ValueError for a temperature that is not positive, for another direction and for shapes that differ.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    if temperature <= 0 or teacher_temperature <= 0:
        raise ValueError(f"temperatures must be positive, got {temperature} and {teacher_temperature}")
    _check_direction(direction)
    _same_shape(student_logits, teacher_logits)
    own = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.detach().float() / teacher_temperature, dim=-1)
    p, q = (target, own) if direction == "forward" else (own, target)
    divergence = _kl(p, q, dim=-1)  # (batch,) or (batch, positions)
    scale = temperature * teacher_temperature if scale is None else scale
    return scale * _mean(divergence, sample_weights)


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
    _same_shape(student_logits, teacher_logits)
    own = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    mixture = torch.logaddexp(target + math.log(beta), own + math.log(1 - beta))
    divergence = beta * _kl(target, mixture, dim=-1) + (1 - beta) * _kl(own, mixture, dim=-1)
    return temperature**2 * _mean(divergence, sample_weights)


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
    _same_shape(student_logits, teacher_logits)
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


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
    _check_direction(direction)
    _same_shape(student_mean, teacher_mean)
    if student_mean.dim() != 2:
        raise ValueError(f"means must be (batch, actions), got {tuple(student_mean.shape)}")
    own = student_mean.float(), _expanded(student_log_std, student_mean)
    target = teacher_mean.detach().float(), _expanded(teacher_log_std.detach(), teacher_mean)
    (p_mean, p_log_std), (q_mean, q_log_std) = (target, own) if direction == "forward" else (own, target)
    log_ratio = 2 * (p_log_std - q_log_std)  # of the variances
    distance = (p_mean - q_mean) * (-q_log_std).exp()
    # exp(x) - 1 - x cancels near zero: expm1 keeps the digits.
    divergence = (torch.expm1(log_ratio) - log_ratio + distance.square()).sum(dim=-1).clamp(min=0) / 2  # (batch,)
    return _mean(divergence, sample_weights)


def feature_l2(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over all elements of features of one shape (FitNets, arXiv:1412.6550).

    `mask` has the leading dimensions of the features, such as (batch, positions) for (batch, positions, channels), and
    restricts the mean to the places that it keeps; zero where it keeps none. Raises ValueError for shapes that differ.
    """
    _same_shape(student, teacher)
    return _mean((student.float() - teacher.detach().float()).square(), mask)


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean of 1 - cosine similarity along `dim` of features of one shape (DistilBERT, arXiv:1910.01108).

    `mask` has leading dimensions of what is left without `dim` and restricts the mean as in feature_l2. A vector of
    zeros is at distance 1 from everything. Raises ValueError for shapes that differ.
    """
    _same_shape(student, teacher)
    return _mean(1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=dim), mask)


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of self-attention distributions, from queries and keys (MiniLM, arXiv:2002.10957).

    Queries and keys are (batch, positions, width), of any two widths: `heads` equal parts of either are its heads
    (MiniLMv2, arXiv:2012.15828). Averaged over batch, heads and positions; what `mask` (batch, positions) does not
    keep neither asks nor is looked at. Raises ValueError for a width that `heads` does not divide, and for other
    shapes.
    """
    own = _attention(student_query, student_key, heads, mask)  # (batch, heads, positions, positions)
    target = _attention(teacher_query.detach(), teacher_key.detach(), heads, mask)
    _same_shape(own, target)
    return _mean(_kl(target, own, dim=-1).transpose(1, 2), mask)  # of (batch, positions, heads)


def channel_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the softmax being over the channels of each place.

    Maps are (batch, channels, height, width); summed over channels, averaged over batch and places. `mask` (batch,)
    restricts the mean to the samples that it keeps. Never negative, which KL on raw features can be. Raises ValueError
    for a temperature that is not positive and for shapes that differ.
    """
    _same_shape(student, teacher)
    return _mean(_softmax_kl(student, teacher, temperature, dim=1), mask)


def spatial_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """As channel_kl, but the softmax is over the places of each channel (channel-wise distillation, arXiv:2011.13256).

    Summed over height and width, averaged over batch and channels.
    """
    _same_shape(student, teacher)
    return _mean(_softmax_kl(student.flatten(2), teacher.flatten(2), temperature, dim=-1), mask)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention maps: the channels' mean square per place, as a unit vector over places.

    Maps are (batch, channels, height, width), of one size but any number of channels; `mask` (batch,) restricts the
    mean to the samples that it keeps. Zagoruyko and Komodakis, arXiv:1612.03928, with p = 2. Raises ValueError for
    maps of different size.
    """
    own, target = (F.normalize(x.float().square().mean(1).flatten(1), dim=1) for x in (student, teacher.detach()))
    _same_shape(own, target)
    return _mean((own - target).square(), mask)


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


def _attention(query: Tensor, key: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Log-probabilities (batch, heads, positions, positions) of what each position looks at."""
    _same_shape(query, key)
    if query.shape[-1] % heads:
        raise ValueError(f"a width of {query.shape[-1]} does not split into {heads} heads")
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """KL(p || q) along `dim`; rounding below zero is clamped."""
    return (log_p.exp() * (log_p - log_q)).sum(dim).clamp(min=0)


def _softmax_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    own = F.log_softmax(student.float() / temperature, dim=dim)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=dim)
    return temperature**2 * _kl(target, own, dim)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean, weighted if there are weights (a mask is weights of 0 and 1); zero, with its graph, if all are zero.

    Weights have the leading dimensions of the values.
    """
    if weights is None:
        return values.mean()
    if values.dim() > weights.dim():
        values = values.flatten(weights.dim()).mean(-1)
    _same_shape(values, weights)
    weights = weights.float()
    # The weights are normalized first: dividing the loss by a sum near zero would make its gradient infinite.
    return (values * (weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny))).sum()


def _aligned(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    prediction, target = (t.squeeze(-1) if t.dim() > 1 else t for t in (prediction, target))  # (batch,)
    _same_shape(prediction, target)
    return prediction.float(), target.detach().float()


def _expanded(log_std: Tensor, mean: Tensor) -> Tensor:
    try:
        return log_std.float().expand_as(mean)
    except RuntimeError as error:
        raise ValueError(f"log_std {tuple(log_std.shape)} does not expand to means {tuple(mean.shape)}") from error


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
