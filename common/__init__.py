"""The core that all domains share. It imports no domain and knows no dataset."""

import os
import signal
import sys
from pathlib import Path


def end_at_once(*_: object) -> None:
    """Ctrl-C while a script still imports, where an exception would be swallowed or garbled by what is imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _is_script() -> bool:
    """Whether this process is one of the project's programs, not a notebook or a program of somebody else."""
    module = any(word.startswith("kd.common.") for word in sys.orig_argv[1:3])
    return module or Path(sys.argv[0]).resolve().parent.name == "scripts"


if _is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)  # until kd.common.cli.run

from kd.common.utils.torchvision_shim import declare_missing_operators  # noqa: E402  it imports torch, for seconds

declare_missing_operators()
