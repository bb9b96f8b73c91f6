"""Logits of words, which are those of their first tokens, for token classification."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kd.common.outputs import Outputs
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.nlp.data.loading import Texts

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


class WordOutputs(TeacherOutputs):
    """The outputs of a teacher with another tokenizer: its logits of each word, at the student's first token of the
    word, and zeros elsewhere. `teacher` and `student` are the same rows in the tokens of either model.
    """

    def __init__(self, cache: TeacherOutputs, teacher: Texts, student: Texts) -> None:
        self.cache = cache
        self.places: list[Places] = [texts.train["first_tokens"][:] for texts in (teacher, student)]

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        logits = self.cache.batch(sample_ids, device=device).logits
        assert logits is not None
        places = [[rows[sample] for sample in sample_ids.tolist()] for rows in self.places]
        length = positions or 1 + max(max(row) for row in places[1])
        moved = logits.new_zeros(len(logits), length, logits.shape[-1])
        for new, old, sources, targets in zip(moved, logits, *places, strict=True):
            pairs = [
                (source, target) for source, target in zip(sources, targets, strict=True) if min(source, target) >= 0
            ]
            if pairs:
                rows, columns = zip(*pairs, strict=True)
                new[list(columns)] = old[list(rows)]
        return Outputs(logits=moved, features={})
