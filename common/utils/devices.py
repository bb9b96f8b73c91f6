"""Where this process computes, and which of how many it is."""

import torch
import torch.distributed as dist
from accelerate import PartialState


def best_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return PartialState().device


def process() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def end_processes() -> None:
    """Waits for the other processes and takes leave of them: one that just exits can make the slower ones abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def synchronize(device: torch.device) -> None:
    """Waits for what was sent to a GPU, so that a clock measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
