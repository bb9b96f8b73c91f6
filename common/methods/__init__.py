"""Methods of distillation by name: what a student is trained for, and the features that this needs.

A method is a function (spec, *, arguments) -> Method, whose defaults are its paper's. METHODS holds those for
classifiers of every domain; a domain may add to the table.
"""

from kd.common.methods.arguments import arguments_of, check_methods_differ, fill_arguments, kd_flags, parse_method
from kd.common.methods.classification import METHODS
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

__all__ = [
    "METHODS",
    "Feature",
    "Method",
    "ModelFeatures",
    "TaskSpec",
    "arguments_of",
    "check_methods_differ",
    "depth_map",
    "fill_arguments",
    "hooked",
    "kd_flags",
    "labels",
    "labels_and_soft_targets",
    "match",
    "parse_method",
    "some_of_each_class",
]
