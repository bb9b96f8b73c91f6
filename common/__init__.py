"""The core that all domains share. It imports no domain and knows no dataset."""

import os
import sys
from pathlib import Path


def _is_script() -> bool:
    """Whether this process is one of the project's programs, not a notebook or a program of somebody else."""
    module = any(word.startswith("common.") for word in sys.orig_argv[1:3])
    return module or Path(sys.argv[0]).resolve().parent.name == "scripts"


def _end_quietly(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Ctrl-C while a script still imports is one line too."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if _is_script():
    sys.excepthook = _end_quietly

from common.utils.torchvision_shim import declare_missing_operators  # noqa: E402  it imports torch, for seconds

declare_missing_operators()
