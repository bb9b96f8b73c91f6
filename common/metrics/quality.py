"""Metrics of models: of classifiers, regressors, language models, translators and policies."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import pearsonr, spearmanr, trim_mean
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from kd.common.objective import IGNORED

OUT_OF_SCOPE = "oos"  # the label of texts that belong to no other class
RESAMPLES = 2000  # of the bootstrap of returns


# ---------------------------------------------------------------- classification


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, f1_macro, matthews, and for two classes the binary f1 of class 1."""
    _check_logits(logits, labels)
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
    _check_logits(logits, labels)
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


def _check_logits(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"need logits (samples, classes), labels (samples,), got {logits.shape}, {labels.shape}")


# ---------------------------------------------------------------- out-of-scope texts
# A class for what belongs to no other is learned badly from few examples, and overall accuracy hides it. So a text may
# also be refused for lack of confidence: the maximum softmax probability of Hendrycks and Gimpel, "A Baseline for
# Detecting Misclassified and Out-of-Distribution Examples in Neural Networks", ICLR 2017 (arXiv:1610.02136), here over
# the in-scope classes. Larson et al. 2019 (arXiv:1909.02027) compare both ways on CLINC150, and choose the threshold
# on validation too.


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


# ---------------------------------------------------------------- regression


def regression_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """pearson, spearman and mse of predictions and targets (samples,).

    A correlation with a constant is undefined and reported as 0, because JSON has no NaN.
    """
    if predictions.shape != targets.shape or predictions.ndim != 1:
        raise ValueError(f"need two arrays (samples,), got {predictions.shape} and {targets.shape}")
    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)
    varies = np.ptp(predictions) > 0 and np.ptp(targets) > 0
    return {
        "pearson": float(pearsonr(predictions, targets).statistic) if varies else 0.0,
        "spearman": float(spearmanr(predictions, targets).statistic) if varies else 0.0,
        "mse": float(np.square(predictions - targets).mean()),
    }


# ---------------------------------------------------------------- language models


def token_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, 3): the sum of the labels' negative log-likelihoods, the number of labels that have the largest logit,
    and the number of labels that count: what `token_metrics` needs of logits that are too many to be stored.
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


# ---------------------------------------------------------------- translation


def translation_metrics(
    hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Corpus bleu and chrf, 0 to 100, against one reference each, and sacreBLEU's signature of either: the settings
    under which two figures may be compared (arXiv:1804.08771). Texts are detokenized.
    """
    from sacrebleu.metrics import BLEU, CHRF  # here: domains without texts need not install it

    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"need one reference per hypothesis, got {len(references)} for {len(hypotheses)}")
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    scores = {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


# ---------------------------------------------------------------- policies


def return_metrics(returns: np.ndarray, seed: int = 0) -> dict[str, float | int | list[float]]:
    """return_mean, return_std, return_iqm, return_ci95 and episodes of returns (episodes,).

    return_std is that of the sample (n - 1), 0 for one episode. return_iqm is the interquartile mean, without the
    lowest and the highest quarter, each rounded down to whole episodes (arXiv:2108.13264). return_ci95 is [low, high]
    of the mean, a percentile bootstrap that depends only on the returns and `seed`; it is too narrow for few
    episodes, and does not cover the variation between training runs. Raises ValueError for no episodes, another shape
    and returns that are not finite.
    """
    if returns.ndim != 1 or not returns.size:
        raise ValueError(f"need returns (episodes,) of at least one episode, got {returns.shape}")
    if not np.isfinite(returns).all():
        raise ValueError("returns must be finite, got NaN or infinity")
    returns = returns.astype(np.float64)
    # Relative to the first return, so that rounding adds no deviation where all are equal.
    origin = returns[0]
    offsets = returns - origin
    means = np.random.default_rng(seed).choice(offsets, size=(RESAMPLES, offsets.size)).mean(axis=1)
    low, high = origin + np.quantile(means, [0.025, 0.975])
    return {
        "return_mean": float(origin + offsets.mean()),
        "return_std": float(offsets.std(ddof=1)) if offsets.size > 1 else 0.0,
        "return_iqm": float(origin + trim_mean(offsets, 0.25)),
        "return_ci95": [float(low), float(high)],
        "episodes": int(offsets.size),
    }


def normalized_return(value: float, random: float, teacher: float) -> float | None:
    """(value - random) / (teacher - random): 0 is a random policy and 1 is the teacher, for negative returns as well.

    None where the teacher is no better than a random policy, which leaves no scale.
    """
    return None if teacher <= random else (value - random) / (teacher - random)
