"""Metrics of tasks with an out-of-scope class: overall accuracy hides how well it is recognised.

A class for what belongs to no other class is learned badly from few examples, so a text may also be rejected for lack
of confidence: the maximum softmax probability of Hendrycks and Gimpel, "A Baseline for Detecting Misclassified
and Out-of-Distribution Examples in Neural Networks", ICLR 2017 (arXiv:1610.02136), here over the in-scope classes.
Larson et al. 2019 (arXiv:1909.02027) compare both ways on CLINC150, and choose the threshold on validation too.
"""

import numpy as np
from scipy.special import softmax

OUT_OF_SCOPE = "oos"


def scope_metrics(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> dict[str, float]:
    """Returns accuracy_in_scope and oos_recall, each where it has rows; nothing for tasks without the label "oos".

    `logits` is (rows, classes), `labels` (rows,). An in-scope row that is predicted out of scope counts as wrong.
    """
    if OUT_OF_SCOPE not in label_names:
        return {}
    return _by_scope(logits.argmax(axis=-1), labels, label_names.index(OUT_OF_SCOPE))


def choose_threshold(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> float | None:
    """The threshold on the confidence with the highest accuracy over all rows, for rows of the validation split.

    Candidates are the confidences of the rows; of equally good ones the lowest is taken, which refuses fewest texts.
    None for tasks without the label "oos", and where no row has it.
    """
    if OUT_OF_SCOPE not in label_names:
        return None
    oos = label_names.index(OUT_OF_SCOPE)
    outside = labels == oos
    if not outside.any():
        return None
    sure = confidence(logits, oos)
    order = sure.argsort(kind="stable")
    right = logits.argmax(axis=-1) == labels
    gains = (outside.astype(int) - right)[order]  # what refusing a row adds to the rows that are right
    candidates, below = np.unique(sure[order], return_index=True)  # number of rows that a candidate refuses
    return float(candidates[np.concatenate([[0], gains.cumsum()])[below].argmax()])


def threshold_metrics(
    logits: np.ndarray, labels: np.ndarray, label_names: list[str], threshold: float
) -> dict[str, float]:
    """oos_threshold, and accuracy_threshold, accuracy_in_scope_threshold and oos_recall_threshold (where they have
    rows): a text is out of scope if that class has the largest logit, or if the confidence is below the threshold.
    """
    oos = label_names.index(OUT_OF_SCOPE)
    predicted = np.where(confidence(logits, oos) < threshold, oos, logits.argmax(axis=-1))
    metrics = {"accuracy": float((predicted == labels).mean())} | _by_scope(predicted, labels, oos)
    return {"oos_threshold": threshold} | {f"{name}_threshold": value for name, value in metrics.items()}


def confidence(logits: np.ndarray, oos: int) -> np.ndarray:
    """The largest probability (rows,) that logits (rows, classes) give to a class other than number `oos`."""
    return np.delete(softmax(logits.astype(np.float64), axis=-1), oos, axis=-1).max(axis=-1)


def _by_scope(predicted: np.ndarray, labels: np.ndarray, oos: int) -> dict[str, float]:
    right, outside = predicted == labels, labels == oos
    rows = {"accuracy_in_scope": ~outside, "oos_recall": outside}
    return {name: float(right[chosen].mean()) for name, chosen in rows.items() if chosen.any()}
