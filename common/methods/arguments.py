"""Parses a method with arguments, NAME[:argument=value]...: `dkd`, `dkd:beta=2:warmup=0`.

The annotation of an argument gives its type and range: `float` is finite and not negative, `int` is positive, `bool`
is true or false. `kd.common.utils.ranges` has annotations for other ranges.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import MOST, Range, range_in


def parse_method(spec: str, methods: Mapping[str, Callable[..., Any]], **defaults: Any) -> Callable[..., Any]:
    """The method of `spec` with its arguments. `defaults` replace the method's defaults; names that are not arguments
    of the method are ignored. Raises UserError for an unknown method or argument, for an argument that is set twice,
    and for a value of another type or out of range, also among `defaults`.
    """
    check_name(spec, methods)
    name, words = _split(spec)
    method = methods[name]
    annotations = arguments_of(method)
    values = {key: value for key, value in defaults.items() if key in annotations}
    for key, value in words.items():
        if key not in annotations:
            raise UserError(
                f"method {name} has no argument {key!r}{_guess(key, annotations)}: it has "
                f"{', '.join(annotations) or 'none'}"
            )
        values[key] = _convert(name, key, value, annotations[key])
    for key, value in values.items():
        _, limits = _type_and_range(annotations[key])
        if limits is not None and value not in limits:
            raise UserError(f"method {name}: {key} must be {limits}, got {value:g}")
    return partial(method, **values)


def check_name(spec: str, names: Iterable[str]) -> None:
    """Raises UserError if the method of `spec` is none of `names`."""
    name, known = _split(spec)[0], list(names)
    if name not in known:
        raise UserError(f"there is no method {name!r}, only {', '.join(known)}{_guess(name, known)}")


def fill_arguments(spec: str, published: Sequence[str], methods: Mapping[str, Callable[..., Any]]) -> str:
    """Adds to `spec` the arguments of the same method in `published` (a list of specs) that it does not set.

    Raises UserError as `parse_method` does, and if two of `published` are of the same method.
    """
    name, arguments = _split(spec)
    all_published: dict[str, dict[str, str]] = {}
    for other in published:
        parse_method(other, methods)
        other_name, other_arguments = _split(other)
        if other_name in all_published:
            raise UserError(f"--method_args has two entries for {other_name}: join them, as in {other_name}:a=1:b=2")
        all_published[other_name] = other_arguments
    filled = all_published.get(name, {}) | arguments
    return ":".join([name, *(f"{key}={value}" for key, value in filled.items())])


def check_methods_differ(methods: Iterable[tuple[str, Callable[..., Any]]]) -> None:
    """Raises UserError if two specs are the same method with the same arguments, in any notation. `methods` are pairs
    of a spec and its result of `parse_method`.
    """
    known: dict[Any, str] = {}
    for spec, method in methods:
        parameters = inspect.signature(method).parameters.values()  # their defaults are the arguments
        key = _split(spec)[0], tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)
        if key in known:
            raise UserError(f"{known[key]} and {spec} are the same method with the same arguments: name it once")
        known[key] = spec


def kd_flags(spec: str, args: KDTrainingArguments) -> dict[str, float]:
    """--alpha and --temperature as arguments of `kd`. Other methods use these names for other arguments."""
    return {"alpha": args.alpha, "temperature": args.temperature} if spec.split(":")[0] == "kd" else {}


def arguments_of(method: Callable[..., Any]) -> dict[str, Any]:
    """{argument: its annotation}, in the order of the signature."""
    parameters = inspect.signature(method, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _split(spec: str) -> tuple[str, dict[str, str]]:
    """NAME:argument=value:... as the name and {argument: value}. Raises UserError if an argument is set twice."""
    name, *words = spec.split(":")
    arguments: dict[str, str] = {}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key in arguments:
            raise UserError(f"method {name}: {key} is set twice, to {arguments[key]} and to {value}: set it once")
        arguments[key] = value
    return name.strip(), arguments


def _type_and_range(annotation: Any) -> tuple[type, Range | None]:
    """bool has no range."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return kind, range_in(annotation) or {int: Range(1, MOST), float: Range(0)}.get(kind)


def _convert(name: str, key: str, value: str, annotation: Any) -> Any:
    kind, _ = _type_and_range(annotation)
    try:
        if "_" in value:  # Python reads it as a separator of digits
            raise ValueError
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        example = "true" if kind is bool else kind(2)
        raise UserError(f"method {name}: {key}={value} is invalid, pass a value such as {key}={example}") from None


def _guess(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
