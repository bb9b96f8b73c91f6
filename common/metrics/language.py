"""Metrics of language models, from what they say about each next token of a text."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.objective import IGNORED


def token_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, 3): the sum of the labels' negative log-likelihoods, how many labels are the likeliest token, and how
    many there are that count, which is all that `token_metrics` needs to know of logits too many to be kept.
    """
    counts = labels != IGNORED
    nll = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels) & counts
    return torch.stack([nll.sum(1), right.sum(1), counts.sum(1)], dim=1)


def token_metrics(counts: np.ndarray) -> dict[str, float]:
    """token_accuracy and perplexity of next tokens, given those before them, from `token_counts` (sequences, 3)."""
    nll, right, number = np.asarray(counts, dtype=np.float64).sum(axis=0)
    return {"token_accuracy": float(right / number), "perplexity": float(np.exp(nll / number))}


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
