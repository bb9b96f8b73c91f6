"""Methods of distilling an image classifier, by name. None of them leaves anything behind in the student.

To add one: write a function (spec, *, settings) -> Method in a file here, name it in METHODS, and give it a test.
"""

from collections.abc import Callable

from kd.common.methods import METHODS as METHODS_OF_ALL_DOMAINS
from kd.common.methods import Method, TaskSpec, chosen, filled, flags_of
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.methods.all_stages import reviewkd, semckd
from kd.image_classification.student_model.methods.crd import crd
from kd.image_classification.student_model.methods.last_map import catkd, norm, srrl
from kd.image_classification.student_model.methods.stages import attention, fitnet, nst, ofd, vid

PLAIN, CONTROL, SIMKD = "none", "control", "simkd"  # other students of the scripts, by the names on the command line
CONTROLS = (PLAIN, CONTROL)  # trained on the labels alone, without and with SimKD's projector

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


def for_pair(spec: str, pair: PairArguments) -> str:
    """NAME[:setting=value]... with the pair's settings where it leaves them open."""
    return spec if spec in (*CONTROLS, SIMKD) else filled(spec, pair.method_args, METHODS)


def method_of(spec: str, args: ImageTrainingArguments) -> Callable[[TaskSpec], Method]:
    """The method NAME[:setting=value]..., with the batch size for those that depend on it."""
    batch = args.per_device_train_batch_size * args.views
    return chosen(spec, METHODS, batch=batch, **flags_of(spec, args))


def check_kd_flags(methods: list[str], args: ImageTrainingArguments) -> None:
    """Raises UserError for an --alpha or --temperature that none of the methods takes."""
    taken = {"temperature"} if SIMKD in methods else set()  # of its --kl_weight
    for spec in methods:
        taken |= {flag for flag in flags_of(spec, args) if f":{flag}=" not in spec}
    for flag in {"alpha", "temperature"} - taken:
        if getattr(args, flag) != getattr(ImageTrainingArguments, flag):
            raise UserError(f"--{flag} is that of a plain kd: set it in the method, as in {methods[-1]}:{flag}=...")
