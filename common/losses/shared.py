"""Functions that several losses use."""

import einops
import torch
from torch import Tensor

LOG_ZERO = -1e9  # log of a probability of zero; minus infinity would have no gradient


def kl(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """KL(p || q) along `dim`, of log-probabilities; negative rounding errors are clamped to zero."""
    return (log_p.exp() * (log_p - log_q)).sum(dim).clamp(min=0)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of `values`, weighted by `weights` (or a 0/1 mask) of the leading dimensions of the values.

    Zero, still connected to the graph, if all weights are zero.
    """
    if weights is None:
        return values.mean()
    if values.dim() > weights.dim():
        values = values.mean(tuple(range(weights.dim(), values.dim())))
    if values.shape != weights.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)} and {tuple(weights.shape)} of the weights")
    weights = weights.float()
    # Normalizing the weights, not the loss: dividing the loss by a sum near zero would make its gradient infinite.
    return (values * (weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny))).sum()


def einsum(first: Tensor, second: Tensor, pattern: str) -> Tensor:
    """`einops.einsum` of two tensors in fp32, also under autocast, which would compute it in lower precision."""
    with torch.autocast(first.device.type, enabled=False):
        return einops.einsum(first.float(), second.float(), pattern)


def product(first: Tensor, second: Tensor) -> Tensor:
    """first @ second in fp32, also under autocast, which would compute it in lower precision."""
    with torch.autocast(first.device.type, enabled=False):
        return first.float() @ second.float()


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., width) divided by their length; vectors of length zero stay zero, without a gradient."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def positive_temperature(*temperatures: float | Tensor) -> None:
    """Raises ValueError for a temperature that is not positive. Tensors are not checked, because reading a value would
    wait for the device.
    """
    if any(t <= 0 for t in temperatures if not isinstance(t, Tensor)):
        raise ValueError(f"temperatures must be positive, got {' and '.join(map(str, temperatures))}")


def same_shape(first: Tensor, second: Tensor) -> None:
    """Raises ValueError for shapes that differ, which would broadcast."""
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
