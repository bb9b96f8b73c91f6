"""Metrics of classifiers, from logits (samples, classes) and labels (samples,)."""

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, f1_macro, matthews, and for two classes the binary f1 of class 1."""
    _check(logits, labels)
    predicted = logits.argmax(axis=1)
    metrics = {
        "accuracy": accuracy_score(labels, predicted),
        "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews": matthews_corrcoef(labels, predicted),
    }
    if logits.shape[1] == 2:
        metrics["f1"] = f1_score(labels, predicted, zero_division=0)
    return {name: float(value) for name, value in metrics.items()}


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of samples whose label is among the k largest logits."""
    _check(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be between 1 and the {logits.shape[1]} classes, got {k}")
    top = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((top == labels[:, None]).any(axis=1).mean())


def agreement(student_logits: np.ndarray, teacher_logits: np.ndarray) -> float:
    """Share of samples for which student and teacher choose the same class."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"need two arrays of logits (samples, classes), got {student_logits.shape} and {teacher_logits.shape}"
        )
    return float((student_logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean())


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"need logits (samples, classes), labels (samples,), got {logits.shape}, {labels.shape}")
