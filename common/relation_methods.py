"""Methods that match how the samples of a batch relate to one another, for classifiers of any domain.

Each is a function (task, *, settings) -> terms of an objective; the defaults are its paper's for CIFAR-100.
"""

from collections.abc import Callable

from common.objective import Terms

RELATION_METHODS: dict[str, Callable[..., Terms]] = {}
