"""Verdicts: whether a student is better than its control, or than its teacher, within what was measured.

A gain is a difference of the primary metric, with a sign such that positive is better. Its interval is

- for one seed: the percentile interval of a paired bootstrap over the evaluation examples (Efron 1979), which does
  not include the variation between trainings;
- for several seeds: the paired t interval over the seeds, never narrower than the mean bootstrap interval of a seed.

There is no bootstrap over seeds: with three or five of them its intervals are far too narrow. Nor is there one over
fewer than MIN_EXAMPLES examples.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import nctdtr, stdtrit

Score = Callable[[np.ndarray], float]  # the metric on some evaluation examples, by their indices
Word = Literal["better", "no difference shown", "worse"]
Verdict = dict[str, Any]

AT_CHANCE = "is no better than chance"  # part of every chance-level warning
CONFIDENCE = 0.95
RESAMPLES = 1000
MIN_EXAMPLES = 10
MARGIN = 0.01  # share of the teacher's distance from chance that still counts as equal
POWER = 0.8
OVER_EXAMPLES = "paired bootstrap over the evaluation examples"
TOO_FEW_EXAMPLES = f"no interval, because there are fewer than {MIN_EXAMPLES} evaluation examples"
OVER_SEEDS = "paired t over the seeds"
AT_LEAST = "paired t over the seeds, widened to the bootstrap over the evaluation examples"


def verdict_of_one_seed(student: Score, other: Score, examples: int, lower_is_better: bool = False) -> Verdict:
    """The verdict of one run.

    Args:
        student, other: The metric of either model on examples (with repetitions), by their indices.
        examples: Number of evaluation examples, which are the same for both.
        lower_is_better: Such as for a perplexity.
    """
    sign = -1.0 if lower_is_better else 1.0

    def gain(rows: np.ndarray) -> float:
        return sign * (student(rows) - other(rows)) + 0.0  # no -0.0

    total = gain(np.arange(examples))
    if examples < MIN_EXAMPLES:
        return _verdict(total, None, TOO_FEW_EXAMPLES, 1)
    generator = np.random.default_rng(0)
    gains = [gain(generator.integers(examples, size=examples)) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(gains, [tail, 1 - tail])
    return _verdict(total, [float(low), float(high)], OVER_EXAMPLES, 1)


def verdict_over_seeds(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of several runs that differ in their seed, from that of each."""
    if len(verdicts) == 1:
        return verdicts[0]
    gains = [verdict["gain"] for verdict in verdicts]
    mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
    by_seeds = float(stdtrit(len(gains) - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(len(gains))
    intervals = [verdict["interval"] or [0.0, 0.0] for verdict in verdicts]
    by_examples = statistics.fmean((high - low) / 2 for low, high in intervals)
    half, method = max((by_seeds, OVER_SEEDS), (by_examples, AT_LEAST))
    return _verdict(mean, [mean - half, mean + half], method, len(gains)) | {"deviation": deviation}


def verdict_of_gains(gains: Sequence[float]) -> Verdict:
    """The verdict of the gains of several runs, whose intervals over the evaluation examples are not known."""
    return verdict_over_seeds([_verdict(gain, None, OVER_SEEDS, 1) for gain in gains])


def _verdict(gain: float, interval: list[float] | None, method: str, seeds: int) -> Verdict:
    return {
        "gain": float(gain),
        "interval": interval,
        "confidence": CONFIDENCE,
        "method": method,
        "seeds": seeds,
        "word": word(*(interval or (0.0, 0.0))) + (" (one seed)" if seeds == 1 else ""),
    }


def word(low: float, high: float) -> Word:
    """What an interval of the gain shows."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def with_margin(verdict: Verdict, margin: float) -> Verdict:
    """Adds whether the student is not worse than its teacher by more than `margin`."""
    shown = verdict["interval"] is not None and verdict["interval"][0] > -margin
    return verdict | {"margin": margin, "not_worse_by_margin": shown}


def seeds_needed(verdict: Verdict) -> int | None:
    """Number of seeds with which a paired t-test shows a gain of this size with a probability of 80 %.

    None if it is shown already, if there is no gain, and for one seed.
    """
    gain, deviation = abs(verdict["gain"]), verdict.get("deviation")
    if not deviation or not gain or not verdict["word"].startswith("no difference"):
        return None
    for seeds in range(verdict["seeds"] + 1, 1000):
        critical = stdtrit(seeds - 1, (1 + CONFIDENCE) / 2)
        if 1 - nctdtr(seeds - 1, gain / deviation * math.sqrt(seeds), critical) >= POWER:
            return seeds
    return None


# ---------------------------------------------------------------- the primary metric on some of the examples


class Measurement(NamedTuple):
    """The primary metric of a model on evaluation examples.

    score: The metric on any of these examples.
    examples: Number of evaluation examples.
    constant: Whether the model predicts the same for all examples.
    """

    score: Score
    examples: int
    constant: bool = False


def measure_classes(logits: np.ndarray, labels: np.ndarray, metric: str = "accuracy") -> Measurement:
    """The accuracy, matthews, or f1 of two classes, of logits (samples, classes) and labels (samples,).

    They are those of `classification_metrics`, but fast enough for thousands of resamples.
    """
    predicted, classes = logits.argmax(axis=1), logits.shape[1]
    right, cells = predicted == labels, labels.astype(np.int64) * classes + predicted

    def accuracy(rows: np.ndarray) -> float:
        return float(right[rows].mean())

    def from_confusion(rows: np.ndarray) -> float:
        confusion = np.bincount(cells[rows], minlength=classes**2).reshape(classes, classes).astype(np.float64)
        return (_f1 if metric == "f1" else _matthews)(confusion)

    return Measurement(accuracy if metric == "accuracy" else from_confusion, len(labels), is_constant(predicted))


def _f1(confusion: np.ndarray) -> float:
    """F1 of class 1 from a confusion matrix (labels, predictions) of two classes; 0 if it is undefined."""
    total = confusion[1].sum() + confusion[:, 1].sum()
    return float(2 * confusion[1, 1] / total) if total else 0.0


def _matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of a confusion matrix (labels, predictions); 0 if it is undefined (Gorodkin 2004)."""
    labels, predictions, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    scale = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
    return float((total * confusion.trace() - labels @ predictions) / math.sqrt(scale)) if scale else 0.0


def measure_regression(predictions: np.ndarray, targets: np.ndarray, metric: str = "spearman") -> Measurement:
    """The spearman or pearson correlation of predictions and targets (samples,); 0 if one of them is constant."""
    from scipy.stats import rankdata  # imported here: it takes a second

    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)

    def score(rows: np.ndarray) -> float:
        x, y = predictions[rows], targets[rows]
        if is_constant(x) or is_constant(y):
            return 0.0
        if metric == "spearman":
            x, y = rankdata(x), rankdata(y)
        return float(np.corrcoef(x, y)[0, 1])

    return Measurement(score, len(targets), is_constant(predictions))


def measure_perplexity(counts: np.ndarray, choices: np.ndarray | None = None) -> Measurement:
    """The perplexity from `token_counts` (sequences, 3). `choices` are the most probable tokens."""
    constant = choices is not None and is_constant(choices.reshape(-1))

    def score(rows: np.ndarray) -> float:
        nll, _, number = counts[rows].sum(axis=0, dtype=np.float64)
        return math.exp(nll / number)

    return Measurement(score, len(counts), constant)


def measure_bits_per_byte(counts: np.ndarray, size: int, choices: np.ndarray | None = None) -> Measurement:
    """The bits per byte from `token_counts` (sequences, 3) of a text of `size` bytes. `choices` are the most probable
    tokens. Sequences have the mean number of bytes per label.
    """
    constant = choices is not None and is_constant(choices.reshape(-1))
    bytes_per_label = size / counts[:, 2].sum(dtype=np.float64)

    def score(rows: np.ndarray) -> float:
        nll, _, number = counts[rows].sum(axis=0, dtype=np.float64)
        return float(nll / (math.log(2) * number * bytes_per_label))

    return Measurement(score, len(counts), constant)


def measure_token_accuracy(counts: np.ndarray, choices: np.ndarray | None = None) -> Measurement:
    """The share of correct tokens from `token_counts` (sequences, 3). `choices` are the most probable tokens."""
    constant = choices is not None and is_constant(choices)

    def score(rows: np.ndarray) -> float:
        _, right, number = counts[rows].sum(axis=0, dtype=np.float64)
        return float(right / max(number, 1))

    return Measurement(score, len(counts), constant)


def measure_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Measurement:
    """The corpus BLEU from the statistics of the sentences, one reference per hypothesis."""
    from sacrebleu.metrics import BLEU  # imported here: domains without texts do not need it

    bleu = BLEU()
    sentences = [bleu.corpus_score([text], [[other]]) for text, other in zip(hypotheses, references, strict=True)]
    counts = np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in sentences])

    def score(rows: np.ndarray) -> float:
        lengths, correct, total = np.split(counts[rows].sum(axis=0), [2, 2 + bleu.max_ngram_order])
        found = BLEU.compute_bleu(
            correct.tolist(), total.tolist(), int(lengths[0]), int(lengths[1]), smooth_method=bleu.smooth_method
        )
        return float(found.score)

    return Measurement(score, len(references), len(set(hypotheses)) == 1 < len(references))


def measure_counts(counts: np.ndarray, constant: bool = False) -> Measurement:
    """The micro F1 of counts (examples, 3): right, predicted and actual elements of the set of each example."""
    return Measurement(lambda rows: f1_of_counts(counts[rows]), len(counts), constant)


def f1_of_counts(counts: np.ndarray) -> float:
    """Micro F1 of counts (examples, 3): right, predicted and actual elements. 0 if there are none."""
    right, predicted, actual = counts.sum(axis=0)
    return float(2 * right / (predicted + actual)) if predicted + actual else 0.0


def measure_mean(values: np.ndarray, constant: bool = False) -> Measurement:
    """The mean of values (examples,), such as the returns of episodes."""
    return Measurement(lambda rows: float(values[rows].mean()), len(values), constant)


def is_constant(values: np.ndarray) -> bool:
    """Whether all of several values are equal."""
    return len(values) > 1 and bool((values == values[0]).all())
