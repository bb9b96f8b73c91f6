"""Loads text datasets - embedded, known by name, local, or on the Hub - with the same columns."""

import inspect
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk
from datasets.fingerprint import get_temporary_cache_files_directory
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.labels import Kind, map_label_ids, read_labels
from kd.common.data.sources import Splits, read_splits, short_name, with_validation
from kd.common.utils.errors import UserError
from kd.nlp.data.columns import FLAGS, TASKS, Columns, choose_columns, recognise
from kd.nlp.data.intents import load_intents

KNOWN = {name: task.hub or load_intents for name, task in TASKS.items()}
# Texts of digits alone may have been written as whole numbers, and a column of nothing as null.
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)


@dataclass(frozen=True)
class TextData:
    """Every split has the columns text, text_pair (for tasks with pairs), label (class id or float) and sample_id."""

    name: str
    splits: Splits
    label_names: list[str]  # by class id; empty for regression
    regression: bool
    primary_metric: str
    fingerprint: str  # of the contents, the same wherever they were loaded from
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

    @property
    def num_labels(self) -> int:
        return 1 if self.regression else len(self.label_names)


def load_text_data(
    dataset: str,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    task: Kind | None = None,
    known_labels: list[str] | None = None,
    needs_train: bool = True,
) -> TextData:
    """Loads `dataset`, a name in TASKS, a folder or file, or owner/name[:config]. Rows without a label are left out. A
    missing validation split is set aside from train, the same each time. The notes report it, and what was inferred.

    Args:
        task: decides where labels could be classes as well as scores.
        known_labels: the labels, by id, of a saved classifier that is to be evaluated.
        needs_train: whether a missing train split is an error.

    Raises UserError where there is no such dataset, column, text or label.
    """
    raw, notes = read_splits(dataset, KNOWN, needs_train=needs_train)
    if dataset in TASKS:
        task = "regression" if TASKS[dataset].regression else "classification"
        raw = {split: rows for split, rows in raw.items() if split != "test" or TASKS[dataset].labelled_test}
    columns, chosen = choose_columns(raw, text_columns, label_column)
    try:
        labels = read_labels(raw, columns.label, task, known_labels)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    name, regression = dataset if dataset in TASKS else short_name(dataset), not labels.names
    if regression and known_labels:
        raise UserError(f"{name} has scores, not classes: its labels have no order of names")
    known_task = recognise(columns, known_labels or labels.names, regression)
    # F1 is that of class 1, so the label order of a known task also applies to a CSV file.
    names = known_labels or (list(known_task.label_names) if known_task else []) or labels.names
    ids = labels.values if regression else map_label_ids(name, labels.values, labels.names, names)
    notes += [chosen, *labels.notes]
    splits = {split: _rows(split, raw[split], columns, rows, ids[split]) for split, rows in labels.rows.items()}
    splits = with_validation(splits, labels.values.get("train", np.empty(0)), notes)
    splits = {split: rows.add_column("sample_id", list(range(len(rows)))) for split, rows in splits.items()}
    return TextData(
        name=name,
        splits=splits,
        label_names=names,
        regression=regression,
        primary_metric=known_task.metric if known_task else "spearman" if regression else "accuracy",
        fingerprint=_fingerprint(splits, names),
        notes=notes,
    )


def with_label_order(data: TextData, names: list[str]) -> TextData:
    """The same rows with label ids that are places in `names`, as a model's `id2label` has them. Names are compared
    without regard to case where that is unambiguous; `names` may hold more labels than the data.

    Raises UserError where a label of the data is not among `names`.
    """
    if data.regression:
        raise UserError(f"{data.name} has scores, not classes: its labels have no order of names")
    tables = {split: rows.with_format("arrow")[:] for split, rows in data.splits.items()}
    ids = {split: table["label"].to_numpy() for split, table in tables.items()}
    ids = map_label_ids(data.name, ids, data.label_names, names)
    splits = {
        split: datasets.Dataset(table.set_column(table.column_names.index("label"), "label", pa.array(ids[split])))
        for split, table in tables.items()
    }
    return replace(data, splits=splits, label_names=list(names), fingerprint=_fingerprint(splits, list(names)))


def _rows(
    split: str, raw: datasets.Dataset, columns: Columns, labelled: np.ndarray, labels: np.ndarray
) -> datasets.Dataset:
    """The columns text, perhaps text_pair, and label of the rows that are `labelled`."""
    found: dict[str, pa.Array] = {}
    for new, name in zip(("text", "text_pair"), columns.text, strict=False):
        if name not in raw.features:
            raise UserError(
                f"the {split} split lacks column {name!r} that train has: its columns are {raw.column_names}"
            )
        texts = raw.select_columns([name]).with_format("arrow")[:][name]
        if not any(fits(texts.type) for fits in TEXT_TYPES):
            raise UserError(f"column {name!r} of the {split} split holds {texts.type}, not texts: {FLAGS}")
        texts = texts.cast(pa.large_string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy()
        if (empty := labelled[blank[labelled]]).size:
            raise UserError(f"row {empty[0]} of {split}: no text in column {name!r}; remove the row or fill it in")
        found[new] = texts.take(pa.array(labelled))
    kinds = {name: datasets.Value("string") for name in found} | {"label": datasets.Value(str(labels.dtype))}
    return datasets.Dataset(pa.table({**found, "label": labels}).cast(datasets.Features(kinds).arrow_schema))


def _fingerprint(splits: Splits, label_names: list[str]) -> str:
    def parts() -> Iterator[object]:
        yield label_names
        for split in sorted(splits):
            for column in (name for name in splits[split].column_names if name != "sample_id"):
                yield [split, column, splits[split][:][column]]

    return data_fingerprint(parts())


MANY_ROWS = 100_000


def tokenize(data: TextData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Every split with the tokenizer's columns, labels, sample_id and length (in tokens, for grouping).

    Longer texts are cut to the tokenizer's `model_max_length`, which is saved with it.
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": rows["label"], "sample_id": rows["sample_id"], "length": lengths}

    return {split: map_rows(rows, encode) for split, rows in data.splits.items()}


def map_rows(rows: Dataset, function: Callable[[dict[str, list]], dict[str, list]]) -> Dataset:
    """A dataset of what `function` returns for batches of rows, without the columns of `rows`. Many rows are processed
    by as many processes as there are CPUs, and written to a file that is deleted when this process ends.
    """
    settings: dict[str, Any] = {"batched": True, "remove_columns": rows.column_names}
    if len(rows) < MANY_ROWS:
        return rows.map(function, **settings)
    folder = Path(get_temporary_cache_files_directory(), uuid.uuid4().hex)
    rows.save_to_disk(folder)  # or each process would get a copy of what is in memory
    rows = load_from_disk(folder)
    return rows.map(function, num_proc=os.cpu_count(), cache_file_name=str(folder / "mapped.arrow"), **settings)


class Collator(DataCollatorWithPadding):
    """Pads to the longest text of the batch; leaves out the column that only served to group."""

    def __call__(self, features: list[dict]) -> dict:
        return dict(super().__call__([{k: v for k, v in row.items() if k != "length"} for row in features]))


@dataclass
class Texts:
    """A dataset tokenized with one tokenizer."""

    data: TextData
    splits: dict[str, Dataset]
    collate: Collator

    @classmethod
    def of(cls, data: TextData, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        return cls(data, tokenize(data, tokenizer), Collator(tokenizer))

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @property
    def validation(self) -> Dataset:
        """The first validation split."""
        return next(rows for name, rows in self.splits.items() if name.startswith("validation"))

    def unused_inputs(self, model: PreTrainedModel) -> list[str]:
        """Inputs of the tokenizer that the model's forward does not take: DistilBERT has no token types."""
        accepted = inspect.signature(model.forward).parameters
        return [name for name in self.collate.tokenizer.model_input_names if name not in accepted]
