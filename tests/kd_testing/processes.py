"""Child processes for tests. They are forked, so that they do not repeat imports."""

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState


def fork() -> int:
    """Calls os.fork. Skips the test if this process has used a GPU, which a forked process cannot use."""
    if torch.cuda.is_initialized():
        pytest.skip("forks a process that has used a GPU")
    return os.fork()


class Child:
    """Calls `function` in a fork of this process. `stdout` and `stderr` are readable files in `encoding`."""

    def __init__(self, function: Callable[[], object], encoding: str = "utf-8") -> None:
        pipes = [os.pipe() for _ in range(2)]
        self.pid = fork()
        if self.pid:
            self.stdout, self.stderr = (open(reader, encoding=encoding) for reader, _ in pipes)
            for _, writer in pipes:
                os.close(writer)
            return
        code: object = 1
        try:
            sys.stdout, sys.stderr = (open(writer, "w", encoding=encoding) for _, writer in pipes)
            function()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else code is not None)

    def end(self, by: signal.Signals) -> int:
        os.kill(self.pid, by)
        return self.wait()

    def wait(self) -> int:
        """The exit code, or the negative number of the signal that ended the process."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_code(code: str, *arguments: object, fork: bool = True) -> str:
    """The output of `python -c CODE ARGUMENTS`, in a fork of this process or in a new one. It must succeed."""

    def call() -> None:
        sys.argv = ["-c", *map(str, arguments)]
        exec(code, {"__name__": "__main__"})

    if fork:
        child = Child(call)
        printed, errors = child.stdout.read(), child.stderr.read()
        assert child.wait() == 0, errors[-2000:]
        return printed
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def in_processes(number: int, folder: Path, function: Callable[[], object]) -> list:
    """The results of `function` (tensors and plain values) in `number` processes of one gloo group."""
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
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": number,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in variables.items()})
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
