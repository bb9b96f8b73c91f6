"""Loads text datasets - embedded, known by name, local, or on the Hub - and tokenizes them."""

import inspect
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from datasets.fingerprint import get_temporary_cache_files_directory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.label_sets import read_label_sets
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
from kd.common.metrics.tasks import TaskMetrics, task_metrics
from kd.common.training.inference import column_array
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED, TaskType
from kd.nlp.data.columns import TASKS, choose_task, known_task
from kd.nlp.data.entities import load_synthetic_entities
from kd.nlp.data.intent_pairs import load_intent_pairs
from kd.nlp.data.intents import load_intents
from kd.nlp.data.multilabel_intents import load_multilabel_intents
from kd.nlp.data.rows import label_array, map_labels, select_rows, strata, to_column, with_teacher, without_empty
from kd.nlp.data.tags import read_tags

EMBEDDED = {
    "intents": load_intents,
    "multilabel_intents": load_multilabel_intents,
    "synthetic_entities": load_synthetic_entities,
    "intent_pairs": load_intent_pairs,
}
KNOWN = {name: task.hub or EMBEDDED[name] for name, task in TASKS.items()}
NOT_IN_BATCH = ("length", "first_tokens")
MANY_ROWS = 100_000  # from this number on, several processes tokenize the rows


@dataclass(frozen=True)
class TextData:
    """Every split has the columns text, text_pair (for tasks with pairs), label, row (in the data as
    stored) and sample_id.

    A label is a class id, a float for regression, a list of 0 and 1 for multi_label, or a list of tag ids for
    token_classification, whose text is a list of words. Only train has rows without a label: IGNORED, or NaN for
    regression and multi_label.
    """

    name: str
    splits: Splits
    label_names: list[str]  # by class id; empty for regression
    task: TaskType
    primary_metric: str
    fingerprint: str  # hash of the contents, independent of their source
    notes: list[str] = field(default_factory=list)  # for the report
    teacher: TeacherColumns | None = None  # its logits are also the column `teacher` of the splits that have any
    model_labels: list[str] | None = None  # the labels, by id, of classifiers that do not name theirs

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    @property
    def scores(self) -> TaskMetrics:
        """The metrics of the task."""
        return task_metrics(self.task, self.label_names)


def load_text_data(
    dataset: str,
    text_columns: list[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    task: TaskType | None = None,
    known_labels: list[str] | None = None,
    needs_train: bool = True,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    unlabelled_label: Sequence[str] | None = None,
    drop_unlabelled: bool = False,
    label_separator: str | None = None,
    label_names: list[str] | None = None,
    trust_label_order: bool = False,
    teacher_columns: list[str] | None = None,
    teacher_values: Values | None = None,
) -> TextData:
    """Loads `dataset`: a name in TASKS, a folder or file, or owner/name[:config] of the Hub.

    Rows without a label, and those of a split `unlabelled`, are training rows. A missing validation split is made from
    the train rows with a label, the same in every run. The notes report what was inferred and left out.

    Args:
        label_column: one column, or several of 0 and 1 for any number of labels per text.
        task: resolves labels that could be of several types.
        known_labels: the labels, by id, of the classifier that is evaluated.
        needs_train: whether a missing train split is an error.
        max_train_samples, max_eval_samples: maximum number of rows of train and of each other split, a fixed
            stratified sample.
        unlabelled_label: placeholders for a missing label.
        drop_unlabelled: leave out the training rows without a label.
        label_separator: the separator of several labels in one column.
        label_names: the labels, by id, of classifiers and of teacher outputs that do not name theirs.
        trust_label_order: these have the labels of the data, in their order.
        teacher_columns, teacher_values: see `read_teacher_columns`.

    Raises UserError if the dataset, a column, a text or the labels are missing or ambiguous.
    """
    raw, notes = read_splits(dataset, KNOWN, needs_train=needs_train, with_unlabelled=not drop_unlabelled)
    if dataset in TASKS:
        task = TASKS[dataset].task
        raw = {split: rows for split, rows in raw.items() if split != "test" or TASKS[dataset].labelled_test}
    outputs = expand_columns(raw, teacher_columns or [])
    others = {
        split: rows.select_columns([c for c in rows.column_names if c not in outputs]) for split, rows in raw.items()
    }
    chosen = [label_column] if isinstance(label_column, str) else list(label_column or ())
    others, columns, task, note = choose_task(others, text_columns, chosen, task, label_separator)
    if outputs and task in ("multi_label", "token_classification"):
        raise UserError(f"--teacher_columns hold the outputs for one label per text, and the task is {task}")
    raw = raw if outputs else others
    raw = join_unlabelled(raw, columns.label, notes)
    try:
        if task == "token_classification":
            labels = read_tags(raw, columns, known_labels)
        elif task == "multi_label":
            labels = read_label_sets(raw, columns.label, known_labels, not drop_unlabelled)
        else:
            known = known_labels or (None if needs_train else [])
            labels = read_labels(raw, columns.label, task, known, unlabelled_label or (), not drop_unlabelled)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    task = task or ("classification" if labels.names else "regression")
    name = dataset if dataset in TASKS else short_name(dataset)
    if task == "regression" and known_labels:
        raise UserError(f"{name} has scores, not classes: the classifier cannot be evaluated on it")
    spec = known_task(columns, known_labels or labels.names, task)
    # F1 is computed for class 1, so the label order of a known task also applies to a local file, and to a classifier.
    by_position = spec is not None and spec.metric == "f1"
    names = (known_labels if not by_position else None) or (list(spec.label_names) if spec else []) or labels.names
    ids = map_labels(task, name, labels.values, labels.names, names)
    notes += [note, *labels.notes]
    splits = {split: select_rows(split, raw[split], columns, rows, ids[split]) for split, rows in labels.rows.items()}
    order = label_names or (names if trust_label_order else None)
    teacher = read_teacher_columns(raw, outputs, names, teacher_values, order) if outputs else None
    if teacher is not None:
        notes += teacher.notes
        splits = {split: with_teacher(rows, teacher, split, labels.rows[split]) for split, rows in splits.items()}
    if "train" in splits:
        splits["train"] = without_empty(splits["train"], notes)
        splits = with_validation(splits, strata(splits["train"]), notes)
    for split, rows in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        splits[split] = sample(rows, most, split, notes, strata(rows))
    return TextData(
        name=name,
        splits={split: rows.add_column("sample_id", np.arange(len(rows))) for split, rows in splits.items()},
        label_names=names,
        task=task,
        primary_metric=spec.metric if spec else task_metrics(task, names).primary,
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
    if data.task == "regression":
        raise UserError(f"{data.name} has scores, not classes: it cannot be used with a classifier")
    tables = {split: rows.with_format("arrow")[:] for split, rows in data.splits.items()}
    ids = {split: label_array(rows, data.task) for split, rows in data.splits.items()}
    ids = map_labels(data.task, data.name, ids, data.label_names, names)
    splits = {
        split: Dataset(table.set_column(table.column_names.index("label"), "label", to_column(ids[split])))
        for split, table in tables.items()
    }
    return replace(data, splits=splits, label_names=list(names), fingerprint=_fingerprint(splits, list(names)))


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
    """Pads to the longest text of the batch, on the tokenizer's side, and the tags of its tokens with IGNORED. Drops
    `length`, which is only for grouping, and `first_tokens`.

    The tensors are those of `tokenizer.pad`, which takes several times as long: as long as a step of a small model.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name not in NOT_IN_BATCH]
        return {name: self._column(name, [row[name] for row in rows]) for name in names}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        is_tags = name == "labels" and isinstance(values[0], list) and isinstance(values[0][0], int)
        if name not in self.tokenizer.model_input_names and not is_tags:
            return torch.tensor(values)
        padding = {
            "labels": IGNORED,
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        texts = [torch.tensor(value) for value in values]
        side = self.tokenizer.padding_side
        return pad_sequence(texts, batch_first=True, padding_value=padding.get(name, 0), padding_side=side)


@dataclass
class Texts:
    """A dataset tokenized with one tokenizer.

    Splits have the tokenizer's columns, labels, sample_id and length (in tokens). Longer texts are truncated to the
    tokenizer's `model_max_length`, which is saved with it.

    For token_classification, the label of the first token of a word is the word's tag, and that of all other tokens is
    IGNORED. `first_tokens` are the places of the first token of each word, -1 for words that were cut off.
    """

    data: TextData
    splits: dict[str, Dataset]
    collate: Collator

    @classmethod
    def of(cls, data: TextData, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        def encode(rows: dict[str, list]) -> dict[str, list]:
            if data.task == "token_classification":
                encoded = encode_words(tokenizer, rows["text"], rows["label"])
            else:
                encoded = {**tokenizer(rows["text"], rows.get("text_pair"), truncation=True), "labels": rows["label"]}
            lengths = [len(ids) for ids in encoded["input_ids"]]
            return {**encoded, "sample_id": rows["sample_id"], "length": lengths}

        splits = {split: _map(rows, encode) for split, rows in data.splits.items()}
        return cls(data, splits, Collator(tokenizer))

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @cached_property
    def labelled_train(self) -> Dataset:
        """The rows of train that have a label. The others have no target without a teacher."""
        known = labelled(self.train_labels)
        return self.train if known.all() else self.train.select(np.flatnonzero(known)).flatten_indices()

    @property
    def train_labels(self) -> np.ndarray:
        """The labels of train, which may be missing; zeros for token_classification, where all rows have tags."""
        if self.data.task == "token_classification":
            return np.zeros(len(self.train), dtype=np.int64)
        return column_array(self.train, "labels")

    @property
    def validation(self) -> Dataset:
        """The first validation split."""
        return next(rows for name, rows in self.splits.items() if name.startswith("validation"))

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, as `task_metrics` takes them."""
        if self.data.task == "token_classification":
            return pad_rows(self.data.splits[split]["label"][:], IGNORED)
        return column_array(self.splits[split], "labels")

    def unused_inputs(self, model: PreTrainedModel) -> list[str]:
        """Columns of the tokenizer that the model's forward does not take: DistilBERT has no token types."""
        accepted = inspect.signature(model.forward).parameters
        return [name for name in self.collate.tokenizer.model_input_names if name not in accepted]


def encode_words(tokenizer: PreTrainedTokenizerBase, words: list[list[str]], tags: list[list[int]]) -> dict[str, Any]:
    """Tokenizes words, with the columns labels and first_tokens; see `Texts`. Raises UserError for a slow
    tokenizer.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} does not map its tokens to words: save a fast tokenizer "
            "(tokenizer.json) in the folder of --teacher or --student"
        )
    encoded = tokenizer(words, is_split_into_words=True, truncation=True)
    first_tokens, labels = [], []
    for number, row in enumerate(tags):
        places: dict[int | None, int] = {}
        for place, word in enumerate(encoded.word_ids(number)):
            places.setdefault(word, place)
        first_tokens.append([places.get(word, -1) for word in range(len(row))])
        labels.append([IGNORED] * len(encoded["input_ids"][number]))
        for word, tag in enumerate(row):
            if word in places:
                labels[-1][places[word]] = tag
    return {**encoded, "labels": labels, "first_tokens": first_tokens}


def pad_rows(rows: Sequence[Sequence[int]], padding: int) -> np.ndarray:
    """Lists of integers as one array (rows, longest)."""
    padded = np.full((len(rows), max(map(len, rows))), padding)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


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
