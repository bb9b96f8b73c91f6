"""Distillation methods by name.

A method is a function (spec, *, arguments) -> Method, which returns the terms of the objective and the features that
they read. The default arguments are those of the paper. METHODS contains the methods for classifiers of any domain, to
which a domain may add others.
"""

from kd.common.methods.arguments import (
    arguments_of,
    check_methods_differ,
    check_name,
    fill_arguments,
    kd_flags,
    parse_method,
)
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
    unlabelled_error,
)

__all__ = [
    "METHODS",
    "Feature",
    "Method",
    "ModelFeatures",
    "TaskSpec",
    "arguments_of",
    "check_methods_differ",
    "check_name",
    "depth_map",
    "fill_arguments",
    "hooked",
    "kd_flags",
    "labels",
    "labels_and_soft_targets",
    "match",
    "parse_method",
    "some_of_each_class",
    "unlabelled_error",
]
