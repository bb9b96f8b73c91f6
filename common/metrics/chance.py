"""Whether a teacher is better than guessing: the score of a guess that ignores the input, and the warning.

A teacher is measured before it is distilled from. One that is not better than a constant prediction, the mean, the
frequencies of tokens or random actions has nothing to distill; its weights, its labels or its inputs are likely wrong.
Each function returns the text of the warning, or None; `Run.warn` prints it and keeps it for the report.
"""

import math

import numpy as np

from kd.common.metrics.quality import classification_metrics

QUANTILE = 1.645  # one-sided, 5 %


def guessing_warning(
    name: str,
    metric: str,
    value: float,
    guess: float,
    guesser: str,
    standard_error: float = 0.0,
    lower_is_better: bool = False,
) -> str | None:
    """The warning where `value`, the teacher's `metric`, is not better than `guess`, that of `guesser` ("random
    actions"), by more than the noise of the measurement (`standard_error`) explains; or where it is not finite.
    """
    gain = guess - value if lower_is_better else value - guess
    if gain > QUANTILE * standard_error:
        return None
    return (
        f"teacher {name} is no better than guessing: its {metric} is {value:.4g}, that of {guesser} "
        f"{guess:.4g}; check its weights, labels and inputs before anything is distilled from it"
    )


def classifier_warning(
    name: str, metric: str, value: float, labels: np.ndarray, classes: int, split: str = "validation"
) -> str | None:
    """For accuracy, matthews or the f1 of two classes, against the best constant answer; `labels` (samples,) are class
    ids, negative ones are left out.
    """
    labels = labels[labels >= 0]
    frequent = int(np.bincount(labels, minlength=classes).argmax())
    constants = {frequent, 1} if classes == 2 else {frequent}
    guess = max(classification_metrics(np.eye(classes)[[c] * len(labels)], labels)[metric] for c in constants)
    error = math.sqrt(guess * (1 - guess) / len(labels)) if guess > 0 else 1 / math.sqrt(len(labels))
    return guessing_warning(name, f"{split} {metric}", value, guess, "the best constant answer", error)


def regressor_warning(
    name: str, metrics: dict[str, float], targets: np.ndarray, metric: str = "spearman", split: str = "validation"
) -> str | None:
    """For `regression_metrics`: a correlation (`metric`) against none, the squared error against that of the mean."""
    targets = targets[np.isfinite(targets)]
    error = 1 / math.sqrt(len(targets))
    return guessing_warning(
        name, f"{split} {metric}", metrics[metric], 0.0, "a constant prediction", error
    ) or guessing_warning(
        name, f"{split} mse", metrics["mse"], float(np.var(targets)), "their mean", lower_is_better=True
    )


def language_warning(
    name: str, perplexity: float, train: np.ndarray, tokens: np.ndarray, vocabulary: int
) -> str | None:
    """For the perplexity of next tokens, against that of the tokens' frequencies in `train` (add-one smoothed)."""
    counts = np.bincount(train, minlength=vocabulary) + 1
    guess = math.exp(-np.log(counts / counts.sum())[tokens].mean())
    return guessing_warning(
        name, "validation perplexity", perplexity, guess, "the frequencies of the tokens", lower_is_better=True
    )
