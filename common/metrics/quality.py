"""Metrics of classifiers, regressors, language models, translators and policies, and chance-level warnings.

A teacher that is no better than a constant prediction, token frequencies or random actions has nothing to distill: its
weights, its labels or its inputs are probably wrong. The warning functions return the text of a warning, or None.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from scipy.stats import pearsonr, spearmanr, trim_mean
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from kd.common.metrics.verdict import AT_CHANCE
from kd.common.token_terms import sum_over_rows
from kd.common.utils.tasks import IGNORED

OUT_OF_SCOPE = "oos"  # the label of texts that belong to no other class
RESAMPLES = 2000  # bootstrap resamples of the returns
QUANTILE = 1.645  # one-sided, 5 %


# ---------------------------------------------------------------- classification


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns accuracy, f1_macro, matthews and, for two classes, the binary f1 of class 1."""
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


def calibration_metrics(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, float]:
    """Returns nll, the mean negative log-likelihood of the labels, and ece, the expected calibration error: the mean
    |accuracy - confidence| over equal-width bins of the confidence, weighted by their samples (Guo et al., ICML 2017,
    arXiv:1706.04599). Neither is defined for logits that are not finite, as of a model whose activations overflow: the
    result is then empty.
    """
    _check_logits(logits, labels)
    if not np.isfinite(logits).all():
        return {}
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    confidences, right = np.exp(log_probabilities.max(axis=1)), logits.argmax(axis=1) == labels
    of_bin = np.ceil(confidences * bins).clip(1, bins).astype(np.int64) - 1  # a bin includes its upper edge
    gaps = np.bincount(of_bin, weights=right - confidences, minlength=bins)
    nll = -log_probabilities[np.arange(len(labels)), labels].mean()
    return {"nll": float(nll), "ece": float(np.abs(gaps).sum() / len(labels))}


def agreement(student_logits: np.ndarray, teacher_logits: np.ndarray) -> float:
    """Share of samples for which student and teacher predict the same class."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"need two arrays of logits (samples, classes), got {student_logits.shape} and {teacher_logits.shape}"
        )
    return float((student_logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean())


def _check_logits(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"need logits (samples, classes), labels (samples,), got {logits.shape}, {labels.shape}")


# ---------------------------------------------------------------- out-of-scope texts
# Few training examples have the out-of-scope label, and overall accuracy hides how badly they are classified. So texts
# are also predicted out of scope when the confidence is low: the maximum softmax probability of Hendrycks and
# Gimpel, ICLR 2017 (arXiv:1610.02136), over the in-scope classes. Larson et al. 2019 (arXiv:1909.02027) compare both
# ways on CLINC150 and also choose the threshold on validation.


def scope_metrics(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> dict[str, float]:
    """Returns accuracy_in_scope and oos_recall, each where it has rows; nothing for tasks without the label "oos".

    `logits` is (rows, classes), `labels` (rows,). An in-scope row that is predicted out of scope counts as wrong.
    """
    if OUT_OF_SCOPE not in label_names:
        return {}
    return _by_scope(logits.argmax(axis=-1), labels, label_names.index(OUT_OF_SCOPE))


def choose_threshold(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> float | None:
    """Returns the confidence threshold with the highest accuracy on these rows (of the validation split).

    Candidates are the confidences of the rows. Ties go to the lowest, which predicts the fewest texts out of scope.
    Returns None for tasks without the label "oos", and where no row has it.
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
    gains = (outside.astype(int) - right)[order]  # change in correct rows if this row is predicted out of scope
    candidates, below = np.unique(sure[order], return_index=True)  # number of rows below each candidate
    return float(candidates[np.concatenate([[0], gains.cumsum()])[below].argmax()])


def threshold_metrics(
    logits: np.ndarray, labels: np.ndarray, label_names: list[str], threshold: float
) -> dict[str, float]:
    """Returns oos_threshold, and accuracy_threshold, accuracy_in_scope_threshold and oos_recall_threshold (where they
    have rows). A text is predicted out of scope if that class has the largest logit or if the confidence is below the
    threshold.
    """
    oos = label_names.index(OUT_OF_SCOPE)
    predicted = np.where(confidence(logits, oos) < threshold, oos, logits.argmax(axis=-1))
    metrics = {"accuracy": float((predicted == labels).mean())} | _by_scope(predicted, labels, oos)
    return {"oos_threshold": threshold} | {f"{name}_threshold": value for name, value in metrics.items()}


def confidence(logits: np.ndarray, oos: int) -> np.ndarray:
    """Returns the largest probability (rows,) of logits (rows, classes) among the classes other than `oos`."""
    return np.delete(softmax(logits.astype(np.float64), axis=-1), oos, axis=-1).max(axis=-1)


def _by_scope(predicted: np.ndarray, labels: np.ndarray, oos: int) -> dict[str, float]:
    right, outside = predicted == labels, labels == oos
    rows = {"accuracy_in_scope": ~outside, "oos_recall": outside}
    return {name: float(right[chosen].mean()) for name, chosen in rows.items() if chosen.any()}


# ---------------------------------------------------------------- regression


def regression_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns pearson, spearman and mse of predictions and targets (samples,).

    The correlation with a constant is undefined and reported as 0, because JSON has no NaN.
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
    """Reduces logits (batch, positions, vocabulary), which are too large to store, to counts (batch, 3) for
    `token_metrics`: the sum of the negative log-likelihoods, the number of correct tokens and the number of labels
    that are not IGNORED. Computed in chunks of positions, as losses are.
    """
    targets = labels.flatten()

    def counts(logits: Tensor, rows: Tensor) -> Tensor:
        nll = F.cross_entropy(logits.float(), targets[rows], reduction="none")
        each = torch.stack([nll, logits.argmax(-1) == targets[rows], torch.ones_like(nll)], dim=1)
        return each.new_zeros(len(labels), 3).index_add(0, rows // labels.shape[1], each)

    return sum_over_rows(counts, logits.flatten(0, 1), (targets != IGNORED).nonzero().flatten())


def token_metrics(counts: np.ndarray) -> dict[str, float]:
    """Returns token_accuracy and perplexity of next-token prediction from `token_counts` (sequences, 3)."""
    nll, right, number = np.asarray(counts, dtype=np.float64).sum(axis=0)
    return {"token_accuracy": float(right / number), "perplexity": float(np.exp(nll / number))}


def language_metrics(counts: np.ndarray, size: int) -> dict[str, float]:
    """Returns token_accuracy, perplexity and bits_per_byte from `token_counts` (sequences, 3) of `size` bytes of text.

    Perplexity is exp of the mean negative log-likelihood per token and depends on the vocabulary. bits_per_byte
    divides by the UTF-8 bytes of the text and does not.
    """
    nats = float(np.asarray(counts, dtype=np.float64)[:, 0].sum())
    return {**token_metrics(counts), "bits_per_byte": nats / (math.log(2) * size)}


# ---------------------------------------------------------------- translation


def translation_metrics(
    hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns corpus bleu and chrf (0 to 100, one reference per hypothesis) and the sacreBLEU signature of each, which
    records its settings (arXiv:1804.08771). Texts are detokenized.
    """
    from sacrebleu.metrics import BLEU, CHRF  # imported here: domains without texts do not need it

    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"need one reference per hypothesis, got {len(references)} for {len(hypotheses)}")
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    scores = {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


# ---------------------------------------------------------------- policies


def return_metrics(returns: np.ndarray, seed: int = 0) -> dict[str, float | int | list[float]]:
    """Returns return_mean, return_std, return_iqm, return_ci95 and episodes of returns (episodes,).

    return_std is the sample standard deviation (n - 1), 0 for one episode. return_iqm is the interquartile mean: it
    drops the lowest and the highest quarter, each rounded down to whole episodes (arXiv:2108.13264). return_ci95 is
    [low, high] of the mean, a percentile bootstrap that depends only on the returns and `seed`. It is too narrow for
    few episodes and does not cover the variation between training runs. Raises ValueError for no episodes, other
    shapes and returns that are not finite.
    """
    if returns.ndim != 1 or not returns.size:
        raise ValueError(f"need returns (episodes,) of at least one episode, got {returns.shape}")
    if not np.isfinite(returns).all():
        raise ValueError("returns must be finite, got NaN or infinity")
    returns = returns.astype(np.float64)
    # Offsets from the first return, so that equal returns have a deviation of exactly 0.
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
    """Returns (value - random) / (teacher - random): 0 for a random policy, 1 for the teacher, whatever the signs.

    Returns None if the teacher is no better than a random policy.
    """
    return None if teacher <= random else (value - random) / (teacher - random)


# ---------------------------------------------------------------- chance


def chance_warning(
    name: str,
    metric: str,
    value: float,
    chance: float,
    baseline: str,
    standard_error: float = 0.0,
    lower_is_better: bool = False,
) -> str | None:
    """Returns the warning if the teacher's `value` is not finite, or does not exceed `chance`, the score of `baseline`
    (such as "random actions"), by more than the noise of the measurement (`standard_error`) explains.
    """
    gain = chance - value if lower_is_better else value - chance
    if gain > QUANTILE * standard_error:
        return None
    return (
        f"teacher {name} {AT_CHANCE}: its {metric} is {value:.4g} and that of {baseline} is {chance:.4g}; "
        "check its weights, labels and inputs before distilling from it"
    )


def constant_score(labels: np.ndarray, classes: int, metric: str) -> float:
    """The best `classification_metrics` score of a constant prediction on class ids (samples,); negative ones are
    ignored.
    """
    labels = labels[labels >= 0]
    frequent = int(np.bincount(labels, minlength=classes).argmax())
    constants = {frequent, 1} if classes == 2 else {frequent}
    return max(classification_metrics(np.eye(classes)[[c] * len(labels)], labels)[metric] for c in constants)


def classifier_warning(
    name: str, metric: str, value: float, labels: np.ndarray, classes: int, split: str = "validation"
) -> str | None:
    """Compares accuracy, matthews or the f1 of two classes with the best constant prediction. `labels` (samples,) are
    class ids; negative ones are ignored.
    """
    chance, labels = constant_score(labels, classes, metric), labels[labels >= 0]
    error = math.sqrt(chance * (1 - chance) / len(labels)) if chance > 0 else 1 / math.sqrt(len(labels))
    return chance_warning(name, f"{split} {metric}", value, chance, "the best constant prediction", error)


def regressor_warning(
    name: str, metrics: dict[str, float], targets: np.ndarray, metric: str = "spearman", split: str = "validation"
) -> str | None:
    """Compares the correlation (`metric`) with 0, and the mse with that of predicting the mean of the targets.
    `metrics` are `regression_metrics`.
    """
    targets = targets[np.isfinite(targets)]
    error = 1 / math.sqrt(len(targets))
    return chance_warning(
        name, f"{split} {metric}", metrics[metric], 0.0, "a constant prediction", error
    ) or chance_warning(
        name, f"{split} mse", metrics["mse"], float(np.var(targets)), "the mean of the targets", lower_is_better=True
    )


def unigram_perplexity(train: np.ndarray, tokens: np.ndarray, vocabulary: int) -> float:
    """The perplexity of `tokens` under the token frequencies in `train` (add-one smoothed)."""
    counts = np.bincount(train, minlength=vocabulary) + 1
    return math.exp(-np.log(counts / counts.sum())[tokens].mean())


def language_warning(
    name: str, perplexity: float, train: np.ndarray, tokens: np.ndarray, vocabulary: int
) -> str | None:
    """Compares the perplexity of next tokens with `unigram_perplexity`."""
    chance = unigram_perplexity(train, tokens, vocabulary)
    return chance_warning(
        name, "validation perplexity", perplexity, chance, "the token frequencies", lower_is_better=True
    )
