"""Several labels per row, for multi-label classification: the layouts of the columns, and their labels as 0 and 1.

A column of lists (names, ids, or 0 and 1 for each label), a column of names with a separator between them, or one
column of 0 and 1 for each label. All layouts become a column of lists of names first.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from kd.common.data.label_columns import NO_LABEL, Counts
from kd.common.data.label_names import Ids, map_label_ids, shorten_list
from kd.common.data.labels import Labels, check_classes, check_unlabelled, class_names
from kd.common.data.sources import Splits
from kd.common.utils.errors import UserError

LISTS = datasets.List | datasets.LargeList
FLAGS_OF_ROWS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}  # in lower case
Names = list[list[str] | None]  # the labels of each row; None: unlabelled


def is_list(feature: object) -> bool:
    """Whether a column holds a list of values per row."""
    return isinstance(feature, LISTS)


def read_label_sets(raw: Splits, column: str, known: list[str] | None = None, keep_unlabelled: bool = False) -> Labels:
    """Reads the labels of all splits from a column of lists. Values are (rows, labels) float32 of 0 and 1, NaN in rows
    without a list. An empty list means that none of the labels applies.

    Args:
        known: names of the labels of the model that is evaluated.
        keep_unlabelled: whether rows of train without a list are used.

    Raises UserError for values that are no labels, and if train or validation has no labels.
    """
    declared = [names for rows in raw.values() if (names := declared_names(rows.features.get(column)))]
    found = {split: _names_of_rows(split, rows, column) for split, rows in raw.items()}
    occurring = {name for rows in found.values() for names in rows for name in names or ()}
    names = class_names(declared, occurring)
    if not occurring:
        raise UserError(f"column {column!r} holds no labels")
    counts = {split: Counter(name for row in rows for name in row or ()) for split, rows in found.items()}
    filled: Counts = {split: Counter(rows=sum(row is not None for row in rows)) for split, rows in found.items()}
    notes = check_unlabelled(raw, {split: +count for split, count in filled.items()}, column, keep_unlabelled)
    notes += check_classes({split: count for split, count in counts.items() if count}, names, column, known)
    places, rows, values = {name: i for i, name in enumerate(names)}, {}, {}
    for split, lists in found.items():
        used = [i for i, row in enumerate(lists) if row is not None or (keep_unlabelled and split == "train")]
        if used:
            rows[split] = np.array(used)
            values[split] = np.stack([_zeros_and_ones(lists[i], places) for i in used])
    notes += [
        f"{int((marks.sum(axis=1) == 0).sum()):,} of {len(marks):,} rows of {split} have none of the labels"
        for split, marks in values.items()
        if (marks.sum(axis=1) == 0).any()
    ]
    return Labels(names, rows, values, [_summary(names, values), *notes])


def map_label_sets(dataset: str, values: Ids, data_names: list[str], names: list[str]) -> Ids:
    """Labels (rows, labels) of 0 and 1 by `names` instead of `data_names`; see `map_label_ids`."""
    occurring = {split: np.nonzero(marks == 1)[1] for split, marks in values.items()}
    places, mapped = map_label_ids(dataset, occurring, data_names, names), {}
    for split, marks in values.items():
        mapped[split] = np.zeros((len(marks), len(names)), dtype=marks.dtype)
        mapped[split][:, places[split]] = marks[:, occurring[split]]
        mapped[split][np.isnan(marks).any(axis=1)] = np.nan
    return mapped


def _summary(names: list[str], values: dict[str, np.ndarray]) -> str:
    mean = np.nanmean(np.concatenate(list(values.values())).sum(axis=1))
    return f"labels: any of {len(names)} per row ({shorten_list(names)}), {mean:.3g} on average"


def _zeros_and_ones(names: list[str] | None, places: dict[str, int]) -> np.ndarray:
    row = np.full(len(places), np.nan if names is None else 0.0, dtype=np.float32)
    row[[places[name] for name in names or ()]] = 1.0
    return row


# ---- columns of lists ----


def declared_names(feature: Any) -> list[str]:
    """The names that a column of lists of ids declares; none for another column."""
    inner = feature.feature if is_list(feature) else None
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else []


def _names_of_rows(split: str, rows: datasets.Dataset, column: str) -> Names:
    feature: Any = rows.features.get(column)
    if feature is None:
        return [None] * len(rows)
    if not is_list(feature) or is_list(feature.feature):
        raise UserError(f"column {column!r} of the {split} split holds {feature}, not lists of labels")
    lists, names = rows[column][:], declared_names(feature)
    if _has_marks(lists):
        lists = [None if row is None else [i for i, mark in enumerate(row) if mark] for row in lists]
    try:
        return [None if row is None else [names[value] if names else _name(value) for value in row] for row in lists]
    except (TypeError, IndexError, AttributeError):
        raise UserError(
            f"column {column!r} of the {split} split has a list with a value that is no label (a name, or a number)"
        ) from None


def _name(value: Any) -> str:
    """The name of a label; whole numbers have no decimal point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value.__index__())


def _has_marks(lists: list[Any]) -> bool:
    """Whether the lists hold 0 or 1 for each label: they are equally long, and some repeat a number, as ids do not."""
    filled = [row for row in lists if row is not None]
    if len({len(row) for row in filled}) != 1 or any(value not in (0, 1) for row in filled for value in row):
        return False
    return any(len(set(row)) < len(row) for row in filled)


# ---- other layouts, as a column of lists ----


def split_names(raw: Splits, column: str, separator: str) -> Splits:
    """The splits with a column of names, with a separator between them, as lists. Raises UserError for other columns.

    A missing value is no label; an empty string means that none of the labels applies.
    """
    splits, separated = {}, False
    for split, rows in raw.items():
        if column in rows.features:
            if not isinstance(rows.features[column], datasets.Value):
                raise UserError(f"column {column!r} holds lists: leave out --label_separator")
            strings = [None if value is None else str(value) for value in rows[column][:]]
            separated |= any(separator in value for value in strings if value is not None)
            rows = _with_lists(rows, (column,), column, [_parts(value, separator) for value in strings])
        splits[split] = rows
    if not separated:
        raise UserError(f"--label_separator {separator!r} does not occur in column {column!r}")
    return splits


def _parts(value: str | None, separator: str) -> list[str] | None:
    if value is None or (value.strip().lower() in NO_LABEL and value.strip()):
        return None
    return [part.strip() for part in value.split(separator) if part.strip()]


def mark_columns(raw: Splits) -> list[str]:
    """The columns of 0 and 1 (or false and true) in the first split."""
    rows = next(iter(raw.values()))
    scalar = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Value)]
    return [name for name in scalar if {_mark(v) for v in rows.unique(name)} in ({False, True}, {False, True, None})]


def join_marks(raw: Splits, columns: Sequence[str]) -> tuple[Splits, str]:
    """The splits with one column of lists in place of several columns of 0 and 1, and the name of that column.

    A row with a value -1 or without a value is unlabelled. Raises UserError for any other value.
    """
    joined, splits = " + ".join(columns), {}
    for split, rows in raw.items():
        present = [name for name in columns if name in rows.features]
        if present and len(present) < len(columns):
            missing = next(name for name in columns if name not in rows.features)
            raise UserError(f"the {split} split lacks the label column {missing!r}")
        if present:
            marks = [_marks(split, rows, name) for name in columns]
            lists = [
                None if None in row else [name for name, mark in zip(columns, row, strict=True) if mark]
                for row in zip(*marks, strict=True)
            ]
            rows = _with_lists(rows, columns, joined, lists)
        splits[split] = rows
    return splits, joined


def _marks(split: str, rows: datasets.Dataset, column: str) -> list[bool | None]:
    values = rows[column][:]
    for place, value in enumerate(values):
        if _mark(value) is None and str(value).strip().lower() not in {*NO_LABEL, "none", "-1", "-1.0"}:
            raise UserError(
                f"row {place} of {split}: {value!r} in the label column {column!r} is neither 0 nor 1 (several label "
                "columns hold 0 and 1)"
            )
    return [_mark(value) for value in values]


def _mark(value: Any) -> bool | None:
    return FLAGS_OF_ROWS.get(str(value).strip().lower())


def _with_lists(rows: datasets.Dataset, columns: Sequence[str], name: str, lists: Names) -> datasets.Dataset:
    table = rows.remove_columns(list(columns)).with_format("arrow")[:]
    return datasets.Dataset(table.append_column(name, pa.array(lists, pa.list_(pa.string()))))
