"""Methods of distillation by name: what a student is trained for, and the features that this needs.

A method is a function (spec, *, settings) -> Method. The defaults of its settings are its paper's. METHODS has those
that fit classifiers of every domain; a domain may add its own to the table.
"""

from collections.abc import Callable

from kd.common.methods.logits import LOGIT_METHODS
from kd.common.methods.method import (
    Feature,
    Method,
    ModelFeatures,
    TaskSpec,
    depth_map,
    hooked,
    labels,
    labels_and_soft_targets,
    match,
    some_of_each_class,
)
from kd.common.methods.relations import RELATION_METHODS
from kd.common.methods.settings import check_methods_differ, chosen, filled, flags_of, settings_of

METHODS: dict[str, Callable[..., Method]] = LOGIT_METHODS | RELATION_METHODS

__all__ = [
    "METHODS",
    "Feature",
    "Method",
    "ModelFeatures",
    "TaskSpec",
    "check_methods_differ",
    "chosen",
    "depth_map",
    "filled",
    "flags_of",
    "hooked",
    "labels",
    "labels_and_soft_targets",
    "match",
    "settings_of",
    "some_of_each_class",
]
