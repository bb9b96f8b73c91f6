"""The labels of a dataset: classes or scores, and rows without a label, determined over all splits at once.

The notes report each decision.
"""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kd.common.data.label_columns import (
    Counts,
    Kind,
    as_strings,
    count_labels,
    is_class_label,
    look_up,
    parse_labels,
    without_placeholders,
)
from kd.common.data.label_names import count_rows, is_number, shorten_list, sort_labels
from kd.common.data.sources import Splits
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED

FEW_ROWS = 20  # a smaller train split may have a different class in each row


@dataclass(frozen=True)
class Labels:
    """Labels by split. A split that is not used is missing.

    names: class names by id; empty for scores.
    rows: indices of the rows that are used: those with a label and, with `keep_unlabelled`, all rows of train.
    values: the labels of these rows, class ids (int64) or scores (float32); IGNORED or NaN without a label.
    notes: what was inferred, and which rows have no label.
    """

    names: list[str]
    rows: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    notes: list[str]


def read_labels(
    raw: Splits,
    column: str,
    kind: Kind | None = None,
    known: list[str] | None = None,
    no_label: Collection[str] = (),
    keep_unlabelled: bool = False,
) -> Labels:
    """Reads the labels of all splits from `column`. A test split may lack the column.

    Args:
        kind: resolves labels that could be either classes or scores.
        known: class names of the model that is evaluated, or [] if they do not matter; None for training.
        no_label: placeholders for a missing label.
        keep_unlabelled: whether rows of train without a label are used. Train may then lack the column.

    Raises UserError if the labels stay ambiguous, or if train or validation has no labels.
    """
    declared = [rows.features[column].names for rows in raw.values() if is_class_label(rows, column)]
    strings = {split: as_strings(split, rows, column, declared) for split, rows in raw.items()}
    strings = without_placeholders(strings, column, no_label)
    declared = [[name for name in names if name not in no_label] for names in declared]
    occurring = {split: Counter(values.drop_null().to_pylist()) for split, values in strings.items()}
    label_of, notes = parse_labels(occurring, column, kind, declared, known)
    counts = count_labels(occurring, label_of)
    labels = {label for found in counts.values() for label in found}
    if not labels:
        raise UserError(f"column {column!r} holds no labels")
    kept = {split for split, found in counts.items() if found or (keep_unlabelled and split == "train")}
    notes += check_unlabelled(raw, counts, column, keep_unlabelled)
    if kind is None:
        kind = "classification" if declared or known else _infer_kind(labels, counts, column, notes)
    names = [] if kind == "regression" else class_names(declared, labels)
    if names:
        notes += check_classes(counts, names, column, known)
    if kind == "regression" or (kind == "ids" and not declared):
        _check_numbers(strings, label_of, column, kind)
    numbers = {name: float(i) for i, name in enumerate(names)} or {label: float(label) for label in labels}
    table = {string: math.nan if label is None else numbers[label] for string, label in label_of.items()}
    found = {split: look_up(values, table) for split, values in strings.items() if split in kept}
    used = {split: (keep_unlabelled and split == "train") | ~np.isnan(values) for split, values in found.items()}
    rows = {split: np.flatnonzero(mask) for split, mask in used.items()}
    values = {split: _typed(found[split][rows[split]], bool(names)) for split in found}
    return Labels(names, rows, values, [_summary(names, values), *notes])


def _typed(values: np.ndarray, classes: bool) -> np.ndarray:
    return np.where(np.isnan(values), IGNORED, values).astype(np.int64) if classes else values.astype(np.float32)


def _summary(names: list[str], values: dict[str, np.ndarray]) -> str:
    if names:
        return f"labels: {len(names)} classes ({shorten_list(names)})"
    scores = np.concatenate(list(values.values()))
    return f"labels: scores from {np.nanmin(scores):g} to {np.nanmax(scores):g}"


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
            f"column {column!r} has {len(train)} different values in {count_rows(train.total())} of train: if it "
            "holds the labels, pass --task classification or --task regression"
        )
    if word is None:
        notes.append("whole numbers are treated as classes: pass --task regression if they are scores")
    return "classification"


# ---- checks ----


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


def class_names(declared: list[list[str]], labels: set[str]) -> list[str]:
    """The class names that the first split declares, then labels that only later splits declare."""
    if not declared:
        return sort_labels(labels)
    others = {name for names in declared for name in names if name in labels} - {*declared[0]}
    return [*declared[0], *sort_labels(others)]


def check_classes(counts: Counts, names: list[str], column: str, known: list[str] | None) -> list[str]:
    """Raises UserError for an undeclared label, for a single class to train on, and for a split that shares no label
    with train. Returns notes on labels that never occur in train.
    """
    train, notes = counts.get("train", Counter()), []
    for split, found in counts.items():
        if unknown := sorted(found.keys() - set(names)):
            raise UserError(
                f"label {unknown[0]!r} of {split} ({count_rows(found[unknown[0]])}) is not among the classes of "
                f"column {column!r}, {shorten_list(names)}: correct or remove it"
            )
    classes, of_train = (sort_labels(train), " of train") if train else (names, "")
    if len(classes) == 1 and known is None:
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
            shown = f"{shorten_list(missing)} ({count_rows(sum(found[name] for name in missing))})"
            notes.append(f"labels of {split} that never occur in train, classes without training rows: {shown}")
    return notes


def check_unlabelled(raw: Splits, counts: Counts, column: str, keep_unlabelled: bool) -> list[str]:
    """Raises UserError if validation, or train unless unlabelled rows are kept, has no labels. Returns notes on rows
    and splits without labels.
    """
    notes = []
    for split, found in counts.items():
        unlabelled = len(raw[split]) - found.total()
        if keep_unlabelled and split == "train":
            if unlabelled:
                number = f"{unlabelled:,} of {count_rows(len(raw[split]))} of train"
                notes.append(f"{number} have no label: they train the student by the teacher's outputs alone")
            continue
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
            notes.append(f"{unlabelled:,} of {count_rows(len(raw[split]))} of {split} have no label and are left out")
    return notes
