"""Forward KL divergences from a teacher's distribution of which only some classes, or a sample, are known."""

import torch
from torch import Tensor

from kd.common.losses.predictions import Reduction
from kd.common.losses.shared import LOG_ZERO, positive_temperature


def top_classes_kl(
    student_logits: Tensor,
    classes: Tensor,
    probabilities: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL from the teacher's k largest probabilities p_i and the mass r of all other classes, which count as one class:

        temperature^2 * mean over rows of [sum_i p_i log(p_i / q_i) + r log(r / (1 - sum_i q_i))]

    with the student's probabilities q = softmax(student_logits / temperature). It is at most the KL over all classes,
    and equal to it for r = 0. The shape of the student's distribution over the other classes is free.

    student_logits (rows, vocabulary); classes (rows, k), distinct in a row; probabilities (rows, k + 1), those of the
    classes and r, at the same temperature. They are normalized, which undoes the rounding of stored numbers. With
    `reduction="none"`, the result is (rows,). Raises ValueError for a temperature that is not positive and for other
    shapes.
    """
    _check(student_logits, classes, probabilities, temperature, others=1)
    logits = student_logits.float() / temperature
    others = logits.scatter(-1, classes, LOG_ZERO).logsumexp(dim=-1, keepdim=True)
    log_q = torch.cat([logits.gather(-1, classes), others], dim=-1) - logits.logsumexp(dim=-1, keepdim=True)
    p = probabilities.detach().float()
    p = p / p.sum(dim=-1, keepdim=True)
    divergence = temperature**2 * (torch.xlogy(p, p) - p * log_q).sum(dim=-1)
    return divergence.mean() if reduction == "mean" else divergence


def sampled_kl(
    student_logits: Tensor,
    classes: Tensor,
    weights: Tensor,
    entropy: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Unbiased estimate of the KL from the teacher's distribution p (Sparse Logit Sampling, arXiv:2503.16870):

        temperature^2 * mean over rows of [-sum_i w_i log q_i - H(p)]

    with the student's q = softmax(student_logits / temperature). If the expectation of the weight w_i is p_i for every
    class, that of the loss is KL(p || q), and that of its gradient the gradient of the KL, because both are linear in
    p. An estimate may be negative.

    student_logits (rows, vocabulary); classes and weights (rows, k), of weight 0 where a row has fewer classes;
    entropy (rows,), H(p) in nats, at the same temperature. Reduction and errors as in top_classes_kl.
    """
    _check(student_logits, classes, weights, temperature)
    logits = student_logits.float() / temperature
    log_q = logits.gather(-1, classes) - logits.logsumexp(dim=-1, keepdim=True)
    divergence = temperature**2 * (-(weights.detach().float() * log_q).sum(dim=-1) - entropy.detach().float())
    return divergence.mean() if reduction == "mean" else divergence


def _check(logits: Tensor, classes: Tensor, values: Tensor, temperature: float, others: int = 0) -> None:
    positive_temperature(temperature)
    rows, number = classes.shape
    if len(logits) != rows or values.shape != (rows, number + others):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (logits, classes, values))
        raise ValueError(f"shapes of logits, classes and values do not fit: {shapes}")
