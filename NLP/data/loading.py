"""Loads text datasets - embedded, known by name, local, or on the Hub - and tokenizes them."""

import inspect
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk
from datasets.fingerprint import get_temporary_cache_files_directory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.label_columns import Kind
from kd.common.data.label_names import map_label_ids
from kd.common.data.labels import read_labels
from kd.common.data.sources import (
    Splits,
    join_unlabelled,
    labelled,
    read_splits,
    sample,
    short_name,
    with_validation,
)
from kd.common.data.teacher_columns import TeacherColumns, Values, expand_columns, read_teacher_columns
from kd.common.training.inference import column_array
from kd.common.utils.errors import UserError
from kd.nlp.data.columns import FLAGS, TASKS, Columns, choose_columns, known_task
from kd.nlp.data.intents import load_intents

KNOWN = {name: task.hub or load_intents for name, task in TASKS.items()}
# Texts that consist of digits may be stored as integers, and an empty column as null.
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
MANY_ROWS = 100_000  # from this number on, several processes tokenize the rows


@dataclass(frozen=True)
class TextData:
    """Every split has the columns text, text_pair (for tasks with pairs), label (class id or float), row (in the data
    as stored) and sample_id.

    Only train has rows without a label: IGNORED, or NaN for regression.
    """

    name: str
    splits: Splits
    label_names: list[str]  # by class id; empty for regression
    regression: bool
    primary_metric: str
    fingerprint: str  # hash of the contents, independent of their source
    notes: list[str] = field(default_factory=list)  # for the report
    teacher: TeacherColumns | None = None  # its logits are also the column `teacher` of the splits that have any
    model_labels: list[str] | None = None  # the labels, by id, of classifiers that do not name theirs

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
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    unlabelled_label: Sequence[str] | None = None,
    drop_unlabelled: bool = False,
    label_names: list[str] | None = None,
    trust_label_order: bool = False,
    teacher_columns: list[str] | None = None,
    teacher_values: Values | None = None,
) -> TextData:
    """Loads `dataset`: a name in TASKS, a folder or file, or owner/name[:config] of the Hub.

    Rows without a label, and those of a split `unlabelled`, are training rows. A missing validation split is made from
    the train rows with a label, the same in every run. The notes report what was inferred and left out.

    Args:
        task: resolves labels that could be either classes or scores.
        known_labels: the labels, by id, of the classifier that is evaluated.
        needs_train: whether a missing train split is an error.
        max_train_samples, max_eval_samples: maximum number of rows of train and of each other split, a fixed
            stratified sample.
        unlabelled_label: placeholders for a missing label.
        drop_unlabelled: leave out the training rows without a label.
        label_names: the labels, by id, of classifiers and of teacher outputs that do not name theirs.
        trust_label_order: these have the labels of the data, in their order.
        teacher_columns, teacher_values: see `read_teacher_columns`.

    Raises UserError if the dataset, a column, a text or the labels are missing or ambiguous.
    """
    raw, notes = read_splits(dataset, KNOWN, needs_train=needs_train, with_unlabelled=not drop_unlabelled)
    if dataset in TASKS:
        task = "regression" if TASKS[dataset].regression else "classification"
        raw = {split: rows for split, rows in raw.items() if split != "test" or TASKS[dataset].labelled_test}
    outputs = expand_columns(raw, teacher_columns or [])
    others = {
        split: rows.select_columns([c for c in rows.column_names if c not in outputs]) for split, rows in raw.items()
    }
    columns, note = choose_columns(others, text_columns, label_column)
    raw = join_unlabelled(raw, columns.label, notes)
    try:
        labels = read_labels(raw, columns.label, task, known_labels, unlabelled_label or (), not drop_unlabelled)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    name, regression = dataset if dataset in TASKS else short_name(dataset), not labels.names
    if regression and known_labels:
        raise UserError(f"{name} has scores, not classes: the classifier cannot be evaluated on it")
    spec = known_task(columns, known_labels or labels.names, regression)
    # F1 is computed for class 1, so the label order of a known task also applies to a local file.
    names = known_labels or (list(spec.label_names) if spec else []) or labels.names
    ids = labels.values if regression else map_label_ids(name, labels.values, labels.names, names)
    notes += [note, *labels.notes]
    splits = {split: _select(split, raw[split], columns, rows, ids[split]) for split, rows in labels.rows.items()}
    order = label_names or (names if trust_label_order else None)
    teacher = read_teacher_columns(raw, outputs, names, teacher_values, order) if outputs else None
    if teacher is not None:
        notes += teacher.notes
        splits = {split: _with_teacher(rows, teacher, split, labels.rows[split]) for split, rows in splits.items()}
    if "train" in splits:
        splits["train"] = _without_empty(splits["train"], notes)
        splits = with_validation(splits, column_array(splits["train"], "label"), notes)
    for split, rows in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        splits[split] = sample(rows, most, split, notes, column_array(rows, "label"))
    return TextData(
        name=name,
        splits={split: rows.add_column("sample_id", np.arange(len(rows))) for split, rows in splits.items()},
        label_names=names,
        regression=regression,
        primary_metric=spec.metric if spec else "spearman" if regression else "accuracy",
        fingerprint=_fingerprint(splits, names),
        notes=notes,
        teacher=teacher,
        model_labels=order,
    )


def _shared(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name in others]


def with_label_order(data: TextData, names: list[str]) -> TextData:
    """The same rows with class ids by `names`, as in a model's `id2label`; `names` may hold more labels than the data.

    Ignores case unless two labels differ only in case. Raises UserError for a label that `names` lacks.
    """
    if data.regression:
        raise UserError(f"{data.name} has scores, not classes: it cannot be used with a classifier")
    tables = {split: rows.with_format("arrow")[:] for split, rows in data.splits.items()}
    ids = {split: table["label"].to_numpy() for split, table in tables.items()}
    ids = map_label_ids(data.name, ids, data.label_names, names)
    splits = {
        split: Dataset(table.set_column(table.column_names.index("label"), "label", pa.array(ids[split])))
        for split, table in tables.items()
    }
    return replace(data, splits=splits, label_names=list(names), fingerprint=_fingerprint(splits, list(names)))


def _select(split: str, raw: Dataset, columns: Columns, rows: np.ndarray, labels: np.ndarray) -> Dataset:
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
        if not any(matches(texts.type) for matches in TEXT_TYPES):
            raise UserError(f"column {name!r} of the {split} split contains {texts.type}, not texts: {FLAGS}")
        texts = texts.cast(pa.large_string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy()
        if (empty := rows[blank[rows] & labelled(labels)]).size:
            raise UserError(f"row {empty[0]} of {split}: no text in column {name!r}; remove the row or fill it in")
        found[new] = pc.fill_null(texts.take(pa.array(rows)), "")
    kinds = {name: datasets.Value("string") for name in found} | {"label": datasets.Value(str(labels.dtype))}
    kinds["row"] = datasets.Value("int64")
    return Dataset(pa.table({**found, "label": labels, "row": rows}).cast(datasets.Features(kinds).arrow_schema))


def _with_teacher(rows: Dataset, teacher: TeacherColumns, split: str, chosen: np.ndarray) -> Dataset:
    """Adds the column `teacher` (classes,), with NaN in rows without an output, to a split that has outputs."""
    if split not in teacher.logits:
        return rows
    logits = teacher.logits[split][chosen]
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    table = rows.with_format("arrow")[:].append_column("teacher", column)
    features = rows.features | {"teacher": datasets.List(datasets.Value("float32"), logits.shape[1])}
    return Dataset(table.cast(datasets.Features(features).arrow_schema))


def _without_empty(rows: Dataset, notes: list[str]) -> Dataset:
    """Leaves out the rows of train that have no label, and no text or no output of the teacher either."""
    empty = np.zeros(len(rows), dtype=bool)
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


def _fingerprint(splits: Splits, label_names: list[str]) -> str:
    def parts() -> Iterator[object]:
        yield label_names
        for split in sorted(splits):
            for column in (name for name in splits[split].column_names if name not in ("row", "sample_id")):
                yield [split, column, splits[split][:][column]]

    return data_fingerprint(parts())


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Collator:
    """Pads to the longest text of the batch, on the tokenizer's side. Drops `length`, which is only for grouping.

    The tensors are those of `tokenizer.pad`, which takes several times as long: as long as a step of a small model.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name != "length"]
        return {name: self._column(name, [row[name] for row in rows]) for name in names}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        if name not in self.tokenizer.model_input_names:
            return torch.tensor(values)
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        texts = [torch.tensor(value) for value in values]
        side = self.tokenizer.padding_side
        return pad_sequence(texts, batch_first=True, padding_value=padding.get(name, 0), padding_side=side)


@dataclass
class Texts:
    """A dataset tokenized with one tokenizer.

    Splits have the tokenizer's columns, labels, sample_id and length (in tokens). Longer texts are truncated to the
    tokenizer's `model_max_length`, which is saved with it.
    """

    data: TextData
    splits: dict[str, Dataset]
    collate: Collator

    @classmethod
    def of(cls, data: TextData, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        def encode(rows: dict[str, list]) -> dict[str, list]:
            encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            return {**encoded, "labels": rows["label"], "sample_id": rows["sample_id"], "length": lengths}

        splits = {split: _map(rows, encode) for split, rows in data.splits.items()}
        return cls(data, splits, Collator(tokenizer))

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @cached_property
    def labelled_train(self) -> Dataset:
        """The rows of train that have a label. The others have no target without a teacher."""
        known = labelled(column_array(self.train, "labels"))
        return self.train if known.all() else self.train.select(np.flatnonzero(known)).flatten_indices()

    @property
    def validation(self) -> Dataset:
        """The first validation split."""
        return next(rows for name, rows in self.splits.items() if name.startswith("validation"))

    def unused_inputs(self, model: PreTrainedModel) -> list[str]:
        """Columns of the tokenizer that the model's forward does not take: DistilBERT has no token types."""
        accepted = inspect.signature(model.forward).parameters
        return [name for name in self.collate.tokenizer.model_input_names if name not in accepted]


def _map(rows: Dataset, function: Callable[[dict[str, list]], dict[str, list]]) -> Dataset:
    """Maps batches of rows to new columns. Many rows are mapped by one process per CPU, and written to a file that is
    deleted when this process ends.
    """
    kwargs: dict[str, Any] = {"batched": True, "remove_columns": rows.column_names}
    if len(rows) < MANY_ROWS:
        return rows.map(function, new_fingerprint=uuid.uuid4().hex, **kwargs)  # otherwise it hashes the tokenizer
    folder = Path(get_temporary_cache_files_directory(), uuid.uuid4().hex)
    rows.save_to_disk(folder)  # otherwise each process would copy the rows in memory
    rows = load_from_disk(folder)
    return rows.map(function, num_proc=os.cpu_count(), cache_file_name=str(folder / "mapped.arrow"), **kwargs)
