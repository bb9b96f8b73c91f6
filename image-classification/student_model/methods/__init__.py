"""Methods for image classifiers, by name. None of them changes the architecture of the student.

To add one, write a function (spec, *, arguments) -> Method in a file of this folder, add it to METHODS, and test it.
"""

from collections.abc import Callable

from kd.common.methods import METHODS as METHODS_OF_ALL_DOMAINS
from kd.common.methods import Method, TaskSpec, fill_arguments, kd_flags, parse_method
from kd.common.training.arguments import LABELS
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import CONTROLS, SIMKD, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.methods.all_stages import reviewkd, semckd
from kd.image_classification.student_model.methods.last_map import catkd, crd, norm, srrl
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


def with_pair_arguments(spec: str, pair: PairArguments) -> str:
    """NAME[:argument=value]..., with the arguments of the pair that `spec` does not set."""
    return spec if spec in (*CONTROLS, SIMKD) else fill_arguments(spec, pair.method_args, METHODS)


def image_method(spec: str, args: ImageTrainingArguments) -> Callable[[TaskSpec], Method]:
    """The method NAME[:argument=value]..., with the batch size for methods that depend on it."""
    batch = args.per_device_train_batch_size * args.views
    return parse_method(spec, METHODS, batch=batch, **kd_flags(spec, args))


def check_dot(args: ImageTrainingArguments, *methods: Method) -> None:
    """Raises UserError for a --dot_delta if none of the methods has a loss of the labels and another one."""
    both = any(LABELS in method.objective.terms and len(method.objective.terms) > 1 for method in methods)
    if args.dot_delta is not None and not both:
        raise UserError(
            "--dot_delta separates the gradients of the labels and of the teacher, which this run does not have both: "
            "leave it out, or give the labels a weight"
        )


def check_kd_flags(methods: list[str], args: ImageTrainingArguments) -> None:
    """Raises UserError for an --alpha or --temperature that none of the methods uses."""
    used = {"temperature"} if SIMKD in methods else set()  # for --kl_weight
    for spec in methods:
        used |= {flag for flag in kd_flags(spec, args) if f":{flag}=" not in spec}
    for flag in {"alpha", "temperature"} - used:
        if getattr(args, flag) != getattr(ImageTrainingArguments, flag):
            raise UserError(
                f"--{flag} applies to plain kd only: leave it out, or set a method argument, as in dkd:{flag}=..."
            )
