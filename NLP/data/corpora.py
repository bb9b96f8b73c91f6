"""Corpora of plain text for language models, and their tokens packed into blocks.

The embedded corpus `python` is English that every Python carries: the language reference for `help()`
(`pydoc_data.topics`) and the docstrings of the standard library, about 1.7 MB once repeated paragraphs are left out.
It is under the Python Software Foundation License, stays where it is, and differs a little from one Python version to
the next.
"""

import ast
import io
import platform
import re
import sysconfig
import zlib
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.readers import READERS, read_text
from kd.common.data.sources import SPLIT_NAMES, Splits, list_folder, read_folder, read_splits, short_name
from kd.common.objective import IGNORED
from kd.common.utils.errors import UserError
from kd.nlp.data.columns import contents_of, is_text, texts_of

EMBEDDED = "python"
TOKENIZED_AT_ONCE = 1000  # documents
HEADING_RULE = re.compile(r"^[*=\-~^]{3,}$", re.MULTILINE)  # the line under a heading
NOT_EVERYWHERE = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")

Documents = dict[str, list[str]]


@dataclass(frozen=True)
class Corpus:
    """Documents by split: train, validation and perhaps test.

    A document that is one line with its newline is part of a longer text, as in WikiText or a .txt file, and the next
    one goes on with it; any other is complete.
    """

    name: str
    splits: Documents
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

    @property
    def fingerprint(self) -> str:
        return data_fingerprint([self.splits])

    def size(self, split: str) -> int:
        """Bytes of a split's text in UTF-8."""
        return sum(len(document.encode()) for document in self.splits[split])


def load_corpus(dataset: str, text_column: str | None = None) -> Corpus:
    """Loads `python`, a folder (parquet, CSV, JSON or .txt, one file per split) or owner/name[:config] of the Hub."""
    if dataset == EMBEDDED:
        note = f"reference and docstrings of Python {platform.python_version()}, PSF License"
        return Corpus(dataset, split_by_name(python_texts()), [note])
    raw, notes = read_splits(dataset, {EMBEDDED: dict}, "train.txt, or parquet, CSV or JSON files", _read_folder)
    raw = {split: rows for split, rows in raw.items() if split in ("train", "validation", "test")}
    column = _text_column(raw, text_column)
    notes.append(f"column {column!r} holds the texts")
    splits = {split: _texts(split, rows, column, notes) for split, rows in raw.items()}
    if "validation" not in splits:
        splits = _set_end_aside(splits, notes)
    return Corpus(short_name(dataset), splits, notes)


def python_texts() -> dict[str, str]:
    """The topics of `help()` and, by module or package, the library's docstrings, without repeated paragraphs.

    Raises UserError where the installation lacks them, as stripped-down ones do.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    docstrings = _docstrings(Path(sysconfig.get_path("stdlib"))) if topics else {}
    if not topics or not docstrings:
        raise UserError(
            "this Python lacks pydoc_data.topics or the sources of its library, the embedded corpus: install all of "
            "the standard library, or pass --dataset with a folder or a Hub name"
        )
    documents = {f"help/{name}": text for name, text in topics.items()}
    documents |= {f"library/{name}": "\n\n".join(texts) for name, texts in docstrings.items()}
    return without_repeats({name: HEADING_RULE.sub("", text) for name, text in documents.items()})


def _docstrings(library: Path) -> dict[str, list[str]]:
    """By module or package; without tests, and without what some installations leave out or add."""
    found: dict[str, list[str]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if NOT_EVERYWHERE.isdisjoint(parts):
            nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, DOCUMENTED))
            texts = filter(None, map(ast.get_docstring, nodes))
            found.setdefault(parts[0].removesuffix(".py"), []).extend(texts)
    return found


def without_repeats(documents: dict[str, str]) -> dict[str, str]:
    """Each paragraph stays in the shortest of the documents that hold it, so that no split holds what another does.

    Whole sections stand in several topics of `help()`. What is left empty is no document.
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
    """A tenth of the documents each to validation and test. The name alone decides, whatever else there is."""
    splits: Documents = {"train": [], "validation": [], "test": []}
    for name, text in sorted(documents.items()):
        splits[{0: "validation", 1: "test"}.get(zlib.crc32(name.encode()) % 10, "train")].append(text)
    return splits


def _read_folder(folder: Path) -> Splits:
    """Plain text, SPLIT.txt, where there is nothing else."""
    inside = list_folder(folder)
    plain = [path for path in inside if path.suffix == ".txt" and path.stem in SPLIT_NAMES]
    if plain and not any(path.suffix.lower() in READERS for path in inside):
        return {path.stem: _lines(path) for path in plain}
    return read_folder(folder)


def _lines(path: Path) -> datasets.Dataset:
    """Every line with its newline, whichever way of breaking lines the file has."""
    return datasets.Dataset.from_dict({"text": list(io.StringIO(read_text(path), newline=None))})


def _text_column(raw: Splits, column: str | None) -> str:
    """The column that is named, else `text`, else the only one of texts in all splits."""
    strings, contents = texts_of(raw), contents_of(raw)
    texts = [name for name in strings if contents.get(name) in ("texts", "classes")]
    chosen = column or ("text" if "text" in strings else texts[0] if len(texts) == 1 else None)
    if chosen is None or chosen not in strings:
        raise UserError(
            f"cannot tell the text column among {', '.join(contents)}"
            f"{f': {column!r} holds no texts' if column else ''}; name one with --text_column"
        )
    return chosen


def _texts(split: str, rows: datasets.Dataset, column: str, notes: list[str]) -> list[str]:
    """The documents of a split; rows without text are left out."""
    if column not in rows.features or not is_text(rows.features[column]):
        raise UserError(f"the {split} split has no column {column!r} of texts; name one with --text_column")
    texts = [text for text in rows[:][column] if text]
    if not "".join(texts).strip():
        raise UserError(f"the {split} split holds no text in column {column!r}: it needs at least one document")
    if len(texts) < len(rows):
        notes.append(f"{len(rows) - len(texts):,} of {len(rows):,} rows of {split} hold no text and are left out")
    return texts


def _set_end_aside(splits: Documents, notes: list[str]) -> Documents:
    """The end of train in one piece becomes validation: consecutive lines of a document are correlated."""
    documents = splits["train"]
    number = len(documents) // 10
    if not number:
        raise UserError(
            f"no validation split, and too few documents in train to set some aside ({len(documents)}): add a file "
            "validation.*"
        )
    notes.append("no validation split: the last tenth of train's documents was set aside")
    return splits | {"train": documents[:-number], "validation": documents[-number:]}


# ---------------------------------------------------------------- tokens


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> datasets.Dataset:
    """All tokens in one row, cut into blocks: `input_ids` and `labels` (block_size,), which are one token ahead, and
    `length`, the block_size.

    The stream is `end document end document end ...`, the end-of-text token standing before and after each complete
    document. Of every token but the first of the stream exactly one label is made. Where two blocks meet, the last
    label of one is the first input of the next, which sees nothing of what came before it. The last block is filled up
    with end-of-text tokens whose labels are IGNORED.
    """
    end = tokenizer.eos_token_id
    pieces = [torch.tensor([end])]
    for start in range(0, len(documents), TOKENIZED_AT_ONCE):
        some = documents[start : start + TOKENIZED_AT_ONCE]
        encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, ids in zip(some, encoded, strict=True):
            pieces.append(torch.tensor(ids if _is_line(document) else [*ids, end], dtype=torch.long))
    stream = torch.cat(pieces)
    missing = -(len(stream) - 1) % block_size
    inputs = F.pad(stream[:-1], (0, missing), value=end).view(-1, block_size)
    labels = F.pad(stream[1:], (0, missing), value=IGNORED).view(-1, block_size)
    columns = {"input_ids": inputs.numpy(), "labels": labels.numpy(), "length": [block_size] * len(inputs)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def _is_line(document: str) -> bool:
    return document.find("\n") == len(document) - 1


def stack(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch; leaves out the length, which all share."""
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0] if name != "length"}
