"""The computing environment of this process: device, ranks, precision, versions."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the type of matrix products; weights stay in fp32


def best_device() -> torch.device:
    """This process's GPU (CUDA, or Apple's MPS) if there is one, else the CPU."""
    return PartialState().device


def accelerator_type() -> str:
    """The type of the device that training uses unless --use_cpu: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in this precision."""
    return torch.autocast(device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def use_one_thread() -> None:
    """Uses one thread in this process, unless the environment has OMP_NUM_THREADS: small networks need more time with
    several threads that wait passively.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def process() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def end_processes() -> None:
    """Waits for the other processes and destroys the process group: if one exits early, slower ones may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def synchronize(device: torch.device) -> None:
    """Waits for the kernels of a GPU, so that a clock measures their execution and not their launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device | None = None) -> Precision:
    """`auto` is bf16 if the device computes it natively, else fp16 if it has tensor cores for it, else fp32; other
    names are returned unchanged.

    `device` defaults to `accelerator_type()`. Raises ValueError for fp16 on a CPU, which has no loss scaling.
    """
    device = device or torch.device(accelerator_type())
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: pass --precision fp32 or bf16")
    if name != "auto":
        return name
    if computes_bf16(device):
        return "bf16"
    return "fp16" if has_fp16_tensor_cores(device) else "fp32"


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is native: CUDA compute capability 8.0 and up, CPUs with AVX512-BF16 or AMX. Others emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def has_fp16_tensor_cores(device: torch.device) -> bool:
    """Whether fp16 is much faster than fp32, as on V100 (CUDA compute capability 7.0) and T4 (7.5). Apple's GPUs
    compute both at about the same rate.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def environment(precision: str, device: torch.device | str) -> dict[str, Any]:
    """The `environment` part of results.json."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "git_commit": git_commit(),
    }


def command() -> list[str]:
    """The command line of this program, with paths below the working directory relative to it."""
    here = f"{Path.cwd()}/"
    return ["python", *(word.removeprefix(here) for word in sys.argv)]


def device_name(device: torch.device) -> str:
    """The model name of a GPU or of the CPU, else the device's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return device.type


def git_commit() -> str | None:
    """Short hash of the commit that this package is in, with `-dirty` if tracked files changed; None without git."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*words: str) -> str | None:
    """The output of git, or None if it fails. git runs without optional locks: if it was killed, it would leave
    `.git/index.lock`, which blocks commits.
    """
    command = ["git", "--no-optional-locks", *words]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
