"""Texts as token ids, ready for the trainer."""

import inspect
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from datasets.fingerprint import get_temporary_cache_files_directory
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from kd.nlp.data.loading import TextData

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

    def unused_by(self, model: PreTrainedModel) -> list[str]:
        """Inputs of the tokenizer that the model's forward does not take: DistilBERT has no token types."""
        accepted = inspect.signature(model.forward).parameters
        return [name for name in self.collate.tokenizer.model_input_names if name not in accepted]
