"""Labels as class ids: by the names of their classes, whatever a column holds, and alike in every split."""

import math
from collections.abc import Collection
from typing import Any

import datasets
import torch
from torch import Tensor

from common.sources import Splits
from common.utils.errors import UserError

KINDS = ("int", "uint", "float", "double", "bool", "string", "large_string", "null")
SHOWN = 3  # names in a message


def class_ids(
    raw: Splits, column: str, notes: list[str], train_only: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Labels (rows,) int64 by split, -1 where there is none, and the names of the classes by id.

    The names are those of train's ClassLabel in its order, or else train's labels themselves, sorted, so that whole
    numbers from 0 without gaps stay what they are. A class that no image of train has is a UserError or, unless
    `train_only`, comes after those of train.
    """
    kind = raw["train"].features[column] if "train" in raw else None
    numbered = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    named = {split: _names(split, rows, column, numbered) for split, rows in raw.items()}
    known = {name for name in named.get("train", []) if name is not None}
    names = numbered or sorted_names(known)
    if numbered is None and _renumbered(names):
        notes.append(f"labels {some(names)} of column {column!r} are the classes 0 to {len(names) - 1}")
    if not train_only:
        known = {name for of_split in named.values() for name in of_split if name is not None}
        names = names + sorted_names(known - set(names))
    return {split: _ids(split, of_split, names, known) for split, of_split in named.items()}, names


def column_values(rows: datasets.Dataset, column: str) -> list[Any]:
    return rows.select_columns([column])[:][column]  # the column alone: all of them would decode every picture


def without_label(value: Any) -> bool:
    """Null, NaN, -1 or an empty text."""
    return value is None or value == -1 or value != value or (isinstance(value, str) and not value.strip())


def holds_labels(kind: object) -> bool:
    return isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and kind.dtype.startswith(KINDS))


def sorted_names(names: Collection[str]) -> list[str]:
    """Whole numbers first and by their value, 2 before 10; then other names."""
    return sorted(names, key=lambda name: (_number(name) is None, _number(name) or 0, name))


def some(names: Collection[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _number(name: str) -> int | None:
    return int(name) if name.isdecimal() and len(name) < 100 else None


def _renumbered(names: list[str]) -> bool:
    """Whether class ids differ from the numbers that the labels are."""
    return all(_number(name) is not None for name in names) and names != [str(i) for i in range(len(names))]


def _names(split: str, rows: datasets.Dataset, column: str, numbered: list[str] | None) -> list[str | None]:
    """The class of each row; `numbered` are the names that whole numbers stand for, where they stand for any."""
    kind = rows.features[column]
    if isinstance(kind, datasets.ClassLabel):
        numbered = list(kind.names)
    names: list[str | None] = []
    for row, value in enumerate(column_values(rows, column)):
        try:
            names.append(None if without_label(value) else _name(value, numbered))
        except ValueError as error:
            raise UserError(f"row {row} of {split}{error}") from None
    return names


def _name(value: Any, numbered: list[str] | None) -> str:
    if isinstance(value, str | bool):
        return str(value)
    if value < 0 or not math.isfinite(value) or value != int(value):
        raise ValueError(f": {value!r} is no class; labels are names or whole numbers from 0 (-1 is no label)")
    if numbered is None:
        return str(int(value))
    if value >= len(numbered):
        raise ValueError(f" has label {int(value)}, but labels are 0 to {len(numbered) - 1}: correct it or its names")
    return numbered[int(value)]


def _ids(split: str, named: list[str | None], names: list[str], known: set[str]) -> Tensor:
    ids: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(names) if name in known}}
    for row, name in enumerate(named):
        if name not in ids:
            raise UserError(
                f"row {row} of {split} has label {name!r}, but no image of train has it: remove the images of that "
                "class or add some to train"
            )
    return torch.tensor([ids[name] for name in named], dtype=torch.long)
