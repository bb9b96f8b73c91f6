"""Which columns hold texts and labels, and what the labels are called."""

from dataclasses import dataclass

import datasets

from common.utils.errors import UserError
from nlp.data.tasks import TASKS, Task

LABEL_COLUMNS = ("label", "labels", "intent", "target", "class")
FLAGS = "name them with --text_columns and --label_column"


@dataclass(frozen=True)
class Columns:
    text: tuple[str, ...]
    label: str


def is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def is_float(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("float", "double"))


def _is_label(feature: object) -> bool:
    """True for what can only be a label: a class, a number or a truth value."""
    numeric = isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "float", "double", "bool")
    )
    return isinstance(feature, datasets.ClassLabel) or numeric


def choose_columns(features: datasets.Features, text: list[str] | None, label: str | None) -> Columns:
    """The columns named by flags, else those of a known task, else a guess where only one is possible."""
    listed = ", ".join(features)
    for name in [*(text or []), *([label] if label else [])]:
        if name not in features:
            raise UserError(f"no column {name!r}: the columns are {listed}; {FLAGS}")
    if not text and not label and (known := _known_columns(features)):
        return known
    label = label or _guess_label(features, text or [])
    text = text or [name for name, feature in features.items() if is_text(feature) and name != label]
    if label is None or not 1 <= len(text) <= 2:
        raise UserError(f"cannot tell the one or two text columns and the label column among {listed}: {FLAGS}")
    for name in text:
        if not is_text(features[name]) or name == label:
            raise UserError(
                f"column {name!r} does not hold texts (or is the label); the columns are {listed}; {FLAGS}"
            )
    if not (is_text(features[label]) or _is_label(features[label])):
        raise UserError(f"column {label!r} holds no labels (names, numbers); the columns are {listed}; {FLAGS}")
    return Columns(tuple(text), label)


def _known_columns(features: datasets.Features) -> Columns | None:
    """The columns of the known task that uses most of them."""
    rows = [Columns(task.text_columns, task.label_column) for task in TASKS.values()]
    fitting = [
        row
        for row in rows
        if features.keys() >= {*row.text, row.label} and all(is_text(features[t]) for t in row.text)
    ]
    return max(fitting, key=lambda row: len(row.text), default=None)


def _guess_label(features: datasets.Features, text: list[str]) -> str | None:
    rest = {name: feature for name, feature in features.items() if name not in text}
    named = [name for name in rest if name in LABEL_COLUMNS]
    candidates = named or [name for name, feature in rest.items() if _is_label(feature)]
    return candidates[0] if len(candidates) == 1 else None


def recognise(columns: Columns, label_names: list[str], regression: bool) -> Task | None:
    """The known task with these text columns and these label names: CoLA and SST-2 differ in nothing else."""
    for task in TASKS.values():
        same_labels = regression or set(task.label_names) == set(label_names)
        if task.text_columns == columns.text and task.regression == regression and same_labels:
            return task
    return None


def class_names(rows: datasets.Dataset, column: str) -> list[str | None]:
    """The label of every row as a name; None where there is none (-1 or null)."""
    feature = rows.features[column]
    values = rows.select_columns([column])[:][column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value in (None, -1) else feature.names[value] for value in values]
    return [None if value in (None, -1) else str(value) for value in values]


def scheme(train: datasets.Dataset, column: str) -> list[str]:
    """The label names in the order of their ids."""
    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    names = sorted({name for name in class_names(train, column) if name is not None})
    if feature.dtype.startswith(("int", "uint")):
        count = len(names)
        if set(names) != {str(number) for number in range(count)}:
            raise UserError(
                f"integer labels in column {column!r} must be 0 to n-1 without gaps: renumber, or use names"
            )
        return [str(number) for number in range(count)]
    return names
