"""Weights that are not finite are never saved, evaluated or distilled from."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd.common.utils.errors import UserError

REMEDY = "try a lower learning rate, other optimizer settings or fp32"


def check_finite_weights(*modules: nn.Module, when: str) -> None:
    """Raises UserError, which names the tensor and `when` (such as `after step 12`), unless all weights are finite."""
    if (name := non_finite_tensor(*modules)) is not None:
        raise UserError(diverged(name, when))


def non_finite_tensor(*modules: nn.Module) -> str | None:
    """The name of the first parameter or saved buffer that is not finite, or None.

    A buffer may hold minus infinity, as attention masks do. Of sharded weights only the shards of this process count.
    """
    names, finite = [], []
    for module in modules:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                ok = local.isfinite() if isinstance(tensor, nn.Parameter) else local < math.inf  # false for nan
                names.append(name)
                finite.append(ok.all())
    if not finite or bool(torch.stack([value.to(finite[0].device) for value in finite]).all()):  # one GPU sync
        return None
    return next(name for name, value in zip(names, finite, strict=True) if not value)


def diverged(tensor: str, when: str) -> str:
    """The error message of a training that diverged."""
    return f"training diverged: {tensor} is not finite {when}; {REMEDY}"
