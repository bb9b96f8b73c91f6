"""Plain text corpora for language models, and their tokens packed into blocks.

The embedded corpus `python` is English text of the Python installation: the language reference for `help()`
(`pydoc_data.topics`) and the docstrings of the standard library, about 1.7 MB without repeated paragraphs. It is under
the Python Software Foundation License and differs slightly between Python versions. `intents` are the texts of the
embedded classification data, and `answers` the prompts and completions of `NLP/data/answers.py`.
"""

import ast
import io
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.readers import READERS, TXT, read_text
from kd.common.data.sources import (
    SPLIT_NAMES,
    KnownDatasets,
    Splits,
    list_folder,
    read_folder,
    read_splits,
    short_name,
)
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.answers import load_answers
from kd.nlp.data.columns import infer_contents, is_text, text_columns
from kd.nlp.data.intents import load_intents

EMBEDDED = "python"
DOCUMENTS_PER_CALL = 1000  # tokenized by one call of the tokenizer
HEADING_RULE = re.compile(r"^[*=\-~^]{3,}$", re.MULTILINE)  # the line under a heading
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")

Documents = dict[str, list[str]]


@dataclass(frozen=True)
class Corpus:
    """Documents by split: train, validation, perhaps test, and perhaps the texts of `with_texts_of`.

    A document that is a single line ending with a newline is part of a longer text, as in WikiText or a .txt file, and
    the next document continues it. Any other document is complete.
    """

    name: str
    splits: Documents
    notes: list[str] = field(default_factory=list)  # for the report

    @property
    def fingerprint(self) -> str:
        return data_fingerprint([self.splits])

    def size(self, split: str) -> int:
        """Size of a split's text in UTF-8 bytes."""
        return sum(len(document.encode()) for document in self.splits[split])


def load_corpus(
    dataset: str,
    text_column: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    needs_train: bool = True,
) -> Corpus:
    """Loads an embedded dataset, a folder (one parquet, CSV, JSON or .txt file per split) or owner/name[:config] of
    the Hub. For `needs_train` see `read_corpus`, for the other arguments `corpus_of`.
    """
    return corpus_of(dataset, *read_corpus(dataset, needs_train), text_column, max_train_samples, max_eval_samples)


def read_corpus(dataset: str, needs_train: bool = True, flag: str = "--dataset") -> tuple[Splits, list[str]]:
    """The rows of a dataset as stored, and notes for the report. Without `needs_train` a missing train split is no
    error, and a .txt file is the split test. `flag` names the dataset, for messages.
    """
    path = Path(dataset)
    if not needs_train and path.suffix.lower() == TXT and path.is_file():
        return {"test": lines_of_text(path)}, []
    contents = f"{'train' if needs_train else 'test'}.txt, or parquet, CSV or JSON files"
    raw, notes = read_splits(dataset, KNOWN, contents, read_folder_of_texts, needs_train, flag=flag)
    if dataset == EMBEDDED:
        notes.append(f"reference and docstrings of Python {platform.python_version()}, PSF License")
    return {split: rows for split, rows in raw.items() if split in ("train", "validation", "test")}, notes


def corpus_of(
    dataset: str,
    raw: Splits,
    notes: list[str],
    text_column: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Corpus:
    """The documents of `raw`. `max_train_samples`, `max_eval_samples`: maximum number of documents of train and of
    each other split.
    """
    column = _text_column(raw, text_column)
    if dataset != EMBEDDED:
        notes = [*notes, f"column {column!r} contains the texts"]
    splits = {split: _texts(split, rows, column, notes) for split, rows in raw.items()}
    if "train" in splits and "validation" not in splits:
        splits = _split_off_end(splits, notes)
    for split, documents in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        splits[split] = _at_most(documents, most, split, notes)
    return Corpus(short_name(dataset), splits, notes)


def with_texts_of(
    corpus: Corpus, dataset: str, text_column: str | None = None, max_eval_samples: int | None = None
) -> Corpus:
    """Adds the texts of another dataset as the split DATASET:SPLIT, on which models are evaluated too: its test split,
    or else its validation split, or else train. `text_column` applies if the dataset has that column.
    """
    raw, notes = read_corpus(dataset, needs_train=False, flag="--eval_dataset")
    split = next(name for name in ("test", "validation", "train") if name in raw)
    name = f"{short_name(dataset)}:{split}"
    raw = {name: raw[split]}
    column = _text_column(raw, text_column if text_column in raw[name].column_names else None)
    documents = _at_most(_texts(name, raw[name], column, notes), max_eval_samples, name, notes)
    return replace(corpus, splits=corpus.splits | {name: documents}, notes=[*corpus.notes, *notes])


def _at_most(documents: list[str], most: int | None, split: str, notes: list[str]) -> list[str]:
    """At most `most` documents, evenly spaced, or the first ones if they are lines of longer texts. Adds a note."""
    if most is None or most >= len(documents):
        return documents
    notes.append(f"{most:,} of {len(documents):,} documents of {split}")
    if any(map(is_line, documents)):
        return documents[:most]
    return [documents[number * len(documents) // most] for number in range(most)]


def load_python() -> Splits:
    """The embedded corpus."""
    splits = split_by_name(python_texts())
    return {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()}


def python_texts() -> dict[str, str]:
    """The topics of `help()` and the standard library's docstrings by module or package, without repeated paragraphs.

    Raises UserError if a minimal installation of Python lacks them.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    docstrings = _docstrings(Path(sysconfig.get_path("stdlib"))) if topics else {}
    if not topics or not docstrings:
        raise UserError(
            "this Python installation lacks the embedded corpus (pydoc_data.topics, or the sources of its library): "
            "install the whole standard library, or pass --dataset with a folder or a Hub name"
        )
    documents = {f"help/{name}": text for name, text in topics.items()}
    documents |= {f"library/{name}": "\n\n".join(texts) for name, texts in docstrings.items()}
    return drop_repeated_paragraphs({name: HEADING_RULE.sub("", text) for name, text in documents.items()})


def _docstrings(library: Path) -> dict[str, list[str]]:
    """Docstrings by module or package. Leaves out tests, and parts that are missing in some installations."""
    found: dict[str, list[str]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if EXCLUDED.isdisjoint(parts):
            nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, DOCUMENTED))
            texts = filter(None, map(ast.get_docstring, nodes))
            found.setdefault(parts[0].removesuffix(".py"), []).extend(texts)
    return found


def drop_repeated_paragraphs(documents: dict[str, str]) -> dict[str, str]:
    """Keeps each paragraph only in the shortest document that contains it, so that splits share no paragraph.

    Several topics of `help()` contain the same sections. Drops documents that become empty.
    """
    seen: set[str] = set()
    kept = {}
    for name, text in sorted(documents.items(), key=lambda document: (len(document[1]), document[0])):
        paragraphs = {" ".join(p.split()): p.strip("\n") for p in PARAGRAPH_BREAK.split(text)}
        new = [paragraph for words, paragraph in paragraphs.items() if words and words not in seen]
        seen |= paragraphs.keys()
        if new:
            kept[name] = "\n\n".join(new)
    return kept


def split_by_name(documents: dict[str, str]) -> Documents:
    """Assigns a tenth of the documents each to validation and test. The split depends only on the document's name."""
    splits: Documents = {"train": [], "validation": [], "test": []}
    for name, text in sorted(documents.items()):
        splits[{0: "validation", 1: "test"}.get(zlib.crc32(name.encode()) % 10, "train")].append(text)
    return splits


def read_folder_of_texts(folder: Path) -> Splits:
    """Reads SPLIT.txt files if the folder has no other files."""
    inside = list_folder(folder)
    plain = [path for path in inside if path.suffix == TXT and path.stem in SPLIT_NAMES]
    if plain and not any(path.suffix.lower() in READERS and path.suffix.lower() != TXT for path in inside):
        return {path.stem: lines_of_text(path) for path in plain}
    return read_folder(folder)


def lines_of_text(path: Path) -> datasets.Dataset:
    """One row per line with its newline, for any line ending."""
    return datasets.Dataset.from_dict({"text": list(io.StringIO(read_text(path), newline=None))})


def _text_column(raw: Splits, column: str | None) -> str:
    """Returns the column that the flag names, or the column `text`, or the only text column of all splits."""
    strings, contents = text_columns(raw), infer_contents(raw)
    texts = [name for name in strings if contents.get(name) in ("texts", "classes")]
    chosen = column or ("text" if "text" in strings else texts[0] if len(texts) == 1 else None)
    if chosen is None or chosen not in strings:
        raise UserError(
            f"cannot infer the text column among {', '.join(contents)}"
            f"{f': {column!r} does not contain texts' if column else ''}; pass --text_column"
        )
    return chosen


def _texts(split: str, rows: datasets.Dataset, column: str, notes: list[str]) -> list[str]:
    """The documents of a split. Rows without text are left out."""
    if column not in rows.features or not is_text(rows.features[column]):
        raise UserError(f"the {split} split has no column {column!r} of texts; pass --text_column")
    texts = [text for text in rows[:][column] if text]
    if not "".join(texts).strip():
        raise UserError(f"the {split} split has no text in column {column!r}: add at least one document")
    if len(texts) < len(rows):
        notes.append(f"{len(rows) - len(texts):,} of {len(rows):,} rows of {split} have no text and are left out")
    return texts


def _split_off_end(splits: Documents, notes: list[str]) -> Documents:
    """Moves the last tenth of train to validation, in one piece: consecutive lines of a document are correlated."""
    documents = splits["train"]
    number = len(documents) // 10
    if not number:
        raise UserError(
            f"no validation split, and too few documents in train to make one ({len(documents)}): add a file "
            "validation.*"
        )
    notes.append("no validation split: the last tenth of train's documents was set aside")
    return splits | {"train": documents[:-number], "validation": documents[-number:]}


KNOWN: KnownDatasets = {EMBEDDED: load_python, "intents": load_intents, "answers": load_answers}


# ---------------------------------------------------------------- tokens


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> datasets.Dataset:
    """Concatenates the tokens of all documents and cuts them into blocks: `input_ids` (block_size,), `labels`
    (block_size,), shifted by one token, and `length`, which is block_size.

    The stream is `end document end document end ...`, with an end-of-text token before and after each complete
    document. Every token except the first one is a label exactly once: the last label of a block is the first input of
    the next. The last block is padded with end-of-text tokens whose labels are IGNORED.
    """
    end = tokenizer.eos_token_id
    pieces = [torch.tensor([end])]
    for document, encoding in encode_documents(documents, tokenizer):
        ids = encoding["input_ids"]
        pieces.append(torch.tensor(ids if is_line(document) else [*ids, end], dtype=torch.long))
    stream = torch.cat(pieces)
    missing = -(len(stream) - 1) % block_size
    inputs = F.pad(stream[:-1], (0, missing), value=end).view(-1, block_size)
    labels = F.pad(stream[1:], (0, missing), value=IGNORED).view(-1, block_size)
    columns = {"input_ids": inputs.numpy(), "labels": labels.numpy(), "length": [block_size] * len(inputs)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def encode_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, words: bool = False
) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Yields each document with its `input_ids`, without special tokens, and with `words`, the number of the word of
    each token; the latter needs a fast tokenizer.
    """
    for start in range(0, len(documents), DOCUMENTS_PER_CALL):
        chunk = documents[start : start + DOCUMENTS_PER_CALL]
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for number, document in enumerate(chunk):
            encoding = {"input_ids": encoded["input_ids"][number]}
            yield document, encoding | ({"words": encoded.word_ids(number)} if words else {})


def is_line(document: str) -> bool:
    return document.find("\n") == len(document) - 1


def stack(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collates blocks into a batch. Drops `length`, which is the same for all blocks."""
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0] if name != "length"}
