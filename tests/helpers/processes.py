"""Other processes that train, forked so that nothing is imported again."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState


def fork() -> int:
    """os.fork, for training on a CPU; skips the test where this process has used a GPU, which a fork cannot."""
    if torch.cuda.is_initialized():
        pytest.skip("forks a process that has used a GPU")
    return os.fork()


def in_processes(number: int, folder: Path, function: Callable[[], object]) -> list:
    """What `function` returns (tensors and plain values) in each of `number` processes of one group, with gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [_fork(rank, number, port, folder, function) for rank in range(number)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not any(codes), "\n".join(errors)
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(number)]


def _fork(rank: int, number: int, port: str, folder: Path, function: Callable[[], object]) -> int:
    if pid := fork():
        return pid
    code = 1
    try:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.save(function(), folder / f"result{rank}")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)
