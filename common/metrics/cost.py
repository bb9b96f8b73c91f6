"""Cost of a model: parameters, megabytes, FLOPs, latency."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd.common.utils.devices import synchronize


def parameters(model: nn.Module) -> int:
    """Number of parameters, without buffers; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def megabytes(model: nn.Module) -> float:
    """MiB (2^20 bytes) of the saved tensors: parameters and persistent buffers; shared ones count once."""
    tensors = set(model.state_dict(keep_vars=True).values())  # keep_vars: a shared tensor stays one object
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def flops(model: nn.Module, inputs: dict[str, Any]) -> int | None:
    """FLOPs of the matrix products of one forward pass (a multiply-add counts two); None if there are none."""
    # The counter does not know the fused attention kernels of the CPU; the MATH backend consists of matrix products.
    with _evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops()) or None


def latency(model: nn.Module, inputs: dict[str, Any], repeats: int = 30, warmup: int = 5) -> dict[str, Any]:
    """Milliseconds of a forward pass: {"batch": samples, "median": ms, "p90": ms}. The first input is a batch."""
    device = next(iter(inputs.values())).device
    seconds = []
    with _evaluating(model), torch.inference_mode():
        for _ in range(warmup + repeats):
            synchronize(device)
            started = time.perf_counter()
            model(**inputs)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return {"batch": len(next(iter(inputs.values())))} | _quantiles(1000 * np.array(seconds[warmup:]))


def interleaved_latency(
    models: dict[str, tuple[nn.Module, dict[str, Any]]], repeats: int = 100
) -> dict[str, dict[str, Any]]:
    """`latency` of several models and their inputs, measured in turns, so that other load on the machine affects all
    of them. Each turn has a warm-up, because the cache holds the weights of another model.
    """
    turns = [{n: latency(model, inputs, 1, 1) for n, (model, inputs) in models.items()} for _ in range(repeats)]
    return {n: turns[0][n] | _quantiles(np.array([turn[n]["median"] for turn in turns])) for n in models}


def _quantiles(milliseconds: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(milliseconds)), "p90": float(np.quantile(milliseconds, 0.9))}


def cost(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The cost entries of results.json; latency and FLOPs are for `inputs`."""
    return {
        "parameters": parameters(model),
        "megabytes": megabytes(model),
        "flops": flops(model, inputs),
        "latency_ms": latency(model, inputs),
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]  # frozen parts may already be in eval mode
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
