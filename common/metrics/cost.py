"""What a model costs: parameters, megabytes, FLOPs, latency."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.utils.devices import synchronize


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once, buffers not."""
    return sum(p.numel() for p in model.parameters())


def megabytes(model: nn.Module) -> float:
    """MiB (2^20 bytes) of what is saved: parameters and persistent buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20


def flops(model: nn.Module, inputs: dict[str, Tensor]) -> int | None:
    """FLOPs of the matrix products of one forward pass (a multiply-add counts two); None if there are none."""
    with _inference(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops()) or None


def latency(model: nn.Module, inputs: dict[str, Tensor], repeats: int = 30, warmup: int = 5) -> dict[str, Any]:
    """Milliseconds of a forward pass: {"batch": samples, "median": ms, "p90": ms}."""
    device = next(iter(inputs.values())).device
    seconds = []
    with _inference(model):
        for _ in range(warmup + repeats):
            synchronize(device)
            started = time.perf_counter()
            model(**inputs)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    milliseconds = 1000 * np.array(seconds[warmup:])
    return {
        "batch": len(next(iter(inputs.values()))),
        "median": float(np.median(milliseconds)),
        "p90": float(np.quantile(milliseconds, 0.9)),
    }


def cost(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """All of it, as it stands in results.json; latency and FLOPs are those of `inputs`."""
    return {
        "parameters": parameters(model),
        "megabytes": megabytes(model),
        "flops": flops(model, inputs),
        "latency_ms": latency(model, inputs),
    }


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
