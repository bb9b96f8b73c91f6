"""The rows of text datasets: texts or words, labels of any type of task, and outputs of a teacher."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kd.common.data.label_names import Ids, map_label_ids
from kd.common.data.label_sets import is_list, map_label_sets
from kd.common.data.sources import labelled
from kd.common.data.teacher_columns import TeacherColumns
from kd.common.training.inference import column_array
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import TaskType
from kd.nlp.data.columns import FLAGS, Columns
from kd.nlp.data.tags import list_array, map_tags

# Texts that consist of digits may be stored as integers, and an empty column as null.
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)


def map_labels(task: TaskType, name: str, values: Ids, data_names: list[str], names: list[str]) -> Ids:
    """The labels of all splits by `names`, those of a model, instead of `data_names`."""
    if task == "regression":
        return values
    maps = {"multi_label": map_label_sets, "token_classification": map_tags}
    return maps.get(task, map_label_ids)(name, values, data_names, names)


def label_array(rows: Dataset, task: TaskType, column: str = "label") -> np.ndarray:
    """The labels of rows: (rows,), (rows, labels) for multi_label, or an array of lists for token_classification."""
    if task != "token_classification":
        return column_array(rows, column)
    return list_array(rows[column][:])


def strata(rows: Dataset) -> np.ndarray:
    """The labels by which rows are sampled; rows of words are sampled at random."""
    return np.zeros(len(rows)) if is_list(rows.features["text"]) else column_array(rows, "label")


def to_column(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist() if values.dtype == object or values.ndim > 1 else values)


def select_rows(split: str, raw: Dataset, columns: Columns, rows: np.ndarray, labels: np.ndarray) -> Dataset:
    """The columns text, text_pair (if there are two text columns), label and row of some rows.

    Raises UserError for a row with a label and without a text.
    """
    found: dict[str, pa.Array] = {}
    for new, name in zip(("text", "text_pair"), columns.text, strict=False):
        if name not in raw.features:
            raise UserError(
                f"the {split} split lacks the column {name!r} of train: its columns are {raw.column_names}"
            )
        texts = raw.select_columns([name]).with_format("arrow")[:][name]
        if labels.dtype == object:  # lists of words
            found[new] = texts.take(pa.array(rows))
            continue
        if not any(matches(texts.type) for matches in TEXT_TYPES):
            raise UserError(f"column {name!r} of the {split} split contains {texts.type}, not texts: {FLAGS}")
        texts = texts.cast(pa.large_string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy()
        if (empty := rows[blank[rows] & labelled(labels)]).size:
            raise UserError(f"row {empty[0]} of {split}: no text in column {name!r}; remove the row or fill it in")
        found[new] = pc.fill_null(texts.take(pa.array(rows)), "")
    text: Any = datasets.Value("string")
    label: Any = datasets.Value("int64" if labels.dtype == object else str(labels.dtype))
    kinds = {name: datasets.List(text) if labels.dtype == object else text for name in found}
    kinds["label"] = datasets.List(label) if labels.dtype == object or labels.ndim > 1 else label
    kinds["row"] = datasets.Value("int64")
    table = pa.table({**found, "label": to_column(labels), "row": rows})
    return Dataset(table.cast(datasets.Features(kinds).arrow_schema))


def with_teacher(rows: Dataset, teacher: TeacherColumns, split: str, chosen: np.ndarray) -> Dataset:
    """Adds the column `teacher` (classes,), with NaN in rows without an output, to a split that has outputs."""
    if split not in teacher.logits:
        return rows
    logits = teacher.logits[split][chosen]
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    table = rows.with_format("arrow")[:].append_column("teacher", column)
    features = rows.features | {"teacher": datasets.List(datasets.Value("float32"), logits.shape[1])}
    return Dataset(table.cast(datasets.Features(features).arrow_schema))


def without_empty(rows: Dataset, notes: list[str]) -> Dataset:
    """Leaves out the rows of train that have no label, and no text or no output of the teacher either."""
    empty = np.zeros(len(rows), dtype=bool)
    if is_list(rows.features["text"]):
        return rows  # rows without words are left out before
    for name in ("text", "text_pair"):  # a row with a label has a text
        if name in rows.features:
            texts = rows.with_format("arrow")[:][name]
            empty |= pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy()
    if empty.any():
        notes.append(f"rows of train with neither a label nor a text, left out: {empty.sum():,}")
    if "teacher" in rows.features:
        no_output = np.isnan(column_array(rows, "teacher")).any(axis=1)
        useless = no_output & ~labelled(column_array(rows, "label")) & ~empty
        if useless.any():
            notes.append(f"rows of train with neither a label nor an output, left out: {useless.sum():,}")
        empty |= useless
    if not empty.any():
        return rows
    return rows.select(np.flatnonzero(~empty)).flatten_indices()
