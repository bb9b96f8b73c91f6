"""Prompts and their completions, or chats, for language models: the columns, and the texts of each row.

A dataset has the columns `prompt` and `completion`, or the column `messages`: lists of {"role": ..., "content": ...},
in CSV files as JSON. Nothing is added between prompt and completion: with a byte-level vocabulary, such as GPT-2's, a
completion begins with the space that separates both.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.sources import Splits, sample, short_name, with_validation
from kd.common.utils.errors import UserError, reason_of
from kd.nlp.data.columns import infer_contents, is_text
from kd.nlp.data.corpora import Corpus, corpus_of, read_corpus, with_texts_of

PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"
ASSISTANT = "assistant"
Message = dict[str, str]


class Piece(NamedTuple):
    """A part of a row's text. Only completions, such as the messages of an assistant, count in losses and metrics."""

    text: str
    is_completion: bool


@dataclass(frozen=True)
class PromptData:
    """Every split has the columns prompt and completion (texts), or messages (lists of {role, content})."""

    name: str
    splits: Splits
    fingerprint: str  # hash of the contents, independent of their source
    notes: list[str] = field(default_factory=list)  # for the report

    @property
    def has_chats(self) -> bool:
        return MESSAGES in next(iter(self.splits.values())).column_names

    def check_template(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raises UserError if chats need a template that the teacher's tokenizer lacks. None: no teacher is named."""
        if self.has_chats and getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                f"{self.name} has chats, and the teacher's tokenizer has no chat template: pass a chat model as "
                "--teacher, save chat_template.jinja in its folder, or use the columns prompt and completion"
            )

    def pieces(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Piece]]:
        """Yields the rows of a split as alternating prompts and completions. A chat becomes several rows if its
        template changes earlier messages when one is added, such as templates that remove earlier reasoning.
        """
        rows = self.splits[split]
        if not self.has_chats:
            for prompt, completion in zip(rows[PROMPT][:], rows[COMPLETION][:], strict=True):
                yield [Piece(prompt, False), Piece(completion, True)]
            return
        for number, messages in enumerate(rows[MESSAGES][:]):
            try:
                yield from chat_pieces(messages, tokenizer)
            except Exception as error:  # a template is code, which may raise any error
                raise UserError(
                    f"chat {number} of {split} does not fit the tokenizer's chat template ({reason_of(error)}): "
                    "change its roles, or pass another --teacher"
                ) from None


def chat_pieces(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Piece]]:
    """Yields the pieces of a chat; see `PromptData.pieces`. Whatever follows the last message of the assistant is not
    used. Raises UserError if the template's prompt for an answer is not the beginning of the text with the answer.
    """
    pieces: list[Piece] = []
    for place in (number for number, message in enumerate(messages) if message["role"] == ASSISTANT):
        before = _render(messages[:place], tokenizer, prompt=True)
        after = _render(messages[: place + 1], tokenizer).rstrip()  # a separator belongs to the next prompt
        earlier = "".join(piece.text for piece in pieces)
        if not after.startswith(before) or len(after) == len(before):
            raise UserError("its add_generation_prompt is not what precedes an answer")
        if not before.startswith(earlier):
            yield pieces
            pieces, earlier = [], ""
        pieces += [Piece(before[len(earlier) :], False), Piece(after[len(before) :], True)]
    yield pieces


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


# ---------------------------------------------------------------- loading


def load_language_data(args: Any, needs_train: bool = True) -> Corpus | PromptData:
    """The data of distill_gpt.py, whose arguments are `args`: prompts and completions if the dataset has columns for
    them and --text_column is not passed, otherwise a corpus. `needs_train`: see `read_corpus`.
    """
    most = args.max_train_samples, args.max_eval_samples
    raw, notes = read_corpus(args.dataset, needs_train)
    if args.text_column is None and (columns := _choose_columns(raw, args)):
        return prompts_of(args.dataset, raw, columns, notes, *most)
    corpus = corpus_of(args.dataset, raw, notes, args.text_column, *most)
    if args.eval_dataset is None:
        return corpus
    return with_texts_of(corpus, args.eval_dataset, args.text_column, args.max_eval_samples)


def _choose_columns(raw: Splits, args: Any) -> dict[str, str]:
    """The columns by what they contain: prompt and completion, or messages; none for a corpus.

    Raises UserError if a column that is named, or that belongs to another one, is missing.
    """
    flags = {name: getattr(args, f"{name}_column") for name in (PROMPT, COMPLETION, MESSAGES)}
    names = list(dict.fromkeys(name for rows in raw.values() for name in rows.column_names))
    for contents, column in flags.items():
        if column is not None and column not in names:
            raise UserError(f"--{contents}_column {column} is not in the data, which have {', '.join(names)}")
    if flags[MESSAGES] and (flags[PROMPT] or flags[COMPLETION]):
        raise UserError("--messages_column holds whole chats: leave out --prompt_column and --completion_column")
    found = {contents: column or contents for contents, column in flags.items() if (column or contents) in names}
    if flags[MESSAGES] or (MESSAGES in found and not flags[PROMPT] and not flags[COMPLETION]):
        return {MESSAGES: found[MESSAGES]}
    pair = {contents: found[contents] for contents in (PROMPT, COMPLETION) if contents in found}
    if len(pair) == 1 and (flags[PROMPT] or flags[COMPLETION] or ("text" not in names and len(names) > 1)):
        missing = COMPLETION if PROMPT in pair else PROMPT
        raise UserError(
            f"the data have a column of {next(iter(pair))}s, {next(iter(pair.values()))!r}, and none of {missing}s: "
            f"pass --{missing}_column (columns: {', '.join(names)}), or --text_column for plain texts"
        )
    return pair if len(pair) == 2 else {}


def prompts_of(
    dataset: str,
    raw: Splits,
    columns: dict[str, str],
    notes: list[str],
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> PromptData:
    """Prompts and completions, or chats, of the splits train, validation and test. `columns` as of `_choose_columns`.
    A missing validation split is made from train, the same in every run. Rows without a completion are left out.

    Raises UserError if a column is missing, or holds neither texts nor chats.
    """
    notes = [*notes, _describe(columns)]
    raw = {split: rows for split, rows in raw.items() if split in ("train", "validation", "test")}
    read = _chats if MESSAGES in columns else _pairs
    splits = {split: read(split, rows, columns, notes) for split, rows in raw.items()}
    if "train" in splits:
        splits = with_validation(splits, np.zeros(len(splits["train"])), notes)
    for split, rows in splits.items():
        splits[split] = sample(rows, max_train_samples if split == "train" else max_eval_samples, split, notes)
    _note_repeated_prompts(splits, notes)
    contents = [[split, {name: rows[name][:] for name in rows.column_names}] for split, rows in splits.items()]
    return PromptData(short_name(dataset), splits, data_fingerprint(contents), notes)


def _describe(columns: dict[str, str]) -> str:
    if MESSAGES in columns:
        return f"column {columns[MESSAGES]!r} contains chats, in which only the assistant's messages count"
    return (
        f"column {columns[PROMPT]!r} contains prompts and {columns[COMPLETION]!r} completions, and only completions "
        "count"
    )


def _keep(
    split: str, rows: list[Any], is_complete: Callable[[Any], bool], missing: str, notes: list[str]
) -> list[Any]:
    """The complete rows. Notes the number of the others. Raises UserError if there is none."""
    kept = [row for row in rows if is_complete(row)]
    if not kept:
        raise UserError(f"no row of {split} has {missing}: check the columns, or name others")
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept):,} of {len(rows):,} rows of {split} lack {missing} and are left out")
    return kept


def _pairs(split: str, rows: datasets.Dataset, columns: dict[str, str], notes: list[str]) -> datasets.Dataset:
    """The columns prompt and completion of a split as texts."""
    texts = []
    for contents, column in columns.items():
        feature = rows.features.get(column)
        if not isinstance(feature, datasets.Value):
            reason = "is missing" if feature is None else f"holds {infer_contents({split: rows})[column]}, not texts"
            raise UserError(f"column {column!r} of {split} {reason}: pass --{contents}_column")
        texts.append([None if value is None else str(value) for value in rows[column][:]])
    pairs = list(zip(*texts, strict=True))
    missing = f"a text in both {columns[PROMPT]!r} and {columns[COMPLETION]!r}"
    kept = _keep(split, pairs, lambda pair: all(text and text.strip() for text in pair), missing, notes)
    prompts, completions = zip(*kept, strict=True)
    return datasets.Dataset.from_dict({PROMPT: prompts, COMPLETION: completions})


def _chats(split: str, rows: datasets.Dataset, columns: dict[str, str], notes: list[str]) -> datasets.Dataset:
    """The column messages of a split as lists of messages that have a role and a content."""
    column = columns[MESSAGES]
    if column not in rows.features:
        raise UserError(f"column {column!r} of {split} is missing: pass --messages_column")
    values = rows[column][:]
    if is_text(rows.features[column]):
        values = [_parse_chat(value, number, split) for number, value in enumerate(values)]
    chats = [_check_chat(chat or [], number, split) for number, chat in enumerate(values)]
    kept = _keep(split, chats, _has_answer, "an assistant's message", notes)
    return datasets.Dataset.from_dict({MESSAGES: kept})


def _parse_chat(text: str | None, number: int, split: str) -> Any:
    try:
        return json.loads(text or "[]")
    except json.JSONDecodeError as error:
        raise UserError(
            f"chat {number} of {split} is not JSON ({error}): write lists of objects with role and content"
        ) from None


def _check_chat(chat: Any, number: int, split: str) -> list[Message]:
    """The role and the content of each message. Raises UserError if they are not texts."""
    for message in chat if isinstance(chat, list) else [chat]:
        names = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in names):
            raise UserError(
                f"chat {number} of {split} has a message without the texts role and content: write chats as lists of "
                'objects such as {"role": "user", "content": "..."}, or pass --messages_column'
            )
    return [{"role": message["role"], "content": message["content"]} for message in chat]


def _has_answer(chat: list[Message]) -> bool:
    return any(message["role"] == ASSISTANT and message["content"].strip() for message in chat)


def _note_repeated_prompts(splits: Splits, notes: list[str]) -> None:
    """Notes how many prompts of each other split are prompts of train."""
    prompts = {split: [_prompt_of(row) for row in rows] for split, rows in splits.items()}
    trained = set(prompts.get("train", []))
    for split, texts in prompts.items():
        seen = sum(text in trained for text in texts)
        if split != "train" and seen:
            notes.append(f"{seen:,} of {len(texts):,} prompts of {split} are also in train")


def _prompt_of(row: dict[str, Any]) -> str:
    """The prompt, or the messages before the assistant's first one."""
    if PROMPT in row:
        return str(row[PROMPT])
    roles = [message["role"] for message in row[MESSAGES]]
    return json.dumps(row[MESSAGES][: roles.index(ASSISTANT)])
