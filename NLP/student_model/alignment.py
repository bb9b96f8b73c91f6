"""The outputs of a teacher at the tokens of a student with another tokenizer.

Both read the same texts, each in its own tokens. Hidden states are matched through the characters of the tokens: a
token of the student is matched with the mean of the teacher's hidden states of the tokens that share a character with
it. Tokens that share none, such as separators, are masked out. The token that the student's head reads is matched with
the state that the teacher's head reads. Logits of tags are matched word by word.
"""

from typing import Any

import numpy as np
import torch
from einops import einsum
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.outputs import FeatureHooks, Outputs
from kd.common.training.inference import NOT_INPUTS, column_array
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.pooling import Pooling
from kd.nlp.student_model.words import move_to_words

SPECIAL = -1  # source of the tokens that are not in the text


def token_spans(texts: Texts) -> list[np.ndarray]:
    """The characters of each token of each training text, (tokens, 3): source, start and end.

    The source is the text of a pair (0 or 1), or the number of a word in a list of words; SPECIAL for tokens that are
    not in the text. The tokenizer must be fast.
    """
    rows, tokenizer = texts.data.splits["train"], texts.collate.tokenizer
    is_words = texts.data.task == "token_classification"
    pairs = rows["text_pair"][:] if "text_pair" in rows.column_names else None
    encoded = tokenizer(rows["text"][:], pairs, truncation=True, is_split_into_words=is_words)
    found = []
    for number, encoding in enumerate(encoded.encodings or []):
        sources = encoded.word_ids(number) if is_words else encoded.sequence_ids(number)
        numbers = [SPECIAL if source is None else source for source in sources]
        found.append(np.column_stack([numbers, np.reshape(encoding.offsets, (-1, 2))]).astype(np.int32))
    return found


def overlap(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Weights (student tokens, teacher tokens) of two tokenizations of a text, as of `token_spans`.

    Each row is the mean over the teacher's tokens that share a character with the student's token, or zero.
    """
    source, start, end = (student[:, None, i] for i in range(3))
    common = np.minimum(end, teacher[:, 2]) > np.maximum(start, teacher[:, 1])
    shared = common & (source == teacher[:, 0]) & (source != SPECIAL)
    return (shared / shared.sum(1, keepdims=True).clip(min=1)).astype(np.float32)


def match_pooled(weights: np.ndarray, student: Pooling, teacher: Pooling) -> None:
    """Sets the weights of the token that the student's head reads to those of the state that the teacher's head reads.

    Changes nothing if a head reads all tokens.
    """
    places = {"cls": 0, "last": -1}
    if student in places and teacher != "tokens":
        pooled = weights[places[student]]
        pooled[:] = 1 / len(pooled) if teacher == "mean" else 0
        if teacher in places:
            pooled[places[teacher]] = 1


class AlignedOutputs(TeacherOutputs):
    """The outputs of a teacher, moved to the student's tokens, with the mask of those that have hidden states.

    Args:
        outputs: By sample id, in the teacher's tokens.
        student, teacher: The same texts in the tokens of either model. Texts of either tokenizer are padded on the
            right.
        pooling: What the heads of student and teacher read; None if the outputs have no hidden states.
    """

    def __init__(
        self, outputs: TeacherOutputs, student: Texts, teacher: Texts, pooling: tuple[Pooling, Pooling] | None
    ) -> None:
        self.outputs, self.pooling = outputs, pooling
        self.lengths = column_array(student.train, "length")
        both = (student, teacher)
        self.spans = [token_spans(texts) for texts in both] if pooling else []
        is_words = student.data.task == "token_classification"
        self.words = [texts.train["first_tokens"][:] for texts in both] if is_words else []

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        outputs, rows = self.outputs.batch(sample_ids, device=device), sample_ids.tolist()
        positions = positions or int(self.lengths[rows].max())
        logits, features = outputs.logits, outputs.features or {}
        if self.words and logits is not None:
            student, teacher = ([places[row] for row in rows] for places in self.words)
            logits = move_to_words(logits, teacher, student, positions)
        if not self.pooling or not features:
            return Outputs(logits=logits, features={})
        weights = self._weights(rows, positions, next(iter(features.values())).shape[1]).to(device)
        pattern = "batch student teacher, batch teacher width -> batch student width"
        moved = {name: einsum(weights, states.float(), pattern) for name, states in features.items()}
        return Outputs(logits=logits, features=moved, mask=weights.sum(2) > 0)

    def _weights(self, rows: list[int], positions: int, teacher_positions: int) -> Tensor:
        """(rows, student positions, teacher positions), zeros in the padding."""
        assert self.pooling is not None
        found = torch.zeros(len(rows), positions, teacher_positions)
        for number, row in enumerate(rows):
            weights = overlap(self.spans[0][row], self.spans[1][row])
            match_pooled(weights, *self.pooling)
            found[number, : weights.shape[0], : weights.shape[1]] = torch.from_numpy(weights)
        return found


class LiveOutputs(TeacherOutputs):
    """The outputs of a teacher that runs in every step, on its own tokens of the texts of the batch.

    Args:
        paths: {name: path} of the submodules whose outputs are features.
    """

    def __init__(self, teacher: PreTrainedModel, texts: Texts, paths: dict[str, str]) -> None:
        self.teacher, self.texts, self.paths = teacher.eval().requires_grad_(False), texts, paths

    @torch.no_grad()
    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        batch: dict[str, Any] = self.texts.collate([self.texts.train[row] for row in sample_ids.tolist()])
        teacher = self.teacher.to(device) if device else self.teacher
        hooks = FeatureHooks(teacher, self.paths)
        try:
            output = teacher(**{name: x.to(device) for name, x in batch.items() if name not in NOT_INPUTS})
            return Outputs(logits=output.get("logits"), features=hooks.take())
        finally:
            hooks.remove()
