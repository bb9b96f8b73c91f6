"""Rows of tokens for masked language models, and their masks.

A mask follows BERT (arXiv:1810.04805): a share of the tokens, or of the words, is chosen. Of the chosen tokens, 80 %
are replaced by the mask token, 10 % by a random token, and 10 % stay as they are. Special tokens are never chosen.

The mask of a row depends only on seed, epoch and row. So every epoch has new masks, and a resumed run repeats them.
transformers' DataCollatorForLanguageModeling draws from one generator for all batches, whose state is not part of a
checkpoint, and its whole-word masks have no random and no unchanged tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from kd.common.training.inference import column_array
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.corpora import encode_documents, is_line

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that are replaced by the mask token and by a random token
FIXED_SEED = 0  # of the masks for evaluation, which are the same in every run

Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Masking:
    """How tokens are masked: the share of tokens or, with `whole_words`, of words that is chosen."""

    tokenizer: PreTrainedTokenizerBase
    share: float = 0.15
    whole_words: bool = False

    @cached_property
    def special(self) -> Tensor:
        return torch.tensor(sorted(self.tokenizer.all_special_ids))

    @cached_property
    def ordinary(self) -> Tensor:
        """The ids of all tokens that are not special."""
        ids = torch.tensor(sorted(self.tokenizer.get_vocab().values()))
        return ids[~torch.isin(ids, self.special)]

    def mask(self, ids: Tensor, draws: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inputs (tokens,) and the labels (tokens,), IGNORED where no token was chosen, of a row.

        Args:
            ids: Tokens (tokens,).
            draws: (3, tokens), uniform between 0 and 1: they choose words or tokens, how to replace a token, and the
                random token.
            starts: For each token, the place of the first token of its word (tokens,). None: each token is a word.
        """
        choice, way, token = draws
        chosen = (choice if starts is None else choice[starts]) < self.share
        chosen &= ~torch.isin(ids, self.special)
        random = self.ordinary[(token * len(self.ordinary)).long()]
        replaced = torch.where(way < MASKED, self.tokenizer.mask_token_id, random)
        inputs = torch.where(chosen & (way < MASKED + RANDOM), replaced, ids)
        return inputs, torch.where(chosen, ids, IGNORED)

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        """Pads input_ids and labels (batch, tokens) to the longest row, and adds the attention mask."""
        side, padding = self.tokenizer.padding_side, {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        return {
            name: pad_sequence(values, batch_first=True, padding_value=padding.get(name, 0), padding_side=side)
            for name, values in columns.items()
        }


class MaskedRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows with the masks of an epoch: `input_ids` and `labels` (tokens,). `rows` are those of `token_rows`."""

    def __init__(self, rows: datasets.Dataset, masking: Masking, seed: int) -> None:
        self.rows, self.masking, self.seed = rows, masking, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # with persistent workers
        self.column_names = rows.column_names
        self.ends = np.cumsum(column_array(rows, "length"))
        self.ids = _joined(rows, "input_ids")
        self.starts = _joined(rows, "starts") if "starts" in rows.column_names else None

    def set_epoch(self, epoch: int) -> None:
        """Selects the masks. The trainer calls it before each epoch."""
        self.epoch.fill_(epoch)

    def select_columns(self, names: list[str]) -> datasets.Dataset:
        """The columns of all rows without masks, such as `length`."""
        return self.rows.select_columns(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> Rows:
        """One call of `mask` for the tokens of all these rows takes a fraction of the time of one call per row."""
        places = [slice(self.ends[n - 1] if n else 0, self.ends[n]) for n in numbers]
        sizes = [int(place.stop - place.start) for place in places]
        generators = (np.random.default_rng([self.seed, int(self.epoch), number]) for number in numbers)
        draws = np.concatenate([g.random((3, size)) for g, size in zip(generators, sizes, strict=True)], axis=1)
        ids, starts = np.concatenate([self.ids[place] for place in places]), None
        if self.starts is not None:
            before = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
            starts = torch.from_numpy(np.concatenate([self.starts[place] for place in places]) + before)
        inputs, labels = self.masking.mask(torch.from_numpy(ids), torch.from_numpy(draws), starts)
        rows = zip(inputs.split(sizes), labels.split(sizes), strict=True)
        return [{"input_ids": one, "labels": other} for one, other in rows]


def _joined(rows: datasets.Dataset, name: str) -> np.ndarray:
    """The lists of a column, joined."""
    column = rows.select_columns([name]).with_format("arrow")[:][name]
    return np.array(column.combine_chunks().flatten().to_numpy(), dtype=np.int64)  # a copy: torch writes to arrays


def fixed_masks(rows: datasets.Dataset, masking: Masking) -> datasets.Dataset:
    """Rows with masks that are the same in every run: `input_ids`, `labels`, `length`."""
    masked = MaskedRows(rows, masking, FIXED_SEED).__getitems__(list(range(len(rows))))
    columns = {name: [row[name].tolist() for row in masked] for name in ("input_ids", "labels")}
    lengths = [len(ids) for ids in columns["input_ids"]]
    return datasets.Dataset.from_dict(columns | {"length": lengths}).with_format("torch")


# ---- rows of tokens ----


def token_rows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, most: int, pack: bool, words: bool
) -> datasets.Dataset:
    """Rows `[CLS] tokens [SEP]` of at most `most` tokens: `input_ids`, `length` and, with `words`, `starts`, the place
    of the first token of the word of each token.

    Each document is a row, and the end of long ones is left out. With `pack`, consecutive documents fill each row,
    with a separator token between them.
    """
    room = most - 2
    pieces = _pieces(documents, tokenizer, words)
    contents = _packed(pieces, tokenizer.sep_token_id, room) if pack else [piece[:, :room] for piece, _ in pieces]
    rows: dict[str, Any] = {"input_ids": [], "length": []} | ({"starts": []} if words else {})
    for ids, numbers in contents:
        rows["input_ids"].append(np.concatenate([[tokenizer.cls_token_id], ids, [tokenizer.sep_token_id]]))
        rows["length"].append(len(ids) + 2)
        if words:
            first = np.flatnonzero(np.diff(numbers, prepend=-1))
            starts = np.repeat(first, np.diff(first, append=len(numbers))) + 1
            rows["starts"].append(np.concatenate([[0], starts, [len(ids) + 1]]))
    return datasets.Dataset.from_dict(rows).with_format("torch")


Piece = tuple[np.ndarray, bool]  # (2, tokens): ids, and numbers of words; whether the document ends here


def _pieces(documents: list[str], tokenizer: PreTrainedTokenizerBase, words: bool) -> Iterator[Piece]:
    """The tokens of each document that has any. Words are numbered upwards, with one number free after a document."""
    following = 0
    for document, encoding in encode_documents(documents, tokenizer, words):
        if ids := encoding["input_ids"]:
            numbers = np.array(encoding["words"] if words else range(len(ids))) + following
            following = int(numbers[-1]) + 2
            yield np.stack([ids, numbers]), not is_line(document)


def _packed(pieces: Iterator[Piece], separator: int, room: int) -> list[np.ndarray]:
    """The tokens of all pieces in rows of `room`, with a separator between complete documents."""
    joined = []
    for piece, is_complete in pieces:
        joined += [piece, np.array([[separator], [piece[1, -1] + 1]])] if is_complete else [piece]
    stream = np.concatenate(joined, axis=1)
    if is_complete:
        stream = stream[:, :-1]
    return [stream[:, start : start + room] for start in range(0, stream.shape[1], room)]


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, whole_words: bool) -> None:
    """Raises UserError for a tokenizer without the tokens that rows and masks need, or without words."""
    for kind in ("mask", "pad", "cls", "sep"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(
                f"the tokenizer of {name} has no {kind}_token: pass a --teacher for masked language modelling, such "
                "as a BERT or RoBERTa"
            )
    if whole_words and not tokenizer.is_fast:
        raise UserError(f"--whole_words needs a fast tokenizer, and that of {name} is not: leave it out")
