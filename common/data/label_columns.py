"""A label column as strings, and which of the strings are labels.

Labels are compared as strings, so that a class has one name in every file format and split: `1`, `1.0` and the `0.0`
that pandas writes when a column of whole numbers has gaps.
"""

import math
from collections import Counter
from collections.abc import Collection
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.common.data.label_names import is_number
from kd.common.utils.errors import UserError

# "ids": classes; if all labels are numbers, they must be whole numbers from 0, and -1 means no label.
Kind = Literal["classification", "regression", "ids"]
Counts = dict[str, Counter[str]]  # occurrences of each label by split

NO_LABEL = {"", "nan", "null"}  # in lower case
NOT_AVAILABLE = {"na", "n/a", "#n/a", "<na>", "none", "-nan"}  # also no label if all other labels are numbers
MIN_CLASS_SHARE = 0.05  # -1 next to 0 and 1 is a class if it has at least this share of every split


def is_class_label(rows: datasets.Dataset, column: str) -> bool:
    return isinstance(rows.features.get(column), datasets.ClassLabel)


def as_strings(split: str, rows: datasets.Dataset, column: str, declared: list[list[str]]) -> pa.Array:
    """A column as strings, null for missing values. Whole numbers are ids if a split declares class names."""
    feature = rows.features.get(column)
    if feature is None:
        return pa.nulls(len(rows), pa.string())
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise UserError(f"column {column!r} holds no labels (names, numbers) but {feature}")
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(feature, datasets.ClassLabel):
        return _names_of_ids(split, values, feature.names, column)
    if declared and (ids := _whole_numbers(values)) is not None:
        return _names_of_ids(split, ids, declared[0], column)
    if pa.types.is_boolean(values.type):
        return pa.array(["False", "True"]).take(values.cast(pa.int8()))
    try:
        return values.cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"column {column!r} holds {values.type}, no labels (names, numbers)") from None


def without_placeholders(
    strings: dict[str, pa.Array], column: str, placeholders: Collection[str]
) -> dict[str, pa.Array]:
    """The strings by split, with null in place of placeholders for a missing label.

    Raises UserError for a placeholder that does not occur.
    """
    for name in placeholders:
        spellings = pa.array([name, f"{name}.0"])  # pandas writes whole numbers with gaps as floats
        found = {split: pc.is_in(pc.utf8_trim_whitespace(values), spellings) for split, values in strings.items()}
        if not any(pc.any(mask).as_py() for mask in found.values()):
            raise UserError(f"no label in column {column!r} is {name!r}: correct --unlabelled_label, or leave it out")
        strings = {split: pc.if_else(found[split], None, values) for split, values in strings.items()}
    return strings


def _whole_numbers(values: pa.Array) -> pa.Array | None:
    """The values as integers, or None if some are not whole. pandas writes integers with gaps as floats."""
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    elif not pa.types.is_integer(values.type):
        return None
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def _names_of_ids(split: str, values: pa.Array, names: list[str], column: str) -> pa.Array:
    ids = values.fill_null(-1).to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero((ids < -1) | (ids >= len(names)))).size:
        raise UserError(
            f"row {wrong[0]} of {split}: label {ids[wrong[0]]} in column {column!r} is out of range for its "
            f"{len(names)} classes, numbered from 0: correct it, or set it to -1 for a row without a label"
        )
    return pa.array([*names, None], pa.string()).take(pa.array(np.where(ids < 0, len(names), ids)))


def look_up(values: pa.Array, table: dict[str, float]) -> np.ndarray:
    """Maps each string (rows,) to its number in `table`, float64; null becomes NaN."""
    encoded = values.dictionary_encode()
    numbers = np.array([*(table[string] for string in encoded.dictionary.to_pylist()), math.nan])
    return numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy(zero_copy_only=False)]


# ---------------------------------------------------------------- strings as labels


def parse_labels(
    occurring: Counts, column: str, kind: Kind | None, declared: list[list[str]], known: list[str] | None
) -> tuple[dict[str, str | None], list[str]]:
    """Returns a mapping from each string to its label, or to None for no label, and a note on -1 if it occurs."""
    strings = {string for found in occurring.values() for string in found}
    if declared:
        empty = {string for string in strings if string.strip().lower() in {*NO_LABEL, "-1"}} - set(declared[0])
        return {string: None if string in empty else string for string in strings}, []
    label_of = {string: None if string.strip().lower() in NO_LABEL else string.strip() for string in strings}
    labels = {label for label in label_of.values() if label is not None}
    numbers = {label for label in labels if is_number(label)}
    if numbers and all(label.lower() in NOT_AVAILABLE for label in labels - numbers):
        label_of = {string: _plain_integer(label) if label in numbers else None for string, label in label_of.items()}
    minus_one = [string for string, label in label_of.items() if label == "-1"]
    if not minus_one:
        return label_of, []
    if not _minus_one_is_no_label(count_labels(occurring, label_of), column, kind, known):
        return label_of, [f"-1 in column {column!r} is treated as a label"]
    return label_of | dict.fromkeys(minus_one), [f"-1 in column {column!r} is treated as no label"]


def _plain_integer(number: str) -> str:
    """A whole number without a decimal point; any other number unchanged."""
    return str(int(float(number))) if float(number).is_integer() and abs(float(number)) < 2**53 else number


def count_labels(occurring: Counts, label_of: dict[str, str | None]) -> Counts:
    counts: Counts = {split: Counter() for split in occurring}
    for split, strings in occurring.items():
        for string, count in strings.items():
            if (label := label_of[string]) is not None:
                counts[split][label] += count
    return counts


def _minus_one_is_no_label(counts: Counts, column: str, kind: Kind | None, known: list[str] | None) -> bool:
    """True for GLUE's test splits, which contain no other label, and for SNLI's ids 0, 1, 2; False for a scale."""
    if known is not None:
        return "-1" not in known
    others = {label for found in counts.values() for label in found} - {"-1"}
    if not any(found["-1"] and len(found) > 1 for found in counts.values()):
        return bool(others)
    if kind == "ids":
        return all(map(is_number, others))
    if kind == "regression" or others != {str(i) for i in range(len(others))} or len(others) < 2:
        return False
    if len(others) > 2 or kind == "classification":
        return len(others) > 2
    shares = [found["-1"] / found.total() for found in counts.values() if found.keys() - {"-1"}]
    if len(shares) > 1 and min(shares) >= MIN_CLASS_SHARE:
        return False
    raise UserError(
        f"the labels in column {column!r} are -1, 0 and 1: pass --task classification if -1 is a class; otherwise "
        "pass --unlabelled_label -1"
    )
