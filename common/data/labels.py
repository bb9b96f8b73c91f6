"""The label column of a dataset: classes or scores, and rows without a label, decided once over all splits.

Labels are read as strings, so that a class is the same in every file format and every split: `1` and `1.0`, or the
`0.0` that pandas writes where a column of whole numbers has gaps. The notes report what was decided.
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

# What labels are: classes or scores; "ids" are classes whose numbers are whole, from 0, with -1 for no label.
Kind = Literal["classification", "regression", "ids"]
Counts = dict[str, Counter[str]]  # how often each string or label occurs, by split
Ids = dict[str, np.ndarray]  # class ids (rows,) by split

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LEADING_ZERO = re.compile(r"[+-]?0\d")
NO_LABEL = {"", "nan", "null"}  # in lower case; among numbers also:
NOT_AVAILABLE = {"na", "n/a", "#n/a", "<na>", "none", "-nan"}
MINUS_ONE = "-1"
SHARE_OF_A_CLASS = 0.05  # -1 among 0 and 1 is a class if every split has at least that share of it
FEW_ROWS = 20  # in fewer rows each may be the only one of its class
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Labels:
    """The labels of a column by split: `values` are class ids (int64), or scores (float32) where there are no `names`,
    of those `rows` that have a label. A split without any label is in neither.
    """

    names: list[str]
    rows: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    notes: list[str]


def read_labels(raw: Splits, column: str, kind: Kind | None = None, known: list[str] | None = None) -> Labels:
    """The labels of all splits in `column`, which a split may lack.

    Args:
        kind: decides where the values could be classes as well as scores.
        known: the class names of a model that is to be evaluated.

    Raises UserError where that remains open, and where train or validation has no labels.
    """
    declared = next((rows.features[column].names for rows in raw.values() if _is_class(rows, column)), None)
    strings = {split: _as_strings(split, rows, column, declared) for split, rows in raw.items()}
    occurring = {split: Counter(values.drop_null().to_pylist()) for split, values in strings.items()}
    label_of, notes = _labels_of_strings(occurring, column, kind, declared, known)
    counts = {split: _count_labels(found, label_of) for split, found in occurring.items()}
    labels = {label for found in counts.values() for label in found}
    if not labels:
        raise UserError(f"column {column!r} holds no labels")
    notes += _without_labels(raw, counts, column)
    if kind is None:
        kind = "classification" if declared or known else _guess_kind(labels, counts, column, notes)
    names = [] if kind == "regression" else _class_names(raw, column, labels)
    if names:
        _check_classes(counts, names, column, known)
        notes += _never_trained(counts, column)
    if kind == "regression" or (kind == "ids" and not declared):
        _refuse_wrong(strings, label_of, column, kind)
    numbers = {name: float(place) for place, name in enumerate(names)} or {label: float(label) for label in labels}
    table = {string: math.nan if label is None else numbers[label] for string, label in label_of.items()}
    found = {split: _look_up(values, table) for split, values in strings.items() if counts[split]}
    rows = {split: np.flatnonzero(~np.isnan(values)) for split, values in found.items()}
    values = {split: found[split][rows[split]].astype(np.int64 if names else np.float32) for split in found}
    return Labels(names, rows, values, [_describe(names, values), *notes])


def renumber(dataset: str, ids: Ids, data_names: list[str], names: list[str]) -> Ids:
    """Class ids by `data_names` as class ids by `names`, those of a model, which may have more. Case is ignored
    where no two classes differ in it alone. Raises UserError for a label that `names` lacks.
    """
    unambiguous = all(len({name.casefold() for name in listed}) == len(listed) for listed in (data_names, names))
    key = str.casefold if unambiguous else str
    places = {key(name): number for number, name in enumerate(names)}
    table = np.array([places.get(key(name), -1) for name in data_names])
    for split, labels in ids.items():
        if (unknown := labels[table[labels] < 0]).size:
            label, rows = data_names[unknown[0]], _rows(int((labels == unknown[0]).sum()))
            raise UserError(
                f"{dataset} has the label {label!r} ({rows} of {split}), which is not among {some(names)}: rename or "
                "remove it, or name another column with --label_column"
            )
    return {split: table[labels] for split, labels in ids.items()}


# ---------------------------------------------------------------- a column as strings


def _is_class(rows: datasets.Dataset, column: str) -> bool:
    return isinstance(rows.features.get(column), datasets.ClassLabel)


def _as_strings(split: str, rows: datasets.Dataset, column: str, declared: list[str] | None) -> pa.Array:
    """A column as strings, null where nothing stands. Whole numbers are ids of the classes that are `declared`."""
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
        return _names_of_ids(split, ids, declared, column)
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


def _names_of_ids(split: str, values: pa.Array, names: list[str], column: str) -> pa.Array:
    ids = values.fill_null(-1).to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero((ids < -1) | (ids >= len(names)))).size:
        raise UserError(
            f"row {wrong[0]} of {split}: label {ids[wrong[0]]} in column {column!r} is out of range, its "
            f"{len(names)} classes are numbered from 0: correct it, or make it -1 where there is no label"
        )
    return pa.array([*names, None], pa.string()).take(pa.array(np.where(ids < 0, len(names), ids)))


def _look_up(values: pa.Array, table: dict[str, float]) -> np.ndarray:
    """The number in `table` of each string (rows,) float64; nan for null."""
    encoded = values.dictionary_encode()
    numbers = np.array([*(table[string] for string in encoded.dictionary.to_pylist()), math.nan])
    return numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy(zero_copy_only=False)]


# ---------------------------------------------------------------- strings as labels


def is_number(string: str) -> bool:
    """Whether a string is a finite decimal number. A code such as `007` is none."""
    return NUMBER.fullmatch(string) is not None and not LEADING_ZERO.match(string) and math.isfinite(float(string))


def in_order(labels: Collection[str]) -> list[str]:
    """Numbers first and by size, 2 before 10, also where they are written as 02; then names by the alphabet."""
    return sorted(labels, key=lambda label: (float(label) if NUMBER.fullmatch(label) else math.inf, label))


def some(names: Collection[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _labels_of_strings(
    counts: Counts, column: str, kind: Kind | None, declared: list[str] | None, known: list[str] | None
) -> tuple[dict[str, str | None], list[str]]:
    """The label of each string, or None where it stands for no label; and a note on -1."""
    strings = {string for found in counts.values() for string in found}
    if declared:
        nothing = {string for string in strings if string.strip().lower() in {*NO_LABEL, MINUS_ONE}} - set(declared)
        return {string: None if string in nothing else string for string in strings}, []
    label_of = {string: None if string.strip().lower() in NO_LABEL else string.strip() for string in strings}
    labels = {label for label in label_of.values() if label is not None}
    numbers = {label for label in labels if is_number(label)}
    if numbers and all(label.lower() in NOT_AVAILABLE for label in labels - numbers):
        label_of = {s: _canonical(label) if label in numbers else None for s, label in label_of.items()}
    minus = [string for string, label in label_of.items() if label == MINUS_ONE]
    if not minus:
        return label_of, []
    by_label = {split: _count_labels(found, label_of) for split, found in counts.items()}
    if not _minus_one_is_no_label(by_label, column, kind, known):
        return label_of, [f"-1 in column {column!r} is a label like the others"]
    return label_of | dict.fromkeys(minus), [f"-1 in column {column!r} stands for no label"]


def _canonical(number: str) -> str:
    """One spelling for each whole number."""
    return str(int(float(number))) if float(number).is_integer() and abs(float(number)) < 2**53 else number


def _count_labels(strings: Counter[str], label_of: dict[str, str | None]) -> Counter[str]:
    found: Counter[str] = Counter()
    for string, count in strings.items():
        if (label := label_of[string]) is not None:
            found[label] += count
    return found


def _minus_one_is_no_label(counts: Counts, column: str, kind: Kind | None, known: list[str] | None) -> bool:
    """As in GLUE, whose test splits hold nothing else, and in SNLI among the ids 0, 1 and 2; but not on a scale."""
    if known is not None:
        return MINUS_ONE not in known
    others = {label for found in counts.values() for label in found} - {MINUS_ONE}
    if not any(found[MINUS_ONE] and len(found) > 1 for found in counts.values()):
        return bool(others)
    if kind == "ids":
        return all(map(is_number, others))
    if kind == "regression" or others != {str(number) for number in range(len(others))} or len(others) < 2:
        return False
    if len(others) > 2:
        return True
    if kind == "classification":
        return False
    shares = [found[MINUS_ONE] / found.total() for found in counts.values() if found.keys() - {MINUS_ONE}]
    if len(shares) > 1 and min(shares) >= SHARE_OF_A_CLASS:
        return False
    raise UserError(
        f"the labels in column {column!r} are -1, 0 and 1: pass --task classification if -1 is a class, or leave the "
        "label of rows empty that have none"
    )


# ---------------------------------------------------------------- classes or scores


def _guess_kind(labels: set[str], counts: Counts, column: str, notes: list[str]) -> Kind:
    fraction = next((label for label in sorted(labels) if is_number(label) and not float(label).is_integer()), None)
    word = next((label for label in sorted(labels) if not is_number(label)), None)
    if word is not None and fraction is not None:
        raise UserError(
            f"column {column!r} holds numbers such as {fraction} and others such as {word!r}: correct these, or "
            "pass --task classification where each is a class"
        )
    if fraction is not None:
        return "regression"
    if word is None and labels not in ({str(number) for number in range(len(labels))}, {"-1", "0", "1"}):
        raise UserError(
            f"column {column!r} holds the whole numbers {some(in_order(labels))}, which are not 0 to n-1: pass --task "
            "classification if they are classes, --task regression if they are scores"
        )
    train = counts.get("train", Counter())
    if train.total() >= FEW_ROWS and len(train) > train.total() / 2:
        raise UserError(
            f"column {column!r} has {len(train)} different values in {_rows(train.total())} of train: if it holds "
            "the labels, pass --task classification or --task regression"
        )
    if word is None:
        notes.append("whole numbers are taken as classes: pass --task regression if they are scores")
    return "classification"


def _refuse_wrong(strings: dict[str, pa.Array], label_of: dict[str, str | None], column: str, kind: Kind) -> None:
    """Raises UserError for a score that is no number and, where all labels are numbers, for one that is no id."""
    labels = {string: label for string, label in label_of.items() if label is not None}
    wrong = {string for string, label in labels.items() if not is_number(label)}
    why = "no finite number: correct it, or pass --task classification"
    if kind == "ids":
        wrong = set() if wrong else {string for string, label in labels.items() if not label.isdecimal()}
        why = "no class: labels are names, or whole numbers from 0 (-1 is no label)"
    for split, values in strings.items() if wrong else ():
        for row, string in enumerate(values.to_pylist()):
            if string in wrong:
                raise UserError(f"row {row} of {split}: {string!r} in column {column!r} is {why}")


# ---------------------------------------------------------------- classes, and rows without a label


def _class_names(raw: Splits, column: str, labels: set[str]) -> list[str]:
    """As the first of the splits declares them that declare any; then what only others declare, where it occurs."""
    declared = [rows.features[column].names for rows in raw.values() if _is_class(rows, column)]
    if not declared:
        return in_order(labels)
    return [*declared[0], *in_order({name for names in declared for name in names if name in labels} - {*declared[0]})]


def _check_classes(counts: Counts, names: list[str], column: str, known: list[str] | None) -> None:
    """Refuses labels that are not among those which the files declare, and a single class to train on."""
    for split, found in counts.items():
        if unknown := sorted(found.keys() - set(names)):
            raise UserError(
                f"label {unknown[0]!r} of {split} ({_rows(found[unknown[0]])}) is not among the classes of column "
                f"{column!r}, {some(names)}: correct or remove it"
            )
    of_train = " of train" if "train" in counts else ""
    trained = in_order(counts["train"]) if of_train else names
    if len(trained) == 1 and not known:
        raise UserError(
            f"every label{of_train} in column {column!r} is {trained[0]!r}, so there is nothing to learn: add rows of "
            "another class"
        )


def _never_trained(counts: Counts, column: str) -> list[str]:
    """A note on the labels that only other splits have. A split that shares no label with train is refused."""
    train, notes = counts.get("train", Counter()), []
    for split, found in counts.items() if train else ():
        missing = in_order(found.keys() - train.keys())
        if missing and len(missing) == len(found):
            raise UserError(
                f"no label of {split} ({some(missing)}) occurs in train ({some(in_order(train))}): give both the same "
                f"labels in column {column!r}"
            )
        if missing:
            shown = f"{some(missing)} ({_rows(sum(found[name] for name in missing))})"
            notes.append(f"labels of {split} that never occur in train, classes without training rows: {shown}")
    return notes


def _without_labels(raw: Splits, counts: Counts, column: str) -> list[str]:
    """Notes on rows and splits without labels. Training needs labels in train and validation; test may lack them."""
    notes = []
    for split, found in counts.items():
        without = len(raw[split]) - found.total()
        if not found and split != "test" and "train" in raw:
            if column not in raw[split].features:
                raise UserError(
                    f"the {split} split lacks column {column!r} that train has: its columns are "
                    f"{', '.join(raw[split].column_names)}"
                )
            raise UserError(f"the {split} split has no labels in column {column!r}: add them, or remove the split")
        if not found:
            notes.append(f"the {split} split has no labels and is not used")
        elif without:
            notes.append(f"{without:,} of {_rows(len(raw[split]))} of {split} have no label and are left out")
    return notes


def _describe(names: list[str], values: dict[str, np.ndarray]) -> str:
    if names:
        return f"labels: {len(names)} classes ({some(names)})"
    scores = np.concatenate(list(values.values()))
    return f"labels: scores from {scores.min():g} to {scores.max():g}"


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"
