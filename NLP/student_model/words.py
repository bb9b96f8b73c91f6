"""Logits of words, which are those of their first tokens, for token classification."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

Places = Sequence[Sequence[int]]  # by row: the place of the first token of each word; -1 for words that were cut off


def word_logits(logits: Sequence[Tensor], first_tokens: Places, outside: int = 0) -> np.ndarray:
    """Logits of tokens, (positions, tags) per row -> logits of words (rows, words, tags), zeros after the last word.

    Words that the tokenizer cut off are predicted as the tag with the id `outside`. So all words count, and models
    with different tokenizers are compared on the same words.
    """
    words = np.zeros((len(logits), max(map(len, first_tokens)), logits[0].shape[-1]), dtype=np.float32)
    for row, tokens, places in zip(words, logits, first_tokens, strict=True):
        found = np.asarray(places)
        row[: len(found)] = np.where(found[:, None] >= 0, tokens.numpy()[found], 0)
        row[: len(found), outside][found < 0] = 1.0
    return words


def move_to_words(logits: Tensor, sources: Places, targets: Places, positions: int) -> Tensor:
    """Moves the logits of each word from a place in `logits` (batch, positions, tags) to its place in the tokens of
    another tokenizer (batch, `positions`, tags). Words that either tokenizer cut off, and other tokens, have zeros.
    """
    moved = logits.new_zeros(len(logits), positions, logits.shape[-1])
    for new, old, places, new_places in zip(moved, logits, sources, targets, strict=True):
        pairs = [pair for pair in zip(places, new_places, strict=True) if min(pair) >= 0]
        if pairs:
            rows, columns = zip(*pairs, strict=True)
            new[list(columns)] = old[list(rows)]
    return moved
