"""The label column of a dataset: classes or scores, and rows without a label, decided once over all splits.

Labels are read as strings, so that a class is the same in every file format and every split: `1` and `1.0`, or the
`0.0` that pandas writes where a column of whole numbers has gaps. The notes report what was decided.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kd.common.data.label_words import (
    Kind,
    as_strings,
    count,
    count_labels,
    in_order,
    is_class,
    is_number,
    look_up,
    meaning_of,
    some,
)
from kd.common.data.sources import Splits
from kd.common.utils.errors import UserError

FEW_ROWS = 20  # in fewer rows each may be the only one of its class

Counts = dict[str, Counter[str]]  # how often each label occurs, by split
Ids = dict[str, np.ndarray]  # class ids (rows,) by split


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
    """The labels of all splits in `column`, which a split may lack. `kind` decides where the values could be classes
    as well as scores; `known` are the names of the classes of a model that is to be measured.

    Raises UserError where that remains open, and where train or validation has no labels.
    """
    declared = next((rows.features[column].names for rows in raw.values() if is_class(rows, column)), None)
    written = {split: as_strings(split, rows, column, declared) for split, rows in raw.items()}
    words = {split: count(values) for split, values in written.items()}
    meaning, notes = meaning_of(words, column, kind, declared, known)
    counts = {split: count_labels(found, meaning) for split, found in words.items()}
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
        _refuse_wrong(written, meaning, column, kind)
    numbers = {name: float(place) for place, name in enumerate(names)} or {label: float(label) for label in labels}
    table = {word: None if label is None else numbers[label] for word, label in meaning.items()}
    found = {split: look_up(values, table) for split, values in written.items() if counts[split]}
    rows = {split: np.flatnonzero(~np.isnan(values)) for split, values in found.items()}
    values = {split: found[split][rows[split]].astype(np.int64 if names else np.float32) for split in found}
    return Labels(names, rows, values, [_describe(names, values), *notes])


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


def _refuse_wrong(written: dict[str, pa.Array], meaning: dict[str, str | None], column: str, kind: Kind) -> None:
    """Raises UserError for a score that is no number and, where all labels are numbers, for one that is no id."""
    labels = {word: label for word, label in meaning.items() if label is not None}
    wrong = {word for word, label in labels.items() if not is_number(label)}
    why = "no finite number: correct it, or pass --task classification"
    if kind == "ids":
        wrong = set() if wrong else {word for word, label in labels.items() if not label.isdecimal()}
        why = "no class: labels are names, or whole numbers from 0 (-1 is no label)"
    for split, values in written.items() if wrong else ():
        row, word = next(((row, word) for row, word in enumerate(values.to_pylist()) if word in wrong), (-1, ""))
        if row >= 0:
            raise UserError(f"row {row} of {split}: {word!r} in column {column!r} is {why}")


# ---------------------------------------------------------------- classes


def _class_names(raw: Splits, column: str, labels: set[str]) -> list[str]:
    """As the first of the splits declares them that declare any; then what only others declare, where it occurs."""
    declared = [rows.features[column].names for rows in raw.values() if is_class(rows, column)]
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
            f"every label{of_train} in column {column!r} is {trained[0]!r}, so there is nothing to tell apart: add "
            "rows of another class"
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


def renumber(dataset: str, ids: Ids, own: list[str], names: list[str]) -> Ids:
    """Class ids that are places in `own` as places in `names`, a model's, which may hold more classes. Upper and lower
    case are the same where no two classes differ in it alone. Raises UserError for a label that `names` lacks.
    """
    unambiguous = all(len({name.casefold() for name in listed}) == len(listed) for listed in (own, names))
    key = str.casefold if unambiguous else str
    places = {key(name): number for number, name in enumerate(names)}
    table = np.array([places.get(key(name), -1) for name in own])
    for split, labels in ids.items():
        if (unknown := labels[table[labels] < 0]).size:
            rows = _rows(int((labels == unknown[0]).sum()))
            raise UserError(
                f"{dataset} has the label {own[unknown[0]]!r} ({rows} of {split}), which is not among {some(names)}: "
                "rename or remove it, or name another column with --label_column"
            )
    return {split: table[labels] for split, labels in ids.items()}


# ---------------------------------------------------------------- rows without a label


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
