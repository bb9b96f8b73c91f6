"""Which floating-point type a run computes in."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def resolve_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device | None = None) -> Precision:
    """`auto` is bf16 where the device computes it natively and fp32 elsewhere; a name given is kept.

    `device` defaults to the first CUDA device if there is one, else the CPU.
    """
    if name != "auto":
        return name
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if computes_bf16(device) else "fp32"


def computes_bf16(device: torch.device) -> bool:
    """Native bf16: CUDA compute capability 8.0 and up, CPUs with AVX512-BF16 or AMX. Others emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
