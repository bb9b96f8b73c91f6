"""Parses the columns in which an API or a language model left its predictions. See `teacher_columns`."""

import ast
import json
import math
from collections.abc import Mapping
from itertools import product
from os.path import commonprefix
from typing import Any

import datasets

from kd.common.data.label_columns import NO_LABEL
from kd.common.data.label_names import is_number, match_names, shorten_list
from kd.common.utils.errors import UserError

# Numbers by class name, numbers in an order, or one answer; None if there is no prediction.
Row = dict[str, float] | list[float] | str | None
NAME_KEYS = ("label", "class", "name", "category", "token", "intent")
NUMBER_KEYS = ("score", "probability", "prob", "p", "confidence", "logprob", "log_prob", "logit", "value")
FLAG = "--teacher_columns"


def parse_rows(split: str, rows: datasets.Dataset, names: list[str], classes: list[str]) -> list[Row]:
    """The predictions in the columns `names`, which may be named after `classes`, of all rows of a split.

    Raises UserError for cells of another form.
    """
    columns = {name: [_literal(value) for value in rows.with_format("arrow")[:][name].to_pylist()] for name in names}
    first, *others = columns.values()
    if not others:
        return [_prediction(split, number, value) for number, value in enumerate(first)]
    if len(others) == 1 and _are_names_and_numbers(first, others[0]):
        pairs = [(a, b) for a, b in zip(first, others[0], strict=True)]
        if any(is_numeric(a) or (isinstance(a, list) and any(map(is_numeric, a))) for a, _ in pairs):
            pairs = [(b, a) for a, b in pairs]
        return [_joined(split, number, *pair) for number, pair in enumerate(pairs)]
    labels = _classes_of_columns(names, classes)
    found: list[Row] = []
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        filled = {label: value for label, value in zip(labels, row, strict=True) if value is not None}
        for value in filled.values():
            if not is_numeric(value):
                raise UserError(
                    f"row {number} of {split}: {value!r} in the columns of {FLAG} is no number: correct it"
                )
        found.append({label: float(value) for label, value in filled.items()} or None)
    return found


def _literal(value: Any) -> Any:
    """The value of a cell. Text in brackets is parsed as JSON or as a Python literal; empty text is None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return None if text.lower() in NO_LABEL else text


def is_numeric(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        isinstance(value, str) and is_number(value)
    )


def _are_names_and_numbers(first: list[Any], second: list[Any]) -> bool:
    """Whether one of two columns holds names, and the other numbers, or lists of them."""
    numeric = [
        all(map(is_numeric, [item for value in column if value is not None for item in _listed(value)]))
        for column in (first, second)
    ]
    return sorted(numeric) == [False, True]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _joined(split: str, number: int, names: Any, numbers: Any) -> Row:
    if names is None or numbers is None:
        return None
    labels, values = _listed(names), _listed(numbers)
    if len(labels) != len(values):
        raise UserError(
            f"row {number} of {split}: {len(labels)} names and {len(values)} numbers in {FLAG}: correct it"
        )
    return {str(label): float(value) for label, value in zip(labels, values, strict=True)}


def _prediction(split: str, number: int, value: Any) -> Row:
    """The prediction in a single column."""
    if value is None or value in ([], {}):
        return None
    if isinstance(value, Mapping):
        for one in value.values():
            if one is not None and not is_numeric(one):
                raise UserError(f"row {number} of {split}: {one!r} in {FLAG} is no number: correct it")
        return {str(name): float(one) for name, one in value.items() if one is not None} or None
    if isinstance(value, list | tuple) and isinstance(value[0], Mapping):
        return dict(_named_number(split, number, entry) for entry in value)
    if isinstance(value, list | tuple):
        if not all(map(is_numeric, value)):
            raise UserError(f"row {number} of {split}: {value!r} in the column of {FLAG} is no list of numbers")
        return list(map(float, value))
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _named_number(split: str, number: int, entry: Mapping[str, Any]) -> tuple[str, float]:
    name = next((entry[key] for key in NAME_KEYS if key in entry), None)
    score = next((entry[key] for key in NUMBER_KEYS if key in entry), None)
    if name is None or not is_numeric(score):
        raise UserError(
            f"row {number} of {split}: {entry!r} in the column of {FLAG} has no name ({', '.join(NAME_KEYS)}) and "
            f"number ({', '.join(NUMBER_KEYS)}): rename its keys"
        )
    return str(name), float(score)  # type: ignore[arg-type]


def _classes_of_columns(names: list[str], classes: list[str]) -> list[str]:
    """The class of each column: its name without a common beginning and end. Raises UserError without a match."""
    start, end = commonprefix(names), commonprefix([name[::-1] for name in names])
    for left, right in product(range(len(start) + 1), range(len(end) + 1)):
        parts = [name[left : len(name) - right] for name in names]
        if all(parts) and len(parts) == len(classes) and -1 not in match_names(parts, classes):
            return parts
    raise UserError(
        f"the {len(names)} columns of {FLAG} ({shorten_list(names)}) do not match the {len(classes)} classes "
        f"({shorten_list(classes)}) by name: name one column for each class, or one column with names and numbers"
    )
