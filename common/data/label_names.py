"""Names of classes: numbers as names, their order, and the matching of the names of data and model."""

import math
import re
from collections.abc import Collection

import numpy as np

from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED

Ids = dict[str, np.ndarray]  # class ids (rows,) by split

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LEADING_ZERO = re.compile(r"[+-]?0\d")
SEPARATORS = re.compile(r"[\s_-]+")
MAX_NAMES = 5  # names listed in a message


def is_number(string: str) -> bool:
    """Whether a string is a finite decimal number. A code such as `007` is not a number."""
    return NUMBER.fullmatch(string) is not None and not LEADING_ZERO.match(string) and math.isfinite(float(string))


def sort_labels(labels: Collection[str]) -> list[str]:
    """Sorts numbers by value (2 before 10, also when written as 02), then names alphabetically."""
    return sorted(labels, key=lambda label: (float(label) if NUMBER.fullmatch(label) else math.inf, label))


def shorten_list(names: Collection[str]) -> str:
    """The first names, for a message."""
    return ", ".join(list(names)[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def count_rows(number: int) -> str:
    """`1 row`, or `1,234 rows`."""
    return f"{number:,} row{'' if number == 1 else 's'}"


def match_names(names: list[str], others: list[str]) -> list[int]:
    """For each of `names` its index in `others`, or -1. Names that are not equal match if only their case, or case and
    spaces, underscores and hyphens, differ; but only while no two names of a list become equal.
    """
    found = [-1] * len(names)
    for key in (str, str.casefold, _without_separators):
        keys, other_keys = list(map(key, names)), list(map(key, others))
        if len({*keys}) == len(keys) and len({*other_keys}) == len(other_keys):
            places = {name: i for i, name in enumerate(other_keys)}
            found = [places.get(name, -1) if before < 0 else before for name, before in zip(keys, found, strict=True)]
    return found


def _without_separators(name: str) -> str:
    return SEPARATORS.sub(" ", name).strip().casefold()


def map_label_ids(dataset: str, ids: Ids, data_names: list[str], names: list[str]) -> Ids:
    """Maps class ids by `data_names` to ids by `names`, the classes of a model, which may have more. IGNORED stays.

    Names are matched by `match_names`. Raises UserError for a label that `names` lacks.
    """
    table = np.array([*match_names(data_names, names), IGNORED])  # the last entry is that of IGNORED
    places = {split: np.where(labels == IGNORED, len(data_names), labels) for split, labels in ids.items()}
    for split, labels in places.items():
        if (unknown := labels[table[labels] == -1]).size:
            label, rows = data_names[unknown[0]], count_rows(int((labels == unknown[0]).sum()))
            raise UserError(
                f"{dataset} has the label {label!r} ({rows} of {split}), which is not among {shorten_list(names)}: "
                "rename or remove it, or name another column with --label_column"
            )
    return {split: table[labels] for split, labels in places.items()}
