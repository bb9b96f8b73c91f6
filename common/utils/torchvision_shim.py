"""Lets torchvision load beside a CPU-only torch.

torchvision's wheels are built against CUDA torch. Beside a CPU torch their C++ library does not load, so the operators
`torchvision::nms` and `torchvision::qnms` are never declared, and `import torchvision` (hence timm, and the Trainer
of transformers) fails while it registers their meta functions. Declaring the two schemas is all that is missing:
nothing in this project calls the operators themselves.
"""

import importlib.machinery
import importlib.util
import sys

import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # a Library takes its declarations back when it is garbage-collected


def declare_missing_operators() -> list[str]:
    """Declares those schemas that are missing; returns their names. Call before the first import of torchvision.

    A no-op where torchvision is absent, already imported, or has a C++ library that loads.
    """
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
    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return True  # no torchvision: nothing to cure
    details = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(spec.submodule_search_locations[0], details).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
