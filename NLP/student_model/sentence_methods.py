"""Methods for sentence encoders: losses between the embeddings of student and teacher, and SimCSE for the control.

Each function of METHODS returns a Method whose terms read the student's hidden states and the teacher's embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods import Method, parse_method
from kd.common.objective import FeatureLoss, FeatureTerm, Term
from kd.common.outputs import Outputs
from kd.common.training.inference import Collate
from kd.nlp.student_model.arguments import SENTENCE_METHODS
from kd.nlp.student_model.pooling import Pooling, pool

HIDDEN, EMBEDDING = "hidden", "embedding"  # features of student and teacher
LAST_HIDDEN = {HIDDEN: ""}  # the output of the encoder itself


@dataclass(frozen=True)
class EmbeddingPair:
    """The widths of the embeddings of student and teacher, and the student's pooling."""

    width: int
    teacher_width: int
    pooling: Pooling

    def match(self, name: str, weight: float, loss: FeatureLoss, projector: nn.Module | None = None) -> Method:
        """A loss between the embeddings (batch, width)."""
        term = FeatureTerm(HIDDEN, EMBEDDING, loss, projector, partial(_pooled, pooling=self.pooling))
        return Method({name: (weight, term)}, LAST_HIDDEN, {EMBEDDING: EMBEDDING})


def embedding(pair: EmbeddingPair, *, weight: float = 1.0) -> Method:
    """1 - cosine of the two embeddings of a text, which is half the squared distance of their unit vectors. A student
    of another width has a linear projector, which is not saved with it.
    """
    projector = None if pair.width == pair.teacher_width else nn.Linear(pair.width, pair.teacher_width)
    return pair.match("embedding", weight, losses.feature_cosine, projector)


def similarity(pair: EmbeddingPair, *, weight: float = 10.0) -> Method:
    """Squared differences of the cosine similarities of all pairs of texts in the batch."""
    return pair.match("similarity", weight, losses.similarity_l2)


def rkd(pair: EmbeddingPair, *, distance: float = 1.0, angle: float = 2.0) -> Method:
    """Relative distances and angles between texts (RKD, arXiv:1904.05068)."""
    return pair.match("distances", distance, losses.rkd_distance) + pair.match("angles", angle, losses.rkd_angle)


def sp(pair: EmbeddingPair, *, weight: float = 100.0) -> Method:
    """Normalized similarities of the texts of a batch (SP, arXiv:1907.09682)."""
    return pair.match("similarities", weight, losses.similarity_preserving)


def pkt(pair: EmbeddingPair, *, weight: float = 30000.0) -> Method:
    """Neighbourhoods of embeddings (PKT, arXiv:1803.10837)."""
    return pair.match("neighbourhoods", weight, losses.pkt)


METHODS: dict[str, Callable[..., Method]] = dict(
    zip(SENTENCE_METHODS, (embedding, similarity, rkd, sp, pkt), strict=True)
)


def parse_methods(spec: str) -> Callable[[EmbeddingPair], Method]:
    """The sum of methods NAME[:argument=value:...] joined with +. Raises UserError as `parse_method` does."""
    parts = [parse_method(part, METHODS) for part in spec.split("+")]

    def method(pair: EmbeddingPair) -> Method:
        return sum((part(pair) for part in parts), Method({}))

    return method


def _pooled(features: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """The embeddings of hidden states (batch, positions, width). Embeddings (batch, width) are returned unchanged."""
    return pool(features, mask, pooling) if features.dim() == 3 else features


# ---- the control ----


def simcse(pooling: Pooling, temperature: float) -> Method:
    """Unsupervised SimCSE (arXiv:2104.08821): each text finds its copy among the texts of the batch. Two dropout masks
    make the copies differ. Batches need `two_views`.
    """

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        embeddings = pool((student.features or {})[HIDDEN], student.mask, pooling)
        first, second = embeddings.chunk(2)
        return losses.info_nce(first, second, temperature)

    found: Term = term
    return Method({"contrastive": (1.0, found)}, LAST_HIDDEN)


def two_views(collate: Collate) -> Collate:
    """A collator of batches with each row twice: all rows, then all rows again."""

    def collate_twice(rows: Any) -> dict[str, torch.Tensor]:
        return collate([*rows, *rows])

    return collate_twice
