"""The metrics of a task by its type, with one interface: `task_metrics("multi_label", names).metrics(logits, labels)`.

| task | logits | labels |
|---|---|---|
| classification | (samples, classes) | class ids (samples,) |
| regression | (samples,) or (samples, 1) | scores (samples,) |
| multi_label | (samples, labels) | 0 and 1 (samples, labels) |
| token_classification | (samples, words, tags) | tag ids (samples, words), IGNORED after the last word |
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kd.common.metrics import entities as spans
from kd.common.metrics import label_sets, quality
from kd.common.metrics.verdict import Measurement, is_constant, measure_classes, measure_counts, measure_regression
from kd.common.utils.tasks import IGNORED, TaskType

Metrics = dict[str, float]


class TaskMetrics:
    """The metrics of classification, and the interface of those of other tasks.

    Args:
        names: names of the classes, labels or tags by id.

    Attributes:
        primary: The metric of headlines and verdicts.
    """

    primary = "accuracy"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        """The metrics of the task, including out-of-scope metrics if it has that class."""
        found = quality.classification_metrics(logits, labels)
        return found | quality.scope_metrics(logits, labels, self.names)

    def calibration(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        """Returns nll and ece; nothing where there are no probabilities."""
        return quality.calibration_metrics(logits, labels)

    def choose_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        """The threshold that is best on these samples (of the validation split); None for tasks without one."""
        return quality.choose_threshold(logits, labels, self.names)

    def threshold_metrics(self, logits: np.ndarray, labels: np.ndarray, threshold: float) -> Metrics:
        """The metrics with this threshold."""
        return quality.threshold_metrics(logits, labels, self.names, threshold)

    def agreement(self, logits: np.ndarray, others: np.ndarray, labels: np.ndarray | None = None) -> float:
        """Share of samples for which two models predict the same."""
        return quality.agreement(logits, others)

    def measure(self, logits: np.ndarray, labels: np.ndarray, metric: str) -> Measurement:
        """The metric on any of the samples, for a verdict."""
        return measure_classes(logits, labels, metric)

    def chance(self, labels: np.ndarray, metric: str) -> float | None:
        """The score of the best constant prediction; None if it is not defined."""
        return quality.constant_score(labels, len(self.names), metric)

    def warning(self, name: str, metrics: Metrics, labels: np.ndarray, metric: str, split: str) -> str | None:
        """A warning if the teacher `name` is no better than chance."""
        return quality.classifier_warning(name, metric, metrics[metric], labels, len(self.names), split)


class RegressionMetrics(TaskMetrics):
    primary = "spearman"

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        return quality.regression_metrics(logits.reshape(-1), labels)

    def calibration(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        return {}

    def choose_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        return None

    def agreement(self, logits: np.ndarray, others: np.ndarray, labels: np.ndarray | None = None) -> float:
        """The rank correlation of two models."""
        return quality.regression_metrics(logits.reshape(-1), others.reshape(-1))["spearman"]

    def measure(self, logits: np.ndarray, labels: np.ndarray, metric: str) -> Measurement:
        return measure_regression(logits.reshape(-1), labels, metric)

    def chance(self, labels: np.ndarray, metric: str) -> float | None:
        return None

    def warning(self, name: str, metrics: Metrics, labels: np.ndarray, metric: str, split: str) -> str | None:
        return quality.regressor_warning(name, metrics, labels, metric, split)


class MultiLabelMetrics(TaskMetrics):
    """Labels are predicted from a probability of 1/2 on; metrics that end in _threshold use a threshold that is chosen
    on the validation split.
    """

    primary = "f1_micro"

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        return label_sets.multi_label_metrics(logits, labels)

    def calibration(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        """Over all decisions: each label of a sample is a classification with two classes."""
        decisions = np.stack([np.zeros(logits.size), logits.reshape(-1)], axis=1)
        return quality.calibration_metrics(decisions, labels.reshape(-1).astype(np.int64))

    def choose_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        return label_sets.choose_label_threshold(logits, labels)

    def threshold_metrics(self, logits: np.ndarray, labels: np.ndarray, threshold: float) -> Metrics:
        found = label_sets.multi_label_metrics(logits, labels, threshold)
        named = {f"{name}_threshold": found[name] for name in ("f1_micro", "f1_macro", "exact_match")}
        return {"label_threshold": threshold} | named

    def agreement(self, logits: np.ndarray, others: np.ndarray, labels: np.ndarray | None = None) -> float:
        """Share of samples for which both models predict the same labels."""
        return float((label_sets.predict_labels(logits) == label_sets.predict_labels(others)).all(axis=1).mean())

    def measure(self, logits: np.ndarray, labels: np.ndarray, metric: str) -> Measurement:
        counts = label_sets.label_counts(logits, labels)
        return measure_counts(counts, is_constant(label_sets.predict_labels(logits)))

    def chance(self, labels: np.ndarray, metric: str) -> float | None:
        return label_sets.constant_label_score(labels, metric)

    def warning(self, name: str, metrics: Metrics, labels: np.ndarray, metric: str, split: str) -> str | None:
        return _chance_warning(self, name, metrics, labels, metric, split)


class TokenMetrics(TaskMetrics):
    """The F1 of entities if the tags describe entities (IOB2); otherwise the accuracy of the tags."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.has_entities = spans.is_iob(self.names)
        self.primary = "f1" if self.has_entities else "accuracy"

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        if self.has_entities:
            return spans.entity_metrics(*self._tags(logits, labels))
        return quality.classification_metrics(*_labelled(logits, labels))

    def calibration(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        return quality.calibration_metrics(*_labelled(logits, labels))

    def choose_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        return None

    def agreement(self, logits: np.ndarray, others: np.ndarray, labels: np.ndarray | None = None) -> float:
        """Share of words to which both models assign the same tag."""
        equal = logits.argmax(axis=-1) == others.argmax(axis=-1)
        return float((equal if labels is None else equal[labels != IGNORED]).mean())

    def measure(self, logits: np.ndarray, labels: np.ndarray, metric: str) -> Measurement:
        constant = is_constant(logits[labels != IGNORED].argmax(axis=-1))
        if metric == "f1":
            return measure_counts(spans.entity_counts(*self._tags(logits, labels)), constant)
        right = ((logits.argmax(axis=-1) == labels) & (labels != IGNORED)).sum(axis=1)
        words = (labels != IGNORED).sum(axis=1)
        return measure_counts(np.stack([right, words, words], axis=1), constant)  # F1 of equally many is the accuracy

    def chance(self, labels: np.ndarray, metric: str) -> float | None:
        constants = (np.broadcast_to(row, (*labels.shape, len(row))) for row in np.eye(len(self.names)))
        return max(self.measure(logits, labels, metric).score(np.arange(len(labels))) for logits in constants)

    def warning(self, name: str, metrics: Metrics, labels: np.ndarray, metric: str, split: str) -> str | None:
        return _chance_warning(self, name, metrics, labels, metric, split)

    def _tags(self, logits: np.ndarray, labels: np.ndarray) -> tuple[list[list[str]], list[list[str]]]:
        """Predicted and actual tags by sentence."""
        pairs = [
            (row[ids != IGNORED], ids[ids != IGNORED]) for row, ids in zip(logits.argmax(-1), labels, strict=True)
        ]
        predicted, actual = ([[self.names[i] for i in ids] for ids in column] for column in zip(*pairs, strict=True))
        return predicted, actual


def _labelled(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (all words, tags) and tag ids (all words,) of the words with a label."""
    return logits[labels != IGNORED], labels[labels != IGNORED]


def _chance_warning(
    task: TaskMetrics, name: str, metrics: Metrics, labels: np.ndarray, metric: str, split: str
) -> str | None:
    """Compares an F1, or an accuracy, with that of the best constant prediction."""
    chance = task.chance(labels, metric) or 0.0
    error = math.sqrt(chance * (1 - chance) / len(labels))
    baseline = "the best constant prediction"
    return quality.chance_warning(name, f"{split} {metric}", metrics[metric], chance, baseline, error)


KINDS: dict[TaskType, Any] = {
    "classification": TaskMetrics,
    "regression": RegressionMetrics,
    "multi_label": MultiLabelMetrics,
    "token_classification": TokenMetrics,
}


def task_metrics(task: TaskType, names: Sequence[str]) -> TaskMetrics:
    """The metrics of a task. `names`: of its classes, labels or tags by id; empty for regression."""
    metrics: TaskMetrics = KINDS[task](names)
    return metrics
