"""Texts in the tokens of two vocabularies: the bytes of a token, the places where both have read the same bytes, and
the tokens that both vocabularies contain.

Everything is counted in UTF-8 bytes: a byte-pair encoding may split a character, so that a token ends inside it.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kd.common.utils.errors import UserError
from kd.nlp.data.corpora import encode_documents, is_line

UNALIGNED = -1  # the place of a token where no token of the other vocabulary ends
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte in SentencePiece vocabularies
SPACE = "\u2581"  # a space in SentencePiece vocabularies
PROBE = "Two words."  # a text that a tokenizer must keep

# ---- the bytes of tokens ----


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The text of each token by id, in bytes; empty for special tokens and ids without a token.

    Reads the alphabet of byte-level encodings (GPT-2), and spaces and single bytes of SentencePiece vocabularies.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special, added, vocabulary = set(tokenizer.all_special_ids), tokenizer.get_added_vocab(), tokenizer.get_vocab()
    texts = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if token in added:
            texts[number] = token.encode()
        elif is_byte_level and of_letter.keys() >= set(token):
            texts[number] = bytes(of_letter[letter] for letter in token)
        elif match := BYTE.fullmatch(token):
            texts[number] = bytes.fromhex(match[1])
        else:
            texts[number] = token.replace(SPACE, " ").encode()
    return texts


def check_text_kept(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer whose tokens do not have the bytes of the text, such as one without spaces."""
    texts = token_bytes(tokenizer)
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if not document_ends([texts[token] for token in ids], PROBE.encode())[1]:
        raise UserError(
            f"the tokens of {name} do not have the bytes of the text, as those of byte-level and SentencePiece "
            "tokenizers do: pass a model with such a tokenizer"
        )


# ---- documents as one stream ----


class Stream(NamedTuple):
    """Documents as one stream of tokens, concatenated as by `pack`.

    tokens: (tokens,) ids.
    ends: (tokens,), the number of bytes of the stream up to the end of each token. An end-of-text token, which all
        tokenizers place before and after the same documents, counts as one byte.
    exact: (tokens,) bool, False in documents whose tokens have other bytes than the text, such as after a Unicode
        normalization. The ends are then estimates.
    """

    tokens: np.ndarray
    ends: np.ndarray
    exact: np.ndarray


def read_stream(documents: list[str], tokenizer: PreTrainedTokenizerBase, texts: list[bytes]) -> Stream:
    """The stream of `documents`; `texts` are the `token_bytes` of the tokenizer."""
    end = tokenizer.eos_token_id
    tokens, ends, exact, start = [[end]], [np.array([1])], [np.array([True])], 1
    for document, encoding in encode_documents(documents, tokenizer):
        ids, content = encoding["input_ids"], document.encode()
        found, is_exact = document_ends([texts[token] for token in ids], content)
        tokens.append(ids)
        ends.append(start + found)
        exact.append(np.full(len(ids), is_exact))
        start += len(content)
        if not is_line(document):
            start += 1
            tokens.append([end])
            ends.append(np.array([start]))
            exact.append(np.array([True]))
    return Stream(np.concatenate(tokens).astype(np.int64), np.concatenate(ends), np.concatenate(exact))


def document_ends(pieces: list[bytes], content: bytes) -> tuple[np.ndarray, bool]:
    """The number of bytes of a document up to the end of each of its tokens, and whether it is exact.

    A space that the tokenizer adds in front, as SentencePiece does, is not counted.
    """
    whole, ends = b"".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    if whole == content:
        return ends, True
    if whole == b" " + content:
        return ends - 1, True
    return np.linspace(0, len(content), len(pieces) + 1)[1:].round().astype(np.int64), False


# ---- the teacher's tokens of the student's blocks ----


class TeacherBlocks(NamedTuple):
    """The teacher's tokens of the text of each block of the student, and the positions that correspond.

    tokens: (tokens,), the teacher's stream.
    starts, stops: (blocks,), the first token of each block and the one after the last. A token that contains the first
        byte of the block is the first one, even if it starts before.
    positions: (blocks, block_size), for each input of the student the position in the teacher's block that has read
        the same bytes, or UNALIGNED.
    aligned: Share of the student's labels whose input is aligned.
    cut: Share of them that would be if the context of the teacher were longer.
    """

    tokens: Tensor
    starts: np.ndarray
    stops: np.ndarray
    positions: Tensor
    aligned: float
    cut: float


def same_ends(student: Stream, teacher: Stream) -> np.ndarray:
    """For each token of the student, the token of the teacher that ends at the same byte, or UNALIGNED.

    Of several tokens with the same end, which are empty but for the first, the last is meant on both sides.
    """
    known = np.flatnonzero(teacher.exact)
    place = np.searchsorted(teacher.ends[known], student.ends, side="right") - 1
    is_last = np.append(student.ends[1:] != student.ends[:-1], True)
    matches = (place >= 0) & (teacher.ends[known][place] == student.ends) & student.exact & is_last
    return np.where(matches, known[place], UNALIGNED)


def teacher_blocks(student: Stream, teacher: Stream, block_size: int, most: int) -> TeacherBlocks:
    """The teacher's tokens of the blocks that `pack` makes of the student's stream.

    `most`: Maximum number of tokens of the teacher in a block; positions after them are not aligned.
    """
    labels = len(student.tokens) - 1
    places = np.pad(same_ends(student, teacher)[:-1], (0, -labels % block_size), constant_values=UNALIGNED)
    places = places.reshape(-1, block_size)
    begins = np.concatenate([[0], student.ends[block_size - 1 :: block_size]])[: len(places)]
    starts = np.searchsorted(teacher.ends, begins, side="right")
    positions = np.where(places == UNALIGNED, UNALIGNED, places - starts[:, None])
    is_cut = positions >= most
    positions[is_cut] = UNALIGNED
    stops = starts + positions.max(axis=1).clip(min=0) + 1  # one token at least: a model needs an input
    aligned = float((positions != UNALIGNED).sum() / labels)
    return TeacherBlocks(
        torch.from_numpy(teacher.tokens), starts, stops, torch.from_numpy(positions), aligned, is_cut.sum() / labels
    )


# ---- tokens that both vocabularies contain ----


class TokenGroups(NamedTuple):
    """The tokens of two vocabularies in groups that both can predict, for `kd.common.losses.grouped_kl`.

    student, teacher: (vocabulary,), the group of each token; `number` for tokens that are left out.
    number: Number of groups.
    shared: Number of tokens that both vocabularies contain.
    """

    student: Tensor
    teacher: Tensor
    number: int
    shared: int


def token_groups(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, sizes: tuple[int, int]
) -> TokenGroups:
    """Groups the tokens by those that both vocabularies contain: the same bytes, or both the end of the text.

    Any other token counts for the shared token that it starts with: the first token of its text in the other
    vocabulary, or in turn in both until it is shared. So if the teacher alone has the token `there`, and the student
    reads `the` and `re`, then the probability of `there` is part of that of `the`. Tokens that start with no shared
    one, such as special tokens, are one more group if both vocabularies have some. Otherwise they are left out: from
    a probability of zero, the divergence is infinite.

    `sizes`: Number of logits of student and teacher, which may exceed the number of tokens. Raises UserError if no
    token is shared.
    """
    both = (student, teacher)
    texts = [token_bytes(tokenizer) for tokenizer in both]
    common = sorted((set(texts[0]) & set(texts[1])) - {b""})
    if not common:
        raise UserError("no token is part of both vocabularies: pass --method uld")
    numbers = {text: number for number, text in enumerate(common, 1)}  # 0 is the end of the text
    rest = len(common) + 1
    groups = []
    for owner, size in enumerate(sizes):
        firsts = first_shared(sorted(set(texts[owner]) - numbers.keys() - {b""}), owner, both, texts, numbers.keys())
        group = np.full(size, rest)
        group[: len(texts[owner])] = [numbers.get(firsts.get(text, text), rest) for text in texts[owner][:size]]
        group[both[owner].eos_token_id] = 0
        groups.append(torch.from_numpy(group))
    has_rest = all((group == rest).any() for group in groups)
    return TokenGroups(groups[0], groups[1], rest + has_rest, len(common) + 1)


def first_shared(
    alone: list[bytes],
    owner: int,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    texts: list[list[bytes]],
    shared: Iterable[bytes],
) -> dict[bytes, bytes]:
    """The shared text with which each of the texts `alone` of one vocabulary starts, if there is one."""
    shared, found, reader = set(shared), {}, 1 - owner
    pending = {text: text for text in alone}  # the text, and the part of it that is left to divide
    while pending:
        pieces = first_pieces(list(pending.values()), tokenizers[reader], texts[reader])
        for (text, part), piece in zip(list(pending.items()), pieces, strict=True):
            if piece is None or len(piece) >= len(part):
                piece = next((part[:n] for n in range(len(part) - 1, 0, -1) if part[:n] in shared), b"")
            pending[text] = piece
            if piece in shared or not piece:
                found[text] = pending.pop(text)
        reader = 1 - reader
    return {text: piece for text, piece in found.items() if piece}


def first_pieces(parts: list[bytes], tokenizer: PreTrainedTokenizerBase, texts: list[bytes]) -> list[bytes | None]:
    """The first token of each text in a vocabulary; None for incomplete characters, and if the text does not start
    with the bytes of that token.
    """
    decoded = [part.decode(errors="ignore") for part in parts]
    encoded = tokenizer(decoded, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    firsts = [texts[ids[0]] if ids else b"" for ids in encoded]
    return [
        first if first and part.startswith(first) and text.encode() == part else None
        for part, text, first in zip(parts, decoded, firsts, strict=True)
    ]
