"""What losses have in common."""

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """KL(p || q) along `dim`; rounding below zero is clamped."""
    return (log_p.exp() * (log_p - log_q)).sum(dim).clamp(min=0)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean, weighted if there are weights (a mask is weights of 0 and 1); zero, with its graph, if all are zero.

    Weights have the leading dimensions of the values.
    """
    if weights is None:
        return values.mean()
    if values.dim() > weights.dim():
        values = values.flatten(weights.dim()).mean(-1)
    same_shape(values, weights)
    weights = weights.float()
    # The weights are normalized first: dividing the loss by a sum near zero would make its gradient infinite.
    return (values * (weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny))).sum()


def product(first: Tensor, second: Tensor) -> Tensor:
    """first @ second in fp32, also under autocast, which would have it in less."""
    with torch.autocast(first.device.type, enabled=False):
        return first.float() @ second.float()


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., width) over their lengths; those of length zero stay zero, without a gradient."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")


def check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
