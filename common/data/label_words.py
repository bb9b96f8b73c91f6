"""What stands in a label column, as strings: labels, and what means that a row has none."""

import math
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.common.utils.errors import UserError

# What labels are: classes or scores; "ids" are classes whose numbers are whole, from 0, with -1 for no label.
Kind = Literal["classification", "regression", "ids"]
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LEADING_ZERO = re.compile(r"[+-]?0\d")
NO_LABEL = {"", "nan", "null"}  # in lower case; among numbers also:
NOT_AVAILABLE = {"na", "n/a", "#n/a", "<na>", "none", "-nan"}
MINUS_ONE = "-1"
SHOWN = 5  # names in a message
SHARE_OF_A_CLASS = 0.05  # -1 beside 0 and 1 is a class if every split has at least as many


def is_class(rows: datasets.Dataset, column: str) -> bool:
    return isinstance(rows.features.get(column), datasets.ClassLabel)


def as_strings(split: str, rows: datasets.Dataset, column: str, declared: list[str] | None) -> pa.Array:
    """A column as strings, null where nothing stands. Whole numbers are ids of the classes that are `declared`."""
    feature = rows.features.get(column)
    if feature is None:
        return pa.nulls(len(rows), pa.string())
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise UserError(f"column {column!r} holds no labels (names, numbers) but {feature}")
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(feature, datasets.ClassLabel):
        return _names_of(split, values, feature.names, column)
    if declared and (ids := _whole_numbers(values)) is not None:
        return _names_of(split, ids, declared, column)
    if pa.types.is_boolean(values.type):
        return pa.array(["False", "True"]).take(values.cast(pa.int8()))
    try:
        return values.cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"column {column!r} holds {values.type}, no labels (names, numbers)") from None


def _whole_numbers(values: pa.Array) -> pa.Array | None:
    """Numbers as integers, also where pandas made them floats because some are missing; None where they are none."""
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    elif not pa.types.is_integer(values.type):
        return None
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def _names_of(split: str, values: pa.Array, names: list[str], column: str) -> pa.Array:
    ids = values.fill_null(-1).to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero((ids < -1) | (ids >= len(names)))).size:
        raise UserError(
            f"row {wrong[0]} of {split}: label {ids[wrong[0]]} in column {column!r} is out of range, its "
            f"{len(names)} classes are numbered from 0: correct it, or make it -1 where there is no label"
        )
    return pa.array([*names, None], pa.string()).take(pa.array(np.where(ids < 0, len(names), ids)))


def count(values: pa.Array) -> Counter[str]:
    found = values.drop_null().value_counts()
    return Counter(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))


def look_up(values: pa.Array, table: dict[str, Any]) -> np.ndarray:
    """A number (rows,) float64 for each string, nan where the table has none."""
    encoded = values.dictionary_encode()
    numbers = [table[word] for word in encoded.dictionary.to_pylist()]
    places = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([np.nan if number is None else number for number in [*numbers, None]])[places]


# ---------------------------------------------------------------- what a string means


def is_number(word: str) -> bool:
    """Whether a string is a finite decimal number. A code such as `007` is none."""
    return NUMBER.fullmatch(word) is not None and LEADING_ZERO.match(word) is None and math.isfinite(float(word))


def number_of(word: str) -> float | None:
    return float(word) if is_number(word) else None


def in_order(labels: Collection[str]) -> list[str]:
    """Numbers first and by size, 2 before 10, also where they are written as 02; then names by the alphabet."""
    return sorted(labels, key=lambda label: (float(label) if NUMBER.fullmatch(label) else math.inf, label))


def some(names: Collection[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def meaning_of(
    counts: dict[str, Counter[str]],
    column: str,
    kind: Kind | None,
    declared: list[str] | None,
    known: list[str] | None,
) -> tuple[dict[str, str | None], list[str]]:
    """What each string stands for: a label, or None where there is none; and a note on -1."""
    words = {word for found in counts.values() for word in found}
    if declared:
        nothing = {word for word in words if word.strip().lower() in {*NO_LABEL, MINUS_ONE}} - set(declared)
        return {word: None if word in nothing else word for word in words}, []
    meaning: dict[str, str | None] = {
        word: None if word.strip().lower() in NO_LABEL else word.strip() for word in words
    }
    labels = {label for label in meaning.values() if label is not None}
    numbers = {label for label in labels if is_number(label)}
    if numbers and all(label.lower() in NOT_AVAILABLE for label in labels - numbers):
        meaning |= {word: _canonical(label) if label in numbers else None for word, label in meaning.items() if label}
    minus = [word for word, label in meaning.items() if label == MINUS_ONE]
    if not minus:
        return meaning, []
    by_label = {split: count_labels(found, meaning) for split, found in counts.items()}
    if not _minus_one_is_no_label(by_label, column, kind, known):
        return meaning, [f"-1 in column {column!r} is a label like the others"]
    return meaning | dict.fromkeys(minus), [f"-1 in column {column!r} stands for no label"]


def _canonical(number: str) -> str:
    """One spelling for each whole number."""
    return str(int(float(number))) if float(number).is_integer() and abs(float(number)) < 2**53 else number


def count_labels(words: Counter[str], meaning: dict[str, str | None]) -> Counter[str]:
    found: Counter[str] = Counter()
    for word, count in words.items():
        if (label := meaning[word]) is not None:
            found[label] += count
    return found


def _minus_one_is_no_label(
    counts: dict[str, Counter[str]], column: str, kind: Kind | None, known: list[str] | None
) -> bool:
    """As in GLUE, whose test splits hold nothing else, and in SNLI beside the ids 0, 1 and 2; but not on a scale."""
    if known is not None:
        return MINUS_ONE not in known
    mixed = {split: found for split, found in counts.items() if found[MINUS_ONE] and len(found) > 1}
    if not mixed:
        return set().union(*counts.values()) > {MINUS_ONE}
    others = set().union(*counts.values()) - {MINUS_ONE}
    if kind == "ids":
        return all(map(is_number, others))
    if kind == "regression" or others != {str(number) for number in range(len(others))} or len(others) < 2:
        return False
    if len(others) > 2:
        return True
    if kind == "classification":
        return False
    labelled = [found for found in counts.values() if found and set(found) != {MINUS_ONE}]
    shares = [found[MINUS_ONE] / found.total() for found in labelled]
    if len(shares) > 1 and min(shares) >= SHARE_OF_A_CLASS:
        return False
    raise UserError(
        f"the labels in column {column!r} are -1, 0 and 1: pass --task classification if -1 is a class, or leave the "
        "label of rows empty that have none"
    )
