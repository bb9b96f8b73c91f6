"""Methods of distilling an image classifier that leave nothing behind in the student, by name.

Each is a function (pair, *, settings) -> Method. To add one: write it in a file here, name it in METHODS, and give it
a test.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from kd.common.methods import Method
from kd.common.methods.logits import LOGIT_METHODS
from kd.common.methods.relations import RELATION_METHODS
from kd.image_classification.student_model.methods.crd import crd
from kd.image_classification.student_model.methods.heads import catkd, srrl
from kd.image_classification.student_model.methods.many_to_one import norm
from kd.image_classification.student_model.methods.ofd import ofd
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.student_model.methods.reviewkd import reviewkd
from kd.image_classification.student_model.methods.semckd import semckd
from kd.image_classification.student_model.methods.stages import attention, fitnet, nst, vid


def for_images(method: Callable[..., Method]) -> Callable[..., Method]:
    """A method of every domain, of a pair of image classifiers."""

    @wraps(method)  # which shows its settings
    def build(pair: Pair, **settings: Any) -> Method:
        return method(pair.task, **settings)

    return build


METHODS: dict[str, Callable[..., Method]] = {
    **{name: for_images(method) for name, method in (LOGIT_METHODS | RELATION_METHODS).items()},
    "fitnet": fitnet,
    "attention": attention,
    "nst": nst,
    "vid": vid,
    "srrl": srrl,
    "catkd": catkd,
    "norm": norm,
    "ofd": ofd,
    "reviewkd": reviewkd,
    "semckd": semckd,
    "crd": crd,
}

__all__ = ["METHODS", "Pair"]
