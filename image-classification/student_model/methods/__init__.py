"""Methods of distilling an image classifier, by name. None of them leaves anything behind in the student.

To add one: write a function (spec, *, settings) -> Method in a file here, name it in METHODS, and give it a test.
"""

from collections.abc import Callable

from kd.common.methods import METHODS as METHODS_OF_ALL_DOMAINS
from kd.common.methods import Method
from kd.image_classification.student_model.methods.all_stages import reviewkd, semckd
from kd.image_classification.student_model.methods.crd import crd
from kd.image_classification.student_model.methods.last_map import catkd, norm, srrl
from kd.image_classification.student_model.methods.stages import attention, fitnet, nst, ofd, vid

METHODS: dict[str, Callable[..., Method]] = METHODS_OF_ALL_DOMAINS | {
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
