"""Data of sentence encoders: texts without labels train them, and pairs of texts with scores evaluate them."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.readers import TXT
from kd.common.data.sources import UNLABELLED, Splits, read_splits, sample, short_name
from kd.common.utils.errors import UserError
from kd.nlp.data.columns import TASKS, infer_contents, text_columns
from kd.nlp.data.corpora import lines_of_text, read_folder_of_texts
from kd.nlp.data.loading import KNOWN, TextData, load_text_data

WORDS = re.compile(r"\w+")
TEXTS_FLAG = "name columns of texts with --texts_columns"
PAIRS_FLAG = "name the two columns of texts with --text_columns, and the scores with --label_column"


@dataclass(frozen=True)
class Sentences:
    """Training texts, each once and none of them an evaluation text. `notes` are for the report."""

    texts: list[str]
    notes: list[str]

    @property
    def fingerprint(self) -> str:
        return data_fingerprint([self.texts])


# ---------------------------------------------------------------- pairs of texts with scores


def load_pairs(
    dataset: str,
    columns: list[str] | None = None,
    score: Sequence[str] | None = None,
    most: int | None = None,
    needs_validation: bool = True,
) -> TextData:
    """The pairs of `dataset`, with the columns text, text_pair and label (a number).

    No pair trains a model. So the train split is the test split, unless there is a test split with scores. A file is
    the train split; a tenth of it becomes the validation split.

    Args:
        columns, score: The two columns of texts, and that of the scores (default: inferred).
        most: Maximum number of pairs in each split.
        needs_validation: Whether a missing validation split is an error.

    Raises UserError if the data are no pairs with scores.
    """
    is_file = needs_validation and Path(dataset).is_file()
    data = load_text_data(dataset, columns, score, "regression", needs_train=is_file, max_train_samples=most,
                          max_eval_samples=most)  # fmt: skip
    splits, notes = dict(data.splits), list(data.notes)
    if "text_pair" not in next(iter(splits.values())).features:
        raise UserError(f"{data.name} has one text per row, and a sentence encoder is evaluated on two: {PAIRS_FLAG}")
    if "train" in splits and "test" in splits:
        del splits["train"]
        notes.append("split train is not used")
    elif "train" in splits:
        splits["test"] = splits.pop("train")
        notes.append("no pair trains a model, so train is the test split")
    if needs_validation and not any(name.startswith("validation") for name in splits):
        raise UserError(f"{data.name} has no validation split: name one of its files validation.*")
    return replace(data, splits=splits, notes=notes)


# ---------------------------------------------------------------- texts without labels


def load_sentences(
    sources: Sequence[str], columns: list[str] | None, pairs: str, most: int | None = None
) -> Sentences:
    """The texts of the train splits of all `sources`: names of datasets, folders or files, also of lines (.txt).

    Leaves out texts that repeat an earlier one, or a text of any split of the evaluation data `pairs`, up to case,
    punctuation and spaces; `notes` has their numbers.

    Args:
        columns: Names of the columns of texts; each source needs at least one of them (default: all that hold texts).
        most: Maximum number of texts, a fixed sample of those of all sources.
    """
    notes: list[str] = []
    found = [text for source in sources for text in _texts_of(source, columns, notes)]
    excluded = _evaluation_texts(pairs)
    texts, repeated, leaked, near = _distinct(found, excluded)
    notes.append(
        f"{len(texts):,} of {len(found):,} training texts; left out: {leaked:,} texts of {short_name(pairs)}, "
        f"{near:,} that differ from one only in case, punctuation or spaces, {repeated:,} empty or repeated"
    )
    if not texts:
        raise UserError("no training text is left: name other data with --texts")
    rows = sample(Dataset.from_dict({"text": texts}), most, "training", notes)
    return Sentences(rows["text"][:], notes)


def _texts_of(source: str, columns: list[str] | None, notes: list[str]) -> list[str]:
    raw = _read(source, notes)
    rows = [raw[split] for split in ("train", UNLABELLED) if split in raw]
    present = text_columns(raw)
    if columns is not None:
        chosen = [name for name in columns if name in present]
    elif source in TASKS:
        chosen = list(TASKS[source].text_columns)
    else:
        contents = infer_contents(raw)
        chosen = [name for name in present if contents[name] == "texts" or len(present) == 1]
    if not chosen or not set(chosen) <= set(present):
        raise UserError(
            f"{short_name(source)} has no column {' or '.join(columns or ['of texts'])}, only "
            f"{', '.join(rows[0].features)}: {TEXTS_FLAG}"
        )
    notes.append(f"texts of {short_name(source)}: columns {', '.join(map(repr, chosen))}")
    return [str(text or "") for part in rows for name in chosen if name in part.features for text in part[name][:]]


def _read(source: str, notes: list[str]) -> Splits:
    """The splits of a source. `notes` receives what its files were read as."""
    if Path(source).suffix.lower() == TXT and Path(source).is_file():
        return {"train": lines_of_text(Path(source))}
    contents = "lines (.txt), parquet, CSV or JSON files"
    raw, found = read_splits(source, KNOWN, contents, read_folder_of_texts, with_unlabelled=True, flag="--texts")
    notes += found
    return raw


def _evaluation_texts(pairs: str) -> set[str]:
    """The texts of all splits of the evaluation data, those without a score included."""
    raw, _ = read_splits(pairs, KNOWN, needs_train=False)
    return {text for rows in raw.values() for name in text_columns(raw) if name in rows.features
            for text in rows[name][:] if isinstance(text, str)}  # fmt: skip


def _distinct(texts: Iterable[str], excluded: set[str]) -> tuple[list[str], int, int, int]:
    """The texts that are kept, and the numbers of those that are empty or repeated, excluded, and nearly excluded."""
    excluded = {_spaced(text) for text in excluded}
    excluded_words = {_words(text) for text in excluded}
    kept, known = list[str](), set[str]()
    repeated = leaked = near = 0
    for text in map(_spaced, texts):
        words = _words(text)
        if text in excluded:
            leaked += 1
        elif words and words in excluded_words:
            near += 1
        elif not words or words in known:
            repeated += 1
        else:
            known.add(words)
            kept.append(text)
    return kept, repeated, leaked, near


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


# ---------------------------------------------------------------- tokens


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The tokenizer's columns, sample_id and length (in tokens). Longer texts are truncated to `model_max_length`."""
    encoded = tokenizer(list(texts), truncation=True)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return Dataset.from_dict({**encoded, "sample_id": np.arange(len(lengths)), "length": lengths})
