"""A teacher that is only outputs: its predictions in columns of a dataset, as an API or a language model left them.

The columns have one of these forms. Text in the form of JSON or of Python literals is parsed, since CSV files hold it.

- a number for each class: columns that are named after the classes, with any common beginning and end (`p_*`);
- a list of numbers, in the order of the classes;
- names and numbers of all or some classes: `{"joy": 0.9}`, `[{"label": "joy", "score": 0.9}]`, or two columns
  `["joy"]` and `[0.9]`, or `joy` and `0.9`;
- the name of a class: a hard label;
- for regression, a number.

The result is logits, which a temperature T divides. Logits are used as they are. Probabilities p become log p: then
softmax(log p / T) is p^(1/T), normalized, and a class of probability 0 keeps it at every temperature. So does a hard
label, which is one-hot. If only the largest probabilities are listed (top-k), the missing mass, 1 minus their sum, is
divided equally among the classes that are not listed. A temperature raises these as it does all small probabilities,
so use a low one with many classes and a small k.
"""

import fnmatch
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kd.common.data.label_names import count_rows, is_number, match_names, shorten_list
from kd.common.data.sources import Splits
from kd.common.data.teacher_rows import FLAG, Row, parse_rows
from kd.common.losses.shared import LOG_ZERO
from kd.common.utils.errors import UserError

Values = Literal["probabilities", "percentages", "log_probabilities", "logits"]
TOLERANCE = 0.02  # deviation of a sum of rounded probabilities from 1


@dataclass(frozen=True)
class TeacherColumns:
    """logits: by split, (rows, classes) float32, or (rows, 1) for regression; NaN in a row without an output.
    description: what the outputs are.
    complete: whether each output has a logit, or a probability above zero, for every class.
    notes: what was inferred, and rows without an output.
    """

    logits: dict[str, np.ndarray]
    description: str
    complete: bool
    notes: list[str]


def read_teacher_columns(
    raw: Splits, columns: list[str], classes: list[str], values: Values | None = None, order: list[str] | None = None
) -> TeacherColumns:
    """Reads the outputs of a teacher from all splits that have the columns.

    Args:
        columns: see `expand_columns`.
        classes: class names by id; empty for regression.
        values: what the numbers are; otherwise inferred.
        order: the class names in the order of lists of numbers, and of numbers as hard labels, if it is known.

    Raises UserError if the columns are missing, ambiguous, or do not fit the classes.
    """
    names = expand_columns(raw, columns)
    found = {split: rows for split, rows in raw.items() if set(names) <= set(rows.column_names)}
    if "train" not in found:
        raise UserError(f"train lacks the columns {', '.join(names)} of {FLAG}: its outputs are to be distilled")
    parsed = {split: parse_rows(split, rows, names, classes) for split, rows in found.items()}
    shown = f"column{'s' * (len(names) > 1)} {shorten_list([repr(name) for name in names])}"
    kinds = {type(row) for rows in parsed.values() for row in rows if row is not None}
    if not kinds:
        raise UserError(f"{shown} of {FLAG} are empty: name other columns")
    if len(kinds) > 1:
        raise UserError(f"{shown} of {FLAG} hold outputs of different forms: use one form for all rows")
    notes: list[str] = []
    if not classes:
        return _scores(parsed, shown)
    if kinds == {str}:
        logits = _hard_labels(parsed, classes, order, notes)
        description, complete = "hard labels", False
    else:
        numbers = {split: _by_class(split, rows, classes, order) for split, rows in parsed.items()}
        values = values or _infer_values(numbers, shown)
        logits = {split: _as_logits(split, matrix, values, notes) for split, matrix in numbers.items()}
        partial = any(np.isnan(matrix[_filled(matrix)]).any() for matrix in numbers.values())
        description = f"{'top-k ' if partial else ''}{values.replace('_', '-')}"
        complete = all((matrix[_filled(matrix)] > LOG_ZERO).all() for matrix in logits.values())
    description = f"{shown} as {description}"
    for split, matrix in logits.items():
        if missing := int((~_filled(matrix)).sum()):
            notes.append(f"{missing:,} of {count_rows(len(matrix))} of {split} have no output of the teacher")
    return TeacherColumns(logits, description, complete, [f"teacher: {description}", *notes])


def _filled(matrix: np.ndarray) -> np.ndarray:
    """Mask of the rows with an output."""
    return ~np.isnan(matrix).all(axis=1)


def expand_columns(raw: Splits, columns: list[str]) -> list[str]:
    """The names of columns that are named, or match patterns such as `p_*`. Raises UserError for an unknown one."""
    known = list(dict.fromkeys(name for rows in raw.values() for name in rows.column_names))
    names: list[str] = []
    for column in columns:
        matching = [column] if column in known else fnmatch.filter(known, column)
        if not matching:
            raise UserError(f"no column {column!r} for {FLAG}: the columns are {', '.join(known)}")
        names += [name for name in matching if name not in names]
    return names


def _scores(parsed: dict[str, list[Row]], shown: str) -> TeacherColumns:
    """The predictions of a regression."""
    logits = {}
    for split, rows in parsed.items():
        for number, row in enumerate(rows):
            if row is not None and not (isinstance(row, str) and is_number(row)):
                raise UserError(f"row {number} of {split}: {row!r} in {shown} of {FLAG} is no number: correct it")
        logits[split] = np.array([[math.nan if row is None else float(row)] for row in rows], np.float32)  # type: ignore[arg-type]
    return TeacherColumns(logits, f"{shown} as scores", True, [f"teacher: {shown} as scores"])


def _hard_labels(
    parsed: dict[str, list[Row]], classes: list[str], order: list[str] | None, notes: list[str]
) -> dict[str, np.ndarray]:
    """One-hot outputs. Another answer than a class is no output, and is noted."""
    answers = list(dict.fromkeys(str(row) for rows in parsed.values() for row in rows if row is not None))
    table = {answer: match_names([answer], classes)[0] for answer in answers}  # alone: a class may have two spellings
    if set(table.values()) == {-1} and all(map(is_number, answers)):
        ids = _ids_in_order(f"the hard labels of {FLAG} are numbers ({shorten_list(answers)})", classes, order)
        by_number = {float(number): place for number, place in enumerate(ids)}
        table = {answer: by_number.get(float(answer), -1) for answer in answers}
    unknown = [answer for answer, place in table.items() if place < 0]
    if len(unknown) == len(answers):
        raise UserError(
            f"no hard label of {FLAG} ({shorten_list(answers)}) is among the classes, {shorten_list(classes)}: name "
            "another column"
        )
    if unknown:
        rows = sum(str(row) in set(unknown) for found in parsed.values() for row in found if row is not None)
        notes.append(f"{count_rows(rows)} with an answer that is no class have no output: {shorten_list(unknown)}")
    logits = {}
    for split, found in parsed.items():
        places = np.array([-1 if row is None else table[str(row)] for row in found])
        one_hot = np.where(places[:, None] == np.arange(len(classes)), 0.0, LOG_ZERO)
        logits[split] = np.where(places[:, None] < 0, math.nan, one_hot).astype(np.float32)
    return logits


def _ids_in_order(what: str, classes: list[str], order: list[str] | None) -> list[int]:
    """The class ids of numbers in the order of the class names `order`. Raises UserError if that is unknown."""
    if order is None:
        raise UserError(
            f"{what}, and do not name the classes: pass --trust_label_order if they are in the order "
            f"{shorten_list(classes)}, or --label_names with their order"
        )
    ids = match_names(order, classes)
    if sorted(ids) != list(range(len(classes))):
        raise UserError(f"--label_names are not the {len(classes)} classes, {shorten_list(classes)}: correct them")
    return ids


def _by_class(split: str, rows: list[Row], classes: list[str], order: list[str] | None) -> np.ndarray:
    """Numbers (rows, classes), NaN for a class that is not listed."""
    matrix = np.full((len(rows), len(classes)), math.nan)
    places: dict[str, int] = {}
    ids: list[int] = []
    for number, row in enumerate(rows):
        if isinstance(row, list):
            if len(row) != len(classes):
                raise UserError(
                    f"row {number} of {split}: {len(row)} numbers in the column of {FLAG} for {len(classes)} classes"
                )
            ids = ids or _ids_in_order(f"the lists of {FLAG} hold numbers", classes, order)
            matrix[number, ids] = row
        elif isinstance(row, dict):
            _place(split, number, row, classes, places)
            for name, value in row.items():
                matrix[number, places[name]] = value
    if not np.isfinite(matrix[~np.isnan(matrix)]).all():
        raise UserError(f"{split} has an infinite number in the columns of {FLAG}: correct it")
    return matrix


def _place(split: str, number: int, row: Collection[str], classes: list[str], places: dict[str, int]) -> None:
    for name in row:
        if name not in places:
            places[name] = match_names([name], classes)[0]
        if places[name] < 0:
            raise UserError(
                f"row {number} of {split}: {name!r} in {FLAG} is not among the classes {shorten_list(classes)}: "
                "rename or remove it"
            )


def _infer_values(numbers: dict[str, np.ndarray], shown: str) -> Values:
    matrix = np.concatenate([one[_filled(one)] for one in numbers.values()])
    partial = bool(np.isnan(matrix).any())
    sums = np.nansum(matrix, axis=1)
    smallest, largest = np.nanmin(matrix), np.nanmax(matrix)
    if smallest >= 0 and (sums <= 1 + TOLERANCE).all() and (partial or (sums >= 1 - TOLERANCE).all()):
        return "probabilities"
    if smallest >= 0 and not partial and (abs(sums - 100) <= 100 * TOLERANCE).all():
        return "percentages"
    if largest <= 0 and (np.nansum(np.exp(matrix), axis=1) <= 1 + TOLERANCE).all() and partial:
        return "log_probabilities"
    if smallest < 0 and not partial:
        return "logits"
    raise UserError(
        f"{shown} of {FLAG} hold numbers from {smallest:g} to {largest:g} with sums from {sums.min():g} to "
        f"{sums.max():g}: pass --teacher_values probabilities, percentages, log_probabilities or logits"
    )


def _as_logits(split: str, matrix: np.ndarray, values: Values, notes: list[str]) -> np.ndarray:
    filled = _filled(matrix)
    missing = np.isnan(matrix) & filled[:, None]
    if values == "logits" or (values == "log_probabilities" and not missing.any()):
        if missing.any():
            row = int(np.flatnonzero(missing.any(axis=1))[0])
            raise UserError(
                f"row {row} of {split}: {FLAG} lacks the logits of some classes: pass all, or probabilities"
            )
        return matrix.astype(np.float32)
    probabilities = (
        np.exp(matrix) if values == "log_probabilities" else matrix / (100 if values == "percentages" else 1)
    )
    if (wrong := np.flatnonzero((probabilities < 0).any(axis=1))).size:
        raise UserError(
            f"row {wrong[0]} of {split}: a probability of {FLAG} is negative: pass --teacher_values logits"
        )
    sums = np.nansum(probabilities, axis=1)
    if (empty := np.flatnonzero(filled & (sums == 0) & ~missing.any(axis=1))).size:
        raise UserError(f"row {empty[0]} of {split}: all probabilities of {FLAG} are 0: correct it, or leave it empty")
    rest = np.clip(1 - sums, 0, None) / np.maximum(missing.sum(axis=1), 1)
    probabilities = np.where(missing, rest[:, None], probabilities)
    total = probabilities.sum(axis=1, keepdims=True)
    if (far := int((abs(total[filled] - 1) > TOLERANCE).sum())) > 0:
        notes.append(f"the probabilities of {count_rows(far)} of {split} do not add up to 1 and are scaled")
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities / total)
    return np.where(np.isneginf(logits), LOG_ZERO, logits).astype(np.float32)
