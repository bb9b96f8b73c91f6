"""Metrics of multi-label classification: a sample has any number of labels.

Logits (samples, labels) are of independent labels: the probability of a label is the sigmoid of its logit. Labels
(samples, labels) are 0 and 1.
"""

import numpy as np
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score

THRESHOLD = 0.5  # probability from which a label is predicted, as in transformers' pipelines


def multi_label_metrics(logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD) -> dict[str, float]:
    """Returns f1_micro (over all decisions), f1_macro (the mean over the labels), exact_match (the share of samples
    whose labels are all right) and map, the mean average precision over the labels that occur, which needs no
    threshold.

    A label without occurrences and predictions has an F1 of 0 in the macro mean, as in scikit-learn.
    """
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(f"need logits and labels (samples, labels), got {logits.shape} and {labels.shape}")
    predicted, labels = predict_labels(logits, threshold), labels > 0
    present = labels.any(axis=0)
    metrics = {
        "f1_micro": f1_score(labels, predicted, average="micro", zero_division=0),
        "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
        "exact_match": (labels == predicted).all(axis=1).mean(),
    }
    if present.any() and np.isfinite(logits).all():
        metrics["map"] = average_precision_score(labels[:, present], logits[:, present], average="macro")
    return {name: float(value) for name, value in metrics.items()}


def predict_labels(logits: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Whether the probability of each label reaches the threshold."""
    return expit(logits.astype(np.float64)) >= threshold


def choose_label_threshold(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The threshold, one for all labels, with the highest micro F1 on these samples (of the validation split).

    Candidates are the probabilities of the samples; ties go to the highest. None if no sample has a label.
    """
    probabilities, right = expit(logits.astype(np.float64)).reshape(-1), labels.reshape(-1) > 0
    if not right.any():
        return None
    order = np.argsort(-probabilities, kind="stable")
    candidates, hits = probabilities[order], right[order].cumsum()
    scores = 2 * hits / (np.arange(1, len(order) + 1) + right.sum())
    scores[:-1][candidates[:-1] == candidates[1:]] = 0  # equal probabilities are predicted together
    return float(candidates[scores.argmax()])


def label_counts(logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Counts (samples, 3) for `f1_of_counts`: right, predicted and actual labels of each sample."""
    predicted, labels = predict_labels(logits, threshold), labels > 0
    return np.stack([(predicted & labels).sum(axis=1), predicted.sum(axis=1), labels.sum(axis=1)], axis=1)


def constant_label_score(labels: np.ndarray, metric: str = "f1_micro") -> float:
    """The best `multi_label_metrics` score of predicting the same labels for all samples, the k most frequent ones."""
    order = np.argsort(-labels.sum(axis=0), kind="stable")
    scores = [
        multi_label_metrics(
            np.tile(np.where(np.isin(np.arange(len(order)), order[:k]), 1.0, -1.0), (len(labels), 1)), labels
        )
        for k in range(1, len(order) + 1)
    ]
    return max(score[metric] for score in scores)
