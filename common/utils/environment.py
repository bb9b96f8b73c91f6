"""What a result was computed with: versions, device, threads, precision and the code's commit."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


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
    """The command line of this program, paths below the working directory written relative to it."""
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
    """Short hash of the commit this package lies in, with `-dirty` if tracked files changed; None without git."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*words: str) -> str | None:
    """What git prints, or None where it fails. Without its optional locks: a process that is killed meanwhile would
    leave `.git/index.lock` behind, and the repository could not be committed to.
    """
    command = ["git", "--no-optional-locks", *words]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
