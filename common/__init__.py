"""The core that all domains share. It imports no domain and contains no dataset.

The public names are imported when they are used, because torch takes seconds (__init__.pyi has their types).
"""

import importlib
from typing import Any

from kd.common.utils.startup import (
    declare_operators_before_torchvision,
    keep_freed_memory,
    prepare_script,
    set_wait_policy,
)

MODULES = {
    "DiscreteKeyValueBottleneck": "bottleneck.module",
    "KDTrainer": "training.trainer",
    "Method": "methods",
    "Objective": "objective",
    "distill": "distillation.distill",
}

set_wait_policy()
keep_freed_memory()
prepare_script()
declare_operators_before_torchvision()


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("kd.common.losses")
    if name not in MODULES:
        raise AttributeError(f"module 'kd.common' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kd.common.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, "losses"})
