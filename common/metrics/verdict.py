"""Verdicts: whether a student is better than its control, or than its teacher, within what was measured.

A gain is a difference of the primary metric, with a sign such that positive is better. Its interval is

- for one seed: the percentile interval of a paired bootstrap over the evaluation examples (Efron 1979), which does
  not include the variation between trainings;
- for several seeds: the paired t interval over the seeds, never narrower than the mean bootstrap interval of a seed.

There is no bootstrap over seeds: with three or five of them its intervals are far too narrow.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

Score = Callable[[np.ndarray], float]  # the metric on some evaluation examples, by their indices
Word = Literal["better", "no difference shown", "worse"]
Verdict = dict[str, Any]

CONFIDENCE = 0.95
RESAMPLES = 1000
MARGIN = 0.01  # share of the teacher's distance from chance that still counts as equal
POWER = 0.8
OVER_EXAMPLES = "paired bootstrap over the evaluation examples"
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
    generator = np.random.default_rng(0)
    samples = [generator.integers(examples, size=examples) for _ in range(RESAMPLES)]
    gains = [sign * (student(rows) - other(rows)) for rows in samples]
    everything = np.arange(examples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(gains, [tail, 1 - tail])
    return _verdict(sign * (student(everything) - other(everything)), float(low), float(high), OVER_EXAMPLES, 1)


def verdict_over_seeds(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of several runs that differ in their seed, from that of each."""
    if len(verdicts) == 1:
        return verdicts[0]
    gains = [verdict["gain"] for verdict in verdicts]
    mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
    by_seeds = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)) * deviation / math.sqrt(len(gains))
    by_examples = statistics.fmean((high - low) / 2 for low, high in (verdict["interval"] for verdict in verdicts))
    half, method = max((by_seeds, OVER_SEEDS), (by_examples, AT_LEAST))
    return _verdict(mean, mean - half, mean + half, method, len(gains)) | {"deviation": deviation}


def _verdict(gain: float, low: float, high: float, method: str, seeds: int) -> Verdict:
    return {
        "gain": gain,
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "method": method,
        "seeds": seeds,
        "word": word(low, high) + (" (one seed)" if seeds == 1 else ""),
    }


def word(low: float, high: float) -> Word:
    """What an interval of the gain shows."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def with_margin(verdict: Verdict, margin: float) -> Verdict:
    """Adds whether the student is not worse than its teacher by more than `margin`."""
    return verdict | {"margin": margin, "not_worse_by_margin": verdict["interval"][0] > -margin}


def seeds_needed(verdict: Verdict) -> int | None:
    """Number of seeds with which a paired t-test shows a gain of this size with a probability of 80 %.

    None if it is shown already, if there is no gain, and for one seed.
    """
    gain, deviation = abs(verdict["gain"]), verdict.get("deviation")
    if not deviation or not gain or not verdict["word"].startswith("no difference"):
        return None
    for seeds in range(verdict["seeds"] + 1, 1000):
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        if stats.nct.sf(critical, seeds - 1, gain / deviation * math.sqrt(seeds)) >= POWER:
            return seeds
    return None
