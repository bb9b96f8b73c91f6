"""Methods by name, with settings: `dkd`, `dkd:beta=2:warmup=0`.

A method is a function (spec, *, settings) -> Method; the defaults of its settings are its paper's, and a table {name:
function} lists the methods of a domain. The annotation of a setting gives its type and range: `float` is a finite
number from 0 on, `int` one above 0, `bool` true or false; other ranges are those of `kd.common.utils.ranges`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Annotated, Any, get_args, get_origin

import torch
from torch import Tensor

from kd.common.objective import FeatureLoss, Objective, Term, Terms
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import MOST, Range, range_in

PER_CLASS = 50  # training samples of each class that stand for it


@dataclass
class Method:
    """What a student is trained for. `first + second` has the terms and the features of both.

    terms: {name: (weight, term)} of the objective.
    features, teacher_features: {name: path} of the submodules of student and teacher whose outputs the terms read.
        A method without teacher features needs only the teacher's logits.
    watched: terms that are logged and not trained for.
    """

    terms: Terms
    features: dict[str, str] = field(default_factory=dict)
    teacher_features: dict[str, str] = field(default_factory=dict)
    watched: dict[str, Term] = field(default_factory=dict)

    def __add__(self, other: "Method") -> "Method":
        repeated = self.terms.keys() & other.terms.keys()
        if repeated:
            raise ValueError(f"both methods have a term {', '.join(sorted(repeated))}")
        return Method(
            self.terms | other.terms,
            self.features | other.features,
            self.teacher_features | other.teacher_features,
            self.watched | other.watched,
        )

    @cached_property
    def objective(self) -> Objective:
        return Objective(**self.terms).watching(**self.watched)

    @property
    def auxiliary_parameters(self) -> int:
        """Number of parameters that train with the student and do not ship with it."""
        return sum(p.numel() for p in self.objective.parameters() if p.requires_grad)


@dataclass(frozen=True)
class TaskSpec:
    """What methods of every domain need to know of the classification at hand.

    classes: number of them.
    student_width, teacher_width: of the features that the heads see.
    pooled: makes a term of a loss between the features (batch, width) that the heads see.
    last: likewise of the last features before pooling, flattened to (batch, anything), where they are of one size.
    teacher_samples: what the teacher makes of training samples, pooled (samples, width), and their labels (samples,);
        computed when it is called.
    features, teacher_features: the submodules that `pooled` and `last` read, as in a Method.
    views: of each sample in a batch, which holds the first views of all its samples, then the second ones, and so on.
    """

    classes: int
    student_width: int
    teacher_width: int
    pooled: Callable[[FeatureLoss], Term]
    last: Callable[[FeatureLoss], Term]
    teacher_samples: Callable[[], tuple[Tensor, Tensor]]
    features: dict[str, str] = field(default_factory=dict)
    teacher_features: dict[str, str] = field(default_factory=dict)
    views: int = 1


def some_of_each_class(labels: Tensor, classes: int) -> Tensor:
    """The rows of the first PER_CLASS samples of each class, of labels (samples,)."""
    return torch.cat([(labels == c).nonzero().flatten()[:PER_CLASS] for c in range(classes)])


def chosen(spec: str, methods: Mapping[str, Callable[..., Any]], **defaults: Any) -> Callable[..., Any]:
    """The method that `spec` names, with its settings; of `defaults`, those that the method knows and `spec` leaves
    open. Raises UserError for a method or setting that there is not, for a setting given twice, and for a value of
    another kind or out of range, also among the defaults.
    """
    name, words = _parsed(spec)
    if name not in methods:
        raise UserError(f"there is no method {name!r}, only {', '.join(methods)}{_guess(name, methods)}")
    method = methods[name]
    settings = settings_of(method)
    given = {key: value for key, value in defaults.items() if key in settings}
    for key, value in words.items():
        if key not in settings:
            raise UserError(
                f"method {name} has no setting {key!r}{_guess(key, settings)}: it has {', '.join(settings) or 'none'}"
            )
        given[key] = _converted(name, key, value, settings[key])
    for key, value in given.items():
        _check_range(name, key, value, settings[key])
    return partial(method, **given)


def filled(spec: str, published: Sequence[str], methods: Mapping[str, Callable[..., Any]]) -> str:
    """`spec` with those settings of the same method in `published` (specs) that it leaves open, in the order there.

    Raises UserError as `chosen` does, and for two of `published` of the same method.
    """
    name, own = _parsed(spec)
    names = [_parsed(other)[0] for other in published]
    repeated = next((other for i, other in enumerate(names) if other in names[:i]), None)
    if repeated:
        raise UserError(f"--method_settings has two entries for {repeated}: join them, as in {repeated}:a=1:b=2")
    for other in published:
        chosen(other, methods)
    open_ones = {k: v for other in published if _parsed(other)[0] == name for k, v in _parsed(other)[1].items()}
    return ":".join([name, *(f"{key}={value}" for key, value in (open_ones | own).items())])


def check_methods_differ(methods: Iterable[tuple[str, Callable[..., Any]]]) -> None:
    """Raises UserError where two specs give one method the same settings, however they are written. `methods` are
    specs and what `chosen` makes of them.
    """
    seen: dict[Any, str] = {}
    for spec, method in methods:
        parameters = inspect.signature(method).parameters.values()  # whose defaults are the settings
        settings = tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)
        same = seen.get((_parsed(spec)[0], settings))
        if same is not None:
            raise UserError(f"{same} and {spec} are the same method with the same settings: name it once")
        seen[_parsed(spec)[0], settings] = spec


def flags_of(spec: str, args: KDTrainingArguments) -> dict[str, float]:
    """--alpha and --temperature are those of `kd`; in other methods the words stand for other things."""
    return {"alpha": args.alpha, "temperature": args.temperature} if spec.split(":")[0] == "kd" else {}


def settings_of(method: Callable[..., Any]) -> dict[str, Any]:
    """{setting: its annotation}, in the order of the signature."""
    parameters = inspect.signature(method, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _parsed(spec: str) -> tuple[str, dict[str, str]]:
    """NAME:setting=value:... as the name and {setting: value}. Raises UserError for a setting given twice."""
    name, *words = spec.split(":")
    settings: dict[str, str] = {}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key in settings:
            raise UserError(f"method {name}: {key} is set twice, to {settings[key]} and to {value}: set it once")
        settings[key] = value
    return name.strip(), settings


def _type_and_range(annotation: Any) -> tuple[type, Range | None]:
    """bool has no range."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return kind, range_in(annotation) or {int: Range(1, MOST), float: Range(0)}.get(kind)


def _converted(name: str, key: str, value: str, annotation: Any) -> Any:
    kind, _ = _type_and_range(annotation)
    try:
        if "_" in value:  # which Python takes for a separator
            raise ValueError
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        example = "true" if kind is bool else kind(2)
        raise UserError(f"method {name}: {key}={value} is none, give a value such as {key}={example}") from None


def _check_range(name: str, key: str, value: Any, annotation: Any) -> None:
    _, limits = _type_and_range(annotation)
    if limits is not None and value not in limits:
        raise UserError(f"method {name}: {key} must be {limits}, got {value:g}")


def _guess(word: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
