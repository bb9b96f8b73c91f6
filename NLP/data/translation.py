"""Loads translation datasets - embedded, local, or on the Hub - and tokenizes their sentences."""

from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.sources import KnownDatasets, Splits, read_splits, sample, short_name, with_validation
from kd.common.utils.errors import UserError
from kd.nlp.data.number_words import load_number_words

NUMBER_WORDS = "number_words"
KNOWN: KnownDatasets = {NUMBER_WORDS: load_number_words}
MAX_VALIDATION = 1000  # maximum number of sentence pairs moved from train if there is no validation split


@dataclass(frozen=True)
class TranslationData:
    """Every split has the columns source, target (texts) and sample_id."""

    name: str
    languages: tuple[str, str]  # the original names of the columns source and target
    splits: Splits
    fingerprint: str  # hash of the contents, independent of their source
    notes: list[str] = field(default_factory=list)


def load_translation_data(
    dataset: str,
    source: str,
    target: str,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    needs_train: bool = True,
) -> TranslationData:
    """Loads `dataset`: number_words, a folder, or owner/name[:config]. A missing validation split is made from train,
    the same in every run.

    Args:
        source, target: names of text columns, or keys of the column `translation`.
        max_train_samples, max_eval_samples: maximum number of sentence pairs of train and of each other split, a fixed
            sample.
        needs_train: whether a missing train split is an error.

    Raises UserError if the dataset, a column or a text is missing.
    """
    raw, notes = read_splits(dataset, KNOWN, needs_train=needs_train)
    if source == target:
        raise UserError(f"--source and --target are both {source!r}: name two columns")
    splits = {split: _source_and_target(split, rows, source, target) for split, rows in raw.items()}
    if "train" in splits:
        number = len(splits["train"])
        splits = with_validation(splits, np.zeros(number), notes, min(0.1, MAX_VALIDATION / number))
    for split, rows in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        splits[split] = sample(rows, most, split, notes)
    texts = [[split, *(splits[split][column][:] for column in ("source", "target"))] for split in sorted(splits)]
    return TranslationData(
        name=short_name(dataset),
        languages=(source, target),
        splits={split: rows.add_column("sample_id", np.arange(len(rows))) for split, rows in splits.items()},
        fingerprint=data_fingerprint([texts]),
        notes=notes,
    )


def _source_and_target(split: str, rows: datasets.Dataset, source: str, target: str) -> datasets.Dataset:
    """Selects and renames the columns source and target."""
    nested = rows.features.get("translation")  # the Hub's layout: {"en": ..., "de": ...} in one column
    if isinstance(nested, dict | datasets.Translation) and not {source, target} & set(rows.column_names):
        pairs = [pair or {} for pair in rows["translation"][:]]
        names = dict.fromkeys(name for pair in pairs for name in pair)
        rows = datasets.Dataset.from_dict({name: [pair.get(name) for pair in pairs] for name in names})
    columns = {}
    for side, name in (("source", source), ("target", target)):
        if name not in rows.column_names:
            raise UserError(
                f"the {split} split has no {name!r}, only {', '.join(rows.column_names)}: pass the names of the two "
                "columns as --source and --target"
            )
        columns[side] = rows[name][:]
        for row, text in enumerate(columns[side]):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"row {row} of {split}: no text in column {name!r}; remove the row or fill it in")
    return datasets.Dataset.from_dict(columns)


def tokenize_translation(data: TranslationData, tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> Splits:
    """Tokenizes every split: input_ids, attention_mask, labels (target tokens), sample_id and length (source plus
    target). Longer sentences are truncated to the tokenizer's `model_max_length`.

    Args:
        prefix: added before each source sentence, such as T5's "translate English to German: ".
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        sources = tokenizer([prefix + text for text in rows["source"]], truncation=True)
        labels = tokenizer(text_target=rows["target"], truncation=True)["input_ids"]
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "labels": labels,
            "sample_id": rows["sample_id"],
            "length": [len(x) + len(y) for x, y in zip(sources["input_ids"], labels, strict=True)],
        }

    return {
        split: rows.map(encode, batched=True, remove_columns=rows.column_names) for split, rows in data.splits.items()
    }


class TranslationCollator(DataCollatorForSeq2Seq):
    """Pads sources and labels (with IGNORED) to the longest of the batch, and derives decoder inputs from labels.
    Drops `length`, which is only for grouping.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return dict(super().__call__([{k: v for k, v in row.items() if k != "length"} for row in features]))
