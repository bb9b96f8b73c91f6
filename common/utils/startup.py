"""What importing the project does first, before anything that takes seconds to import: Ctrl-C, and torchvision.

torchvision's wheels are built against CUDA torch. With a CPU-only torch their C++ library does not load, so the
operators `torchvision::nms` and `torchvision::qnms` are never declared, and `import torchvision` (hence timm, and the
Trainer of transformers) fails while it registers their meta functions. Declaring the two schemas is sufficient:
nothing in this project calls the operators themselves.
"""

import importlib.machinery
import importlib.util
import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a torch.library.Library withdraws its declarations when it is garbage-collected


def exit_on_interrupt(*_: object) -> None:
    """Handler of Ctrl-C while a script still imports, where imported code would swallow or garble an exception."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def handle_interrupts_while_importing() -> None:
    """Installs `exit_on_interrupt` in the project's programs, not in notebooks and other programs.

    `kd.common.cli.run` restores Python's handler.
    """
    module = any(word.startswith("kd.common.") for word in sys.orig_argv[1:3])
    is_script = module or Path(sys.argv[0]).resolve().parent.name == "scripts"
    if is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_on_interrupt)


class BeforeTorchvision(MetaPathFinder):
    """Calls `declare_missing_operators` before torchvision is found, and leaves finding it to the other finders."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_operators_before_torchvision() -> None:
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, BeforeTorchvision())


def declare_missing_operators() -> list[str]:
    """Declares those schemas that are missing; returns their names. Call before the first import of torchvision.

    A no-op where torchvision is absent, already imported, or has a C++ library that loads.
    """
    import torch  # takes seconds, which scripts that need no torchvision save

    if "torchvision" in sys.modules or _operator_library_loads():
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    declared = []
    for name, schema in SCHEMAS.items():
        try:
            library.define(schema)
        except RuntimeError:  # declared already
            continue
        declared.append(name)
    _libraries.append(library)
    return declared


def _operator_library_loads() -> bool:
    import torch

    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return True  # without torchvision there is nothing to declare
    details = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(spec.submodule_search_locations[0], details).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
