"""Rows of prompts and completions as tokens: the rows of a split, blocks of packed rows, and batches.

A row has `input_ids` (tokens,), `labels` (tokens,), which are the next token where it belongs to a completion and
IGNORED elsewhere, `prompt_length`, the number of tokens before the last completion, and `length`, that of input_ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.prompts import Piece, PromptData

OPEN_BLOCKS = 32  # blocks that still take rows while a split is packed
PROBE = 5  # tokens of each document by which a model is checked

Row = dict[str, Any]


def prompt_ids(row: Row) -> list[int]:
    """The tokens before the last completion of a row."""
    return list(row["input_ids"][: row["prompt_length"]])


def completion_ids(row: Row) -> list[int]:
    """The tokens of the last completion of a row, with its end-of-text token."""
    return list(row["labels"][row["prompt_length"] - 1 :])


def row_of(pieces: Iterable[tuple[Sequence[int], bool]]) -> Row:
    """The row of tokens in alternating prompts and completions (True). The first piece is a prompt of at least one
    token, and the last one a completion.
    """
    tokens: list[int] = []
    labels: list[int] = []
    prompt_length = 0
    for ids, is_completion in pieces:
        if is_completion:
            prompt_length = len(tokens)
        tokens += ids
        labels += ids if is_completion else [IGNORED] * len(ids)
    return {
        "input_ids": tokens[:-1],
        "labels": labels[1:],
        "prompt_length": prompt_length,
        "length": len(tokens) - 1,
    }


def token_rows(
    data: PromptData, split: str, tokenizer: PreTrainedTokenizerBase, block_size: int, notes: list[str]
) -> datasets.Dataset:
    """The rows of a split. A row of more than `block_size` tokens loses the beginning of its prompt; a row whose last
    completion alone is longer is left out. Adds notes on both.

    Raises UserError if no row is left.
    """
    rows = [encode(pieces, tokenizer, data.has_chats) for pieces in data.pieces(split, tokenizer)]
    fitting = [cut_left(row, block_size) for row in rows if row["length"] - row["prompt_length"] < block_size]
    cut = sum(row["length"] > block_size for row in rows) - (len(rows) - len(fitting))
    if not fitting:
        longest = min(row["length"] - row["prompt_length"] for row in rows) + 1
        raise UserError(
            f"no completion of {split} fits into --block_size {block_size}: the shortest one needs {longest:,}"
        )
    if cut:
        notes.append(
            f"{cut:,} of {len(rows):,} rows of {split} are longer than the block: prompts lose their beginning"
        )
    if len(fitting) < len(rows):
        notes.append(
            f"{len(rows) - len(fitting):,} of {len(rows):,} completions of {split} are longer than the block and are "
            "left out"
        )
    return datasets.Dataset.from_list(fitting)


def encode(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, is_chat: bool = False) -> Row:
    """Tokenizes each piece by itself, as a prompt is when a model answers it. The special tokens of a chat are in its
    text. Any other prompt has those that the tokenizer adds before a text. The last completion ends with a special
    token, which is the end-of-text token if the text has none.
    """
    special, end = set(tokenizer.all_special_ids), tokenizer.eos_token_id
    texts = [piece.text for piece in pieces]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if not is_chat:
        encoded[0] = tokenizer(texts[0], return_attention_mask=False, verbose=False)["input_ids"]
        if len(encoded[0]) > 1 and encoded[0][-1] == end and not texts[0].endswith(str(tokenizer.eos_token)):
            encoded[0].pop()  # of a tokenizer that ends each text
    if not encoded[-1] or encoded[-1][-1] not in special:
        encoded[-1].append(end)
    return row_of((ids, piece.is_completion) for ids, piece in zip(encoded, pieces, strict=True))


def cut_left(row: Row, most: int) -> Row:
    """The last `most` tokens of a row, of which at least one belongs to the prompt."""
    cut = max(row["length"] - most, 0)
    return {
        "input_ids": row["input_ids"][cut:],
        "labels": row["labels"][cut:],
        "prompt_length": row["prompt_length"] - cut,
        "length": row["length"] - cut,
    }


# ---------------------------------------------------------------- packing


def pack_rows(rows: datasets.Dataset, block_size: int) -> datasets.Dataset:
    """Packs whole rows into blocks of at most `block_size` tokens: input_ids, labels, position_ids, which restart at
    each row, and length.

    A row enters the fullest of the last blocks that has space, so blocks keep the order of the rows approximately.
    """
    blocks: list[list[Row]] = []
    space: dict[int, int] = {}  # by block number
    for row in rows:
        fitting = [number for number in space if space[number] >= row["length"]]
        number = min(fitting, key=space.__getitem__, default=len(blocks))
        if number == len(blocks):
            blocks.append([])
            space[number] = block_size
        blocks[number].append(row)
        space[number] -= row["length"]
        if len(space) > OPEN_BLOCKS:
            del space[min(space, key=space.__getitem__)]
    return datasets.Dataset.from_list([_joined(block) for block in blocks])


def _joined(rows: list[Row]) -> Row:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "position_ids": [position for row in rows for position in range(row["length"])],
        "length": sum(row["length"] for row in rows),
    }


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether the logits of a document in a packed block, marked by its position_ids alone, are those of the document
    alone. Models differ: some take no position_ids, and recurrent layers have a state.
    """
    was_training = model.training
    document = torch.arange(1, PROBE + 1, device=model.device) % model.config.vocab_size
    others = document.flip(0), document
    alone = model.eval()(input_ids=document[None], use_cache=False).logits
    try:
        packed = model(**packed_inputs(torch.cat([other, document]) for other in others)).logits[:, PROBE:]
    except (TypeError, ValueError):  # an unknown argument
        return False
    finally:
        model.train(was_training)
    return bool(torch.allclose(packed.float(), alone.float().expand_as(packed), rtol=1e-3, atol=1e-4))


def packed_inputs(blocks: Iterable[Tensor]) -> dict[str, Any]:
    """A batch of blocks of two documents of PROBE tokens each."""
    ids = torch.stack(list(blocks))
    positions = (torch.arange(ids.shape[1], device=ids.device) % PROBE).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


@dataclass(frozen=True)
class RowCollator:
    """Pads rows or blocks on the right to the longest one. Labels are padded with IGNORED.

    A batch of blocks has `position_ids`, from which a model of transformers makes the attention mask between
    documents, if there is neither an attention mask nor a cache. Each position of padding is a document by itself. A
    batch of rows has an attention mask.
    """

    padding: int  # id of the token

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, padding: int) -> Tensor:
            return torch.tensor([[*row[name], *[padding] * (longest - len(row[name]))] for row in rows])

        batch: dict[str, Any] = {"input_ids": padded("input_ids", self.padding), "labels": padded("labels", IGNORED)}
        if "sample_id" in rows[0]:
            batch["sample_id"] = torch.tensor([row["sample_id"] for row in rows])
        if "position_ids" in rows[0]:
            return batch | {"position_ids": padded("position_ids", 0), "use_cache": False}
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}
