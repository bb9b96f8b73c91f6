"""The label column of a dataset: classes or scores, and rows without a label, decided once over all splits.

Labels are read as strings, so that a class is the same in every file format and every split: `1` and `1.0`, or the
`0.0` that pandas writes where a column of whole numbers has gaps. The notes report what was decided.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from common.label_words import (
    Kind,
    as_strings,
    count,
    count_labels,
    is_class,
    is_number,
    look_up,
    meaning_of,
    number_of,
)
from common.sources import Splits
from common.utils.errors import UserError

SHOWN = 5  # names of classes in a message
FEW_ROWS = 20  # in fewer rows each may be the only one of its class

Counts = dict[str, Counter[str]]  # how often each label occurs, by split


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
    as well as scores; `known` are names of the classes, if these are fixed already.

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
    fixed = declared is not None or known is not None
    names: list[str] = []
    table: dict[str, Any]
    decided = kind or ("classification" if fixed else _guess_kind(labels, column))
    if decided == "classification" and not (kind or fixed) and all(map(is_number, labels)):
        notes.append("whole numbers are taken as classes: pass --task regression if they are scores")
    if decided == "regression":
        table = {label: number_of(label) for label in labels}
        _refuse_words(written, {word for word, label in meaning.items() if label and table[label] is None}, column)
    else:
        names = list(declared or _in_order(labels))
        _check_classes(counts, names, column, chosen=fixed or kind is not None)
        notes += _never_trained(counts, column)
        table = {name: place for place, name in enumerate(names)}
    by_word = {word: None if label is None else table[label] for word, label in meaning.items()}
    found = {split: look_up(values, by_word) for split, values in written.items() if counts[split]}
    rows = {split: np.flatnonzero(~np.isnan(values)) for split, values in found.items()}
    values = {split: found[split][rows[split]].astype(np.int64 if names else np.float32) for split in found}
    return Labels(names, rows, values, [_describe(names, values), *notes])


# ---------------------------------------------------------------- classes or scores


def _guess_kind(labels: set[str], column: str) -> Kind:
    fraction = next((label for label in sorted(labels) if is_number(label) and not float(label).is_integer()), None)
    word = next((label for label in sorted(labels) if not is_number(label)), None)
    if word is not None:
        if fraction is not None:
            raise UserError(
                f"column {column!r} holds numbers such as {fraction} and others such as {word!r}: correct these, or "
                "pass --task classification where each is a class"
            )
        return "classification"
    if fraction is not None:
        return "regression"
    if labels in ({str(number) for number in range(len(labels))}, {"-1", "0", "1"}):
        return "classification"
    raise UserError(
        f"column {column!r} holds the whole numbers {some(_in_order(labels))}, which are not 0 to n-1: pass --task "
        "classification if they are classes, --task regression if they are scores"
    )


def _in_order(labels: Iterable[str]) -> list[str]:
    """Numbers by size, names by the alphabet."""
    if all(map(is_number, labels)):
        return sorted(labels, key=float)
    return sorted(labels)


def _refuse_words(written: dict[str, pa.Array], wrong: set[str], column: str) -> None:
    for split, values in written.items() if wrong else ():
        row, word = next(((row, word) for row, word in enumerate(values.to_pylist()) if word in wrong), (-1, ""))
        if row >= 0:
            raise UserError(
                f"row {row} of {split}: {word!r} in column {column!r} is no finite number: correct it, or pass --task "
                "classification"
            )


def _check_classes(counts: Counts, names: list[str], column: str, chosen: bool) -> None:
    """Refuses labels that are not among those which the files declare, and what cannot be a column of classes."""
    for split, found in counts.items():
        if unknown := sorted(found.keys() - set(names)):
            raise UserError(
                f"label {unknown[0]!r} of {split} ({_rows(found[unknown[0]])}) is not among the classes of column "
                f"{column!r}, {some(names)}: correct or remove it"
            )
    train = counts.get("train", Counter())
    if not chosen and train.total() >= FEW_ROWS and len(train) > train.total() / 2:
        raise UserError(
            f"column {column!r} has {len(train)} different values in {_rows(train.total())} of train: if it holds "
            "the labels, pass --task classification or --task regression"
        )


def _never_trained(counts: Counts, column: str) -> list[str]:
    """A note on each label that only other splits have. A split that shares no label with train is refused."""
    train, notes = counts.get("train"), []
    for split, found in counts.items() if train else ():
        missing = sorted(found.keys() - set(train or ()))
        if missing and len(missing) == len(found):
            raise UserError(
                f"no label of {split} ({some(missing)}) occurs in train ({some(_in_order(train or ()))}): give both "
                f"the same labels in column {column!r}"
            )
        notes += [
            f"label {name!r} ({_rows(found[name])} of {split}) never occurs in train: a class without training rows"
            for name in missing
        ]
    return notes


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


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"
