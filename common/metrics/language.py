"""Metrics of language models, from what they say about each next token of a text."""

import math

import numpy as np

from common.metrics.generation import token_metrics
from common.objective import IGNORED


def language_metrics(counts: np.ndarray, size: int) -> dict[str, float]:
    """token_accuracy, perplexity and bits_per_byte from `token_counts` (sequences, 3) of a text of `size` bytes.

    Perplexity, exp of the mean negative log-likelihood of a token, depends on the vocabulary; bits_per_byte, which
    spreads the sum over the text's bytes in UTF-8, does not.
    """
    nats = float(np.asarray(counts, dtype=np.float64)[:, 0].sum())
    return {**token_metrics(counts), "bits_per_byte": nats / (math.log(2) * size)}


def token_agreement(choices: np.ndarray, teacher_choices: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labels (sequences, positions) but the IGNORED for which student and teacher choose the same."""
    return float((choices == teacher_choices)[labels != IGNORED].mean())
