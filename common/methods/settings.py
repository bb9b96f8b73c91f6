"""A method chosen by a string, NAME[:setting=value]...: `dkd`, `dkd:beta=2:warmup=0`.

The annotation of a setting gives its type and range: `float` is a finite number from 0 on, `int` one above 0, `bool`
true or false; other ranges are those of `kd.common.utils.ranges`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import MOST, Range, range_in


def chosen(spec: str, methods: Mapping[str, Callable[..., Any]], **defaults: Any) -> Callable[..., Any]:
    """The method that `spec` names, with its settings; those of `defaults` that the method has fill what `spec` leaves
    open. Raises UserError for an unknown method or setting, a setting that is set twice, and a value of another type
    or out of range, also among the defaults.
    """
    name, words = _parsed(spec)
    if name not in methods:
        raise UserError(f"there is no method {name!r}, only {', '.join(methods)}{_guess(name, methods)}")
    method = methods[name]
    settings = settings_of(method)
    values = {key: value for key, value in defaults.items() if key in settings}
    for key, value in words.items():
        if key not in settings:
            raise UserError(
                f"method {name} has no setting {key!r}{_guess(key, settings)}: it has {', '.join(settings) or 'none'}"
            )
        values[key] = _converted(name, key, value, settings[key])
    for key, value in values.items():
        _check_range(name, key, value, settings[key])
    return partial(method, **values)


def filled(spec: str, published: Sequence[str], methods: Mapping[str, Callable[..., Any]]) -> str:
    """`spec` with those settings of the same method in `published` (specs) that it leaves open, in the order there.

    Raises UserError as `chosen` does, and for two of `published` of the same method.
    """
    name, set_here = _parsed(spec)
    names = [_parsed(other)[0] for other in published]
    repeated = next((other for i, other in enumerate(names) if other in names[:i]), None)
    if repeated:
        raise UserError(f"--method_args has two entries for {repeated}: join them, as in {repeated}:a=1:b=2")
    for other in published:
        chosen(other, methods)
    open_ones = {k: v for other in published if _parsed(other)[0] == name for k, v in _parsed(other)[1].items()}
    return ":".join([name, *(f"{key}={value}" for key, value in (open_ones | set_here).items())])


def check_methods_differ(methods: Iterable[tuple[str, Callable[..., Any]]]) -> None:
    """Raises UserError where two specs give one method the same settings, however they are written. `methods` are
    specs and the results of `chosen`.
    """
    known: dict[Any, str] = {}
    for spec, method in methods:
        parameters = inspect.signature(method).parameters.values()  # whose defaults are the settings
        settings = tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)
        same = known.get((_parsed(spec)[0], settings))
        if same is not None:
            raise UserError(f"{same} and {spec} are the same method with the same settings: name it once")
        known[_parsed(spec)[0], settings] = spec


def flags_of(spec: str, args: KDTrainingArguments) -> dict[str, float]:
    """--alpha and --temperature are those of `kd`; in other methods the words stand for other things."""
    return {"alpha": args.alpha, "temperature": args.temperature} if spec.split(":")[0] == "kd" else {}


def settings_of(method: Callable[..., Any]) -> dict[str, Any]:
    """{setting: its annotation}, in the order of the signature."""
    parameters = inspect.signature(method, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _parsed(spec: str) -> tuple[str, dict[str, str]]:
    """NAME:setting=value:... as the name and {setting: value}. Raises UserError for a setting that is set twice."""
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
