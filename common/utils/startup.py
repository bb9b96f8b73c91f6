"""Setup before slow imports: OpenMP's threads, freed memory, Ctrl-C, progress bars and torchvision's operators.

torchvision's wheels are built for CUDA torch. With a CPU-only torch their C++ library does not load, so the operators
`torchvision::nms` and `torchvision::qnms` are never declared, and `import torchvision` (hence timm, and the Trainer of
transformers) fails while it registers their meta functions. Declaring the two schemas is sufficient: nothing in this
project calls the operators.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from tqdm import tqdm

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # of GNU's and LLVM's OpenMP
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_libraries: list[Any] = []  # a garbage-collected torch.library.Library withdraws its declarations


def set_wait_policy() -> None:
    """Makes OpenMP's threads sleep while they wait for each other, unless the environment has a setting of the user.

    By default they spin, for up to some milliseconds at the end of each operation. If another process needs the core,
    every operation then waits until the scheduler stops one of the spinning threads. OpenMP reads the environment when
    torch is imported; child processes inherit it.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def keep_freed_memory() -> None:
    """Makes glibc keep up to 2 GiB of freed memory for the next allocations, unless the environment has a setting of
    the user. Blocks of more than 32 MiB are still returned to the system.

    A training step on a CPU frees its activations. By default glibc returns most of that memory, and in each step the
    system then provides and clears the pages again.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def exit_on_interrupt(*_: object) -> None:
    """Handles Ctrl-C during imports, where imported code could suppress or change an exception."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def prepare_script() -> None:
    """Prepares a script of the project; does nothing in notebooks and other programs. `exit_on_interrupt` handles
    Ctrl-C during imports, until `kd.common.cli.run` restores Python's handler. tqdm's progress bars are disabled
    unless stderr is a terminal.
    """
    module = any(word.startswith("kd.common.") for word in sys.orig_argv[1:3])
    if not module and Path(sys.argv[0]).resolve().parent.name != "scripts":
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_on_interrupt)
    if not sys.stderr.isatty():
        disable_progress_bars()


def disable_progress_bars() -> None:
    """Disables all progress bars of tqdm, also those that are created with `disable=False`."""
    initialize = tqdm.__init__

    def disabled(bar: "tqdm[Any]", *args: Any, **kwargs: Any) -> None:
        initialize(bar, *args, **kwargs | {"disable": True})

    tqdm.__init__ = disabled  # type: ignore[assignment, method-assign]


class BeforeTorchvision(MetaPathFinder):
    """Calls `declare_missing_operators` before torchvision is imported. The other finders then find torchvision."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_operators_before_torchvision() -> None:
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, BeforeTorchvision())


def declare_missing_operators() -> list[str]:
    """Declares the missing schemas and returns their names. Call it before the first import of torchvision.

    Does nothing if torchvision is absent or already imported, or if its C++ library loads.
    """
    import torch  # takes seconds, so scripts without torchvision do not import it here

    if "torchvision" in sys.modules or _operator_library_loads():
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    declared = []
    for name, schema in SCHEMAS.items():
        try:
            library.define(schema)
        except RuntimeError:  # already declared
            continue
        declared.append(name)
    _libraries.append(library)
    return declared


def _operator_library_loads() -> bool:
    import torch

    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to declare without torchvision
    details = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(spec.submodule_search_locations[0], details).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
