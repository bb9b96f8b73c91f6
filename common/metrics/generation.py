"""Metrics of generated text, from texts, and of next-token predictions, from logits (batch, positions, vocabulary)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from common.objective import IGNORED


def translation_metrics(
    hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Corpus bleu and chrf, 0 to 100, against one reference each, and sacreBLEU's signature of either: the settings
    under which two figures may be compared (arXiv:1804.08771). Texts are as people read them, not tokenized.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"need one reference a hypothesis, got {len(references)} for {len(hypotheses)}")
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    scores = {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


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
