"""Methods by name, with settings: `dkd`, `dkd:beta=2:warmup=0`.

A method is a function with keyword-only settings, whose defaults are its paper's; a table {name: function} says which
there are. What it returns is up to the domain: terms of an objective, or a whole Method.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.arguments import KDTrainingArguments
from common.objective import FeatureLoss, Objective, Term
from common.utils.errors import UserError

PER_CLASS = 50  # training samples of each class that stand for it
POSITIVE = {"temperature"}  # settings, by their names in every method
SHARES = {"warmup", "curriculum", "decay_from", "momentum"}


@dataclass
class Method:
    """What a student is trained for, and the submodules of either model whose outputs that needs, {name: path}.

    logits_only: the teacher's logits are all that is needed of it, so that they may come from a table.
    """

    objective: Objective
    features: dict[str, str] = field(default_factory=dict)
    teacher_features: dict[str, str] = field(default_factory=dict)
    logits_only: bool = False

    @property
    def parameters_beside(self) -> int:
        """What trains beside the student, and does not ship."""
        return sum(p.numel() for p in self.objective.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Task:
    """What methods of every domain need to know of the classification at hand.

    classes: number of them.
    student_width, teacher_width: of the features that the heads see.
    pooled: makes a term of a loss between the features (batch, width) that the heads see.
    last: likewise of those before they are pooled, flattened to (batch, anything), where they are of one size.
    teacher_features: what the teacher makes of training samples, pooled (samples, width), and their labels (samples,);
        computed when it is called.
    """

    classes: int
    student_width: int
    teacher_width: int
    pooled: Callable[[FeatureLoss], Term]
    last: Callable[[FeatureLoss], Term]
    teacher_features: Callable[[], tuple[Tensor, Tensor]]


def some_of_each_class(labels: Tensor, classes: int) -> Tensor:
    """The rows of the first PER_CLASS samples of each class, of labels (samples,)."""
    return torch.cat([(labels == c).nonzero().flatten()[:PER_CLASS] for c in range(classes)])


def chosen(spec: str, methods: Mapping[str, Callable[..., Any]], **defaults: Any) -> Callable[..., Any]:
    """The method that `spec` names, with its settings; of `defaults`, those that the method knows and `spec` leaves
    open. Raises UserError for a method or setting that there is not, and for a value of another kind or out of range.
    """
    name, *words = spec.split(":")
    if name not in methods:
        raise UserError(f"there is no method {name!r}, only {', '.join(methods)}{_guess(name, methods)}")
    method = methods[name]
    settings = settings_of(method)
    given = {key: value for key, value in defaults.items() if key in settings}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key not in settings:
            raise UserError(
                f"method {name} has no setting {key!r}{_guess(key, settings)}: it has {', '.join(settings) or 'none'}"
            )
        given[key] = _converted(name, key, value, settings[key])
    return partial(method, **given)


def flags_of(spec: str, args: KDTrainingArguments) -> dict[str, float]:
    """--alpha and --temperature are those of `kd`; in other methods the words stand for other things."""
    return {"alpha": args.alpha, "temperature": args.temperature} if spec.split(":")[0] == "kd" else {}


def settings_of(method: Callable[..., Any]) -> dict[str, Any]:
    """{setting: its type, int or float}, in the order of the signature."""
    parameters = inspect.signature(method, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _converted(name: str, key: str, value: str, kind: Any) -> Any:
    try:
        number = kind(value)
    except ValueError:
        raise UserError(f"method {name}: {key}={value} is none, give a value such as {key}={kind(2)}") from None
    if key in SHARES:
        inside, expected = 0 <= number <= 1, "a share between 0 and 1"
    elif kind is int or key in POSITIVE:
        inside, expected = 0 < number < math.inf, "a number above 0"
    else:
        inside, expected = 0 <= number < math.inf, "a number from 0 on"
    if not inside:
        raise UserError(f"method {name}: {key}={value} is out of range, give {expected}")
    return number


def _guess(word: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
