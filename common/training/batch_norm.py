"""Batch norm over the batches of all processes, and a check for batches that are too small for it.

Several processes that each have a part of a batch must normalize like one process with the whole batch. torch's
SyncBatchNorm runs only on GPUs and replaces the modules, which changes the saved model. This module replaces only
their forward.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from kd.common.utils.errors import UserError

logger = logging.getLogger(__name__)
TOO_SMALL = (
    "batch norm cannot train on a batch of one sample, which has no variance: pass --dataloader_drop_last, or another "
    "--per_device_train_batch_size"
)


def synchronize_batch_norms(*modules: nn.Module) -> None:
    """Makes the batch norms in `modules` use, in training, the statistics of all processes' batches."""
    for norm in _batch_norms(*modules):
        if type(norm).forward is _BatchNorm.forward:
            norm.forward = partial(_synchronized, norm)  # type: ignore[method-assign]
        else:
            logger.warning("%s overrides forward: its statistics are computed per process", type(norm).__name__)


def release_batch_norms(*modules: nn.Module) -> None:
    """Undoes `synchronize_batch_norms`."""
    for norm in _batch_norms(*modules):
        vars(norm).pop("forward", None)


def checking_last_batch(samples: int, batch: int, batches: int, *modules: nn.Module) -> AbstractContextManager[None]:
    """`checking_batch_norm_inputs` if the last batch of an epoch over `samples` in batches of `batch` has one sample
    and is among the first `batches` of the training.
    """
    in_epoch = math.ceil(samples / batch)
    if samples - (in_epoch - 1) * batch > 1 or in_epoch > batches:
        return nullcontext()
    return checking_batch_norm_inputs(min(batch, samples), *modules)


@contextmanager
def checking_batch_norm_inputs(samples: int, *modules: nn.Module) -> Iterator[None]:
    """Raises UserError if the input of a batch norm in training has one value per channel for each of the `samples`:
    in a batch of one sample, the values would have no variance.
    """

    def check(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if norm.training and x.numel() // x.shape[1] <= samples:
            raise UserError(TOO_SMALL)

    handles = [norm.register_forward_pre_hook(check) for norm in _batch_norms(*modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch_norms(*modules: nn.Module) -> list[_BatchNorm]:
    return [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm)]


def _synchronized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalizes x (batch, channels, ...). The variance is the mean squared deviation from the common mean, which is
    more precise than the mean square minus the squared mean.
    """
    if not norm.training:
        return _BatchNorm.forward(norm, x)
    norm._check_input_dim(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_full((1,), x.numel() / x.shape[1])
    sums = all_reduce(torch.cat([wide.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = wide - mean.view(shape)
    variance = all_reduce(centered.square().sum(axes)) / count
    _track(norm, mean.detach(), variance.detach() * count / (count - 1))
    y = centered * (variance + norm.eps).rsqrt().view(shape)
    if norm.weight is not None:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Updates the running statistics as torch's batch norm does."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), momentum)
