"""The label column of a dataset: classes or scores, and rows without a label, determined over all splits at once.

Labels are compared as strings, so that a class has one name in every file format and split: `1`, `1.0` and the `0.0`
that pandas writes when a column of whole numbers has gaps. The notes report each decision.
"""

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.common.data.sources import Splits
from kd.common.utils.errors import UserError

# "ids": classes; if all labels are numbers, they must be whole numbers from 0, and -1 means no label.
Kind = Literal["classification", "regression", "ids"]
Counts = dict[str, Counter[str]]  # occurrences of each label by split
Ids = dict[str, np.ndarray]  # class ids (rows,) by split

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LEADING_ZERO = re.compile(r"[+-]?0\d")
NO_LABEL = {"", "nan", "null"}  # in lower case
NOT_AVAILABLE = {"na", "n/a", "#n/a", "<na>", "none", "-nan"}  # also no label if all other labels are numbers
MIN_CLASS_SHARE = 0.05  # -1 next to 0 and 1 is a class if it has at least this share of every split
FEW_ROWS = 20  # a smaller train split may have a different class in each row
MAX_NAMES = 5  # names listed in a message


@dataclass(frozen=True)
class Labels:
    """Labels by split. A split without any label is missing.

    names: class names by id; empty for scores.
    rows: indices of the rows that have a label.
    values: the labels of these rows, class ids (int64) or scores (float32).
    notes: what was inferred, and which rows are left out.
    """

    names: list[str]
    rows: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    notes: list[str]


def read_labels(raw: Splits, column: str, kind: Kind | None = None, known: list[str] | None = None) -> Labels:
    """Reads the labels of all splits from `column`. A test split may lack the column.

    Args:
        kind: resolves labels that could be either classes or scores.
        known: class names of the model that is evaluated.

    Raises UserError if the labels stay ambiguous, or if train or validation has no labels.
    """
    declared = [rows.features[column].names for rows in raw.values() if _is_class_label(rows, column)]
    strings = {split: _as_strings(split, rows, column, declared) for split, rows in raw.items()}
    occurring = {split: Counter(values.drop_null().to_pylist()) for split, values in strings.items()}
    label_of, notes = _parse(occurring, column, kind, declared, known)
    counts = _count(occurring, label_of)
    labels = {label for found in counts.values() for label in found}
    if not labels:
        raise UserError(f"column {column!r} holds no labels")
    notes += _check_unlabelled(raw, counts, column)
    if kind is None:
        kind = "classification" if declared or known else _infer_kind(labels, counts, column, notes)
    names = [] if kind == "regression" else _class_names(declared, labels)
    if names:
        notes += _check_classes(counts, names, column, known)
    if kind == "regression" or (kind == "ids" and not declared):
        _check_numbers(strings, label_of, column, kind)
    numbers = {name: float(i) for i, name in enumerate(names)} or {label: float(label) for label in labels}
    table = {string: math.nan if label is None else numbers[label] for string, label in label_of.items()}
    found = {split: _look_up(values, table) for split, values in strings.items() if counts[split]}
    rows = {split: np.flatnonzero(~np.isnan(values)) for split, values in found.items()}
    values = {split: found[split][rows[split]].astype(np.int64 if names else np.float32) for split in found}
    return Labels(names, rows, values, [_summary(names, values), *notes])


def map_label_ids(dataset: str, ids: Ids, data_names: list[str], names: list[str]) -> Ids:
    """Maps class ids by `data_names` to ids by `names`, the classes of a model, which may have more.

    Ignores case unless two classes differ only in case. Raises UserError for a label that `names` lacks.
    """
    unambiguous = all(len({name.casefold() for name in listed}) == len(listed) for listed in (data_names, names))
    key = str.casefold if unambiguous else str
    model_ids = {key(name): i for i, name in enumerate(names)}
    table = np.array([model_ids.get(key(name), -1) for name in data_names])
    for split, labels in ids.items():
        if (unknown := labels[table[labels] < 0]).size:
            label, rows = data_names[unknown[0]], _rows(int((labels == unknown[0]).sum()))
            raise UserError(
                f"{dataset} has the label {label!r} ({rows} of {split}), which is not among {shorten_list(names)}: "
                "rename or remove it, or name another column with --label_column"
            )
    return {split: table[labels] for split, labels in ids.items()}


def is_number(string: str) -> bool:
    """Whether a string is a finite decimal number. A code such as `007` is not a number."""
    return NUMBER.fullmatch(string) is not None and not LEADING_ZERO.match(string) and math.isfinite(float(string))


def sort_labels(labels: Collection[str]) -> list[str]:
    """Sorts numbers by value (2 before 10, also when written as 02), then names alphabetically."""
    return sorted(labels, key=lambda label: (float(label) if NUMBER.fullmatch(label) else math.inf, label))


def shorten_list(names: Collection[str]) -> str:
    """The first names, for a message."""
    return ", ".join(list(names)[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"


def _summary(names: list[str], values: dict[str, np.ndarray]) -> str:
    if names:
        return f"labels: {len(names)} classes ({shorten_list(names)})"
    scores = np.concatenate(list(values.values()))
    return f"labels: scores from {scores.min():g} to {scores.max():g}"


# ---------------------------------------------------------------- columns as strings


def _is_class_label(rows: datasets.Dataset, column: str) -> bool:
    return isinstance(rows.features.get(column), datasets.ClassLabel)


def _as_strings(split: str, rows: datasets.Dataset, column: str, declared: list[list[str]]) -> pa.Array:
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


def _look_up(values: pa.Array, table: dict[str, float]) -> np.ndarray:
    """Maps each string (rows,) to its number in `table`, float64; null becomes NaN."""
    encoded = values.dictionary_encode()
    numbers = np.array([*(table[string] for string in encoded.dictionary.to_pylist()), math.nan])
    return numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy(zero_copy_only=False)]


# ---------------------------------------------------------------- strings as labels


def _parse(
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
    if not _minus_one_is_no_label(_count(occurring, label_of), column, kind, known):
        return label_of, [f"-1 in column {column!r} is treated as a label"]
    return label_of | dict.fromkeys(minus_one), [f"-1 in column {column!r} is treated as no label"]


def _plain_integer(number: str) -> str:
    """A whole number without a decimal point; any other number unchanged."""
    return str(int(float(number))) if float(number).is_integer() and abs(float(number)) < 2**53 else number


def _count(occurring: Counts, label_of: dict[str, str | None]) -> Counts:
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
        "leave the label of these rows empty"
    )


def _infer_kind(labels: set[str], counts: Counts, column: str, notes: list[str]) -> Kind:
    fraction = next((label for label in sorted(labels) if is_number(label) and not float(label).is_integer()), None)
    word = next((label for label in sorted(labels) if not is_number(label)), None)
    if word is not None and fraction is not None:
        raise UserError(
            f"column {column!r} holds numbers such as {fraction} and names such as {word!r}: correct the names, or "
            "pass --task classification if every value is a class"
        )
    if fraction is not None:
        return "regression"
    if word is None and labels not in ({str(i) for i in range(len(labels))}, {"-1", "0", "1"}):
        raise UserError(
            f"column {column!r} holds the whole numbers {shorten_list(sort_labels(labels))}, which are not 0 to n-1: "
            "pass --task classification if they are classes, --task regression if they are scores"
        )
    train = counts.get("train", Counter())
    if train.total() >= FEW_ROWS and len(train) > train.total() / 2:
        raise UserError(
            f"column {column!r} has {len(train)} different values in {_rows(train.total())} of train: if it holds "
            "the labels, pass --task classification or --task regression"
        )
    if word is None:
        notes.append("whole numbers are treated as classes: pass --task regression if they are scores")
    return "classification"


# ---------------------------------------------------------------- checks


def _check_numbers(strings: dict[str, pa.Array], label_of: dict[str, str | None], column: str, kind: Kind) -> None:
    """Raises UserError for a score that is not a number and, if all labels are numbers, for one that is not an id."""
    labels = {string: label for string, label in label_of.items() if label is not None}
    wrong = {string for string, label in labels.items() if not is_number(label)}
    problem = "no finite number: correct it, or pass --task classification"
    if kind == "ids":
        wrong = set() if wrong else {string for string, label in labels.items() if not label.isdecimal()}
        problem = "no class: labels are names, or whole numbers from 0 (-1 is no label)"
    for split, values in strings.items() if wrong else ():
        for row, string in enumerate(values.to_pylist()):
            if string in wrong:
                raise UserError(f"row {row} of {split}: {string!r} in column {column!r} is {problem}")


def _class_names(declared: list[list[str]], labels: set[str]) -> list[str]:
    """The class names that the first split declares, then labels that only later splits declare."""
    if not declared:
        return sort_labels(labels)
    others = {name for names in declared for name in names if name in labels} - {*declared[0]}
    return [*declared[0], *sort_labels(others)]


def _check_classes(counts: Counts, names: list[str], column: str, known: list[str] | None) -> list[str]:
    """Raises UserError for an undeclared label, for a single class to train on, and for a split that shares no label
    with train. Returns notes on labels that never occur in train.
    """
    train, notes = counts.get("train", Counter()), []
    for split, found in counts.items():
        if unknown := sorted(found.keys() - set(names)):
            raise UserError(
                f"label {unknown[0]!r} of {split} ({_rows(found[unknown[0]])}) is not among the classes of column "
                f"{column!r}, {shorten_list(names)}: correct or remove it"
            )
    classes, of_train = (sort_labels(train), " of train") if "train" in counts else (names, "")
    if len(classes) == 1 and not known:
        raise UserError(
            f"every label{of_train} in column {column!r} is {classes[0]!r}, so there is nothing to learn: add rows of "
            "another class"
        )
    for split, found in counts.items() if train else ():
        missing = sort_labels(found.keys() - train.keys())
        if missing and len(missing) == len(found):
            raise UserError(
                f"no label of {split} ({shorten_list(missing)}) occurs in train ({shorten_list(sort_labels(train))}): "
                f"use the same labels in column {column!r} of both"
            )
        if missing:
            shown = f"{shorten_list(missing)} ({_rows(sum(found[name] for name in missing))})"
            notes.append(f"labels of {split} that never occur in train, classes without training rows: {shown}")
    return notes


def _check_unlabelled(raw: Splits, counts: Counts, column: str) -> list[str]:
    """Raises UserError if train or validation has no labels. Returns notes on rows and splits without labels."""
    notes = []
    for split, found in counts.items():
        unlabelled = len(raw[split]) - found.total()
        if not found and split != "test" and "train" in raw:
            if column not in raw[split].features:
                raise UserError(
                    f"the {split} split lacks column {column!r} that train has: its columns are "
                    f"{', '.join(raw[split].column_names)}"
                )
            raise UserError(f"the {split} split has no labels in column {column!r}: add them, or remove the split")
        if not found:
            notes.append(f"the {split} split has no labels and is not used")
        elif unlabelled:
            notes.append(f"{unlabelled:,} of {_rows(len(raw[split]))} of {split} have no label and are left out")
    return notes
