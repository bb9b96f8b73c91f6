"""Verdicts against simulations with known answers: how often intervals contain the true gain, and false alarms.
The metrics on some of the examples against those of sklearn, scipy and sacreBLEU.
"""

import numpy as np
import pytest
from scipy import stats

from kd.common.metrics.quality import (
    classification_metrics,
    regression_metrics,
    token_metrics,
    translation_metrics,
)
from kd.common.metrics.verdict import (
    AT_LEAST,
    MIN_EXAMPLES,
    OVER_SEEDS,
    Score,
    measure_bleu,
    measure_classes,
    measure_perplexity,
    measure_regression,
    seeds_needed,
    verdict_of_one_seed,
    verdict_over_seeds,
    with_margin,
    word,
)

EXAMPLES, TRIALS = 400, 100


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kd.common.metrics.verdict.RESAMPLES", 100)


def accuracy_of(right: np.ndarray) -> Score:
    return lambda rows: right[rows].mean()


def simulated(generator: np.random.Generator, seeds: int, gain: float, deviation: float) -> dict:
    """The verdict over seeds of a student whose true accuracy is `gain` above that of its control, 0.7, and varies
    over trainings. Both are evaluated on the same examples, some of which are easier than others.
    """
    difficulty = generator.random(EXAMPLES)
    runs = []
    for accuracy in generator.normal([0.7 + gain, 0.7], deviation, (seeds, 2)):
        student, control = (stats.norm.ppf(difficulty) + generator.normal(0, 1, EXAMPLES) for _ in range(2))
        scores = [
            accuracy_of(values < stats.norm.ppf(level, scale=2**0.5))
            for values, level in zip((student, control), accuracy, strict=True)
        ]
        runs.append(verdict_of_one_seed(scores[0], scores[1], EXAMPLES))
    return verdict_over_seeds(runs)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("deviation", [0.002, 0.05])
def test_intervals_over_seeds_contain_the_true_gain(seeds: int, deviation: float):
    generator = np.random.default_rng(0)
    verdicts = [simulated(generator, seeds, 0.1, deviation) for _ in range(TRIALS)]
    covered = np.mean([v["interval"][0] <= 0.1 <= v["interval"][1] for v in verdicts])
    assert covered >= 0.95 - 2 * (0.95 * 0.05 / TRIALS) ** 0.5
    assert {v["method"] for v in verdicts} <= {OVER_SEEDS, AT_LEAST}


def test_an_identical_pair_raises_few_false_alarms():
    generator = np.random.default_rng(1)
    words = [simulated(generator, 3, 0.0, 0.03)["word"] for _ in range(TRIALS)]
    assert np.mean([w != "no difference shown" for w in words]) < 0.05 + 2 * (0.05 * 0.95 / TRIALS) ** 0.5


def test_one_seed_is_compared_over_examples_and_named_so():
    control = np.arange(EXAMPLES) % 2 == 0
    verdict = verdict_of_one_seed(lambda i: 1.0, lambda i: control[i].mean(), EXAMPLES)
    assert verdict["gain"] == 0.5 and verdict["word"] == "better (one seed)" and verdict["seeds"] == 1
    low, high = verdict["interval"]  # the standard error of a proportion, by the normal approximation
    assert [low, high] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.012)


def test_equal_and_saturated_models_show_no_difference():
    verdict = verdict_over_seeds([verdict_of_one_seed(lambda i: 1.0, lambda i: 1.0, EXAMPLES)] * 3)
    assert verdict["word"] == "no difference shown" and verdict["interval"] == [0, 0]


def test_a_positive_gain_is_better_also_for_a_perplexity():
    losses = np.random.default_rng(2).normal(2.0, 0.1, EXAMPLES)
    verdict = verdict_of_one_seed(
        lambda i: np.exp(losses[i].mean() - 0.5), lambda i: np.exp(losses[i].mean()), EXAMPLES, lower_is_better=True
    )
    assert verdict["gain"] > 0 and verdict["word"] == "better (one seed)"


def test_the_t_interval_is_that_of_scipy():
    runs = [{"gain": gain, "interval": [gain, gain], "seeds": 1, "word": ""} for gain in (0.01, 0.02, 0.06)]
    verdict = verdict_over_seeds(runs)
    expected = stats.ttest_1samp([0.01, 0.02, 0.06], 0).confidence_interval(0.95)
    assert verdict["interval"] == pytest.approx([expected.low, expected.high])
    assert verdict["method"] == OVER_SEEDS and verdict["gain"] == pytest.approx(0.03)


def test_words_margins_and_the_number_of_seeds():
    assert [word(0.1, 0.2), word(-0.1, 0.2), word(-0.2, -0.1)] == ["better", "no difference shown", "worse"]
    verdict = {"gain": 0.0, "interval": [-0.02, 0.02], "seeds": 3, "word": "no difference shown"}
    assert with_margin(verdict, 0.03)["not_worse_by_margin"] and not with_margin(verdict, 0.01)["not_worse_by_margin"]
    # The textbook case: an effect of one standard deviation needs 10 pairs for a power of 80 %.
    assert seeds_needed(verdict | {"gain": 1.0, "deviation": 1.0}) == 10
    assert seeds_needed(verdict | {"deviation": 1.0}) is None


def test_there_is_no_interval_over_few_examples():
    one = verdict_of_one_seed(lambda i: 1.0, lambda i: 0.0, MIN_EXAMPLES - 1)
    assert one["gain"] == 1 and one["interval"] is None and one["word"] == "no difference shown (one seed)"
    assert not with_margin(one, 2.0)["not_worse_by_margin"]
    several = verdict_over_seeds([one | {"gain": gain} for gain in (0.9, 1.0, 1.1)])
    assert several["method"] == OVER_SEEDS and several["word"] == "better"


SAMPLES = [np.arange(EXAMPLES), *np.random.default_rng(3).integers(EXAMPLES, size=(3, EXAMPLES))]


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 5), ("f1", 2), ("matthews", 2), ("matthews", 5)])
def test_classes_are_measured_as_by_sklearn(metric: str, classes: int):
    generator = np.random.default_rng(0)
    labels = generator.integers(classes, size=EXAMPLES)
    logits = generator.normal(size=(EXAMPLES, classes)) + np.eye(classes)[labels]
    measured = measure_classes(logits, labels, metric)
    for rows in SAMPLES:
        assert measured.score(rows) == pytest.approx(classification_metrics(logits[rows], labels[rows])[metric])
    assert measured.examples == EXAMPLES and not measured.constant


def test_a_perfect_and_a_constant_classifier():
    labels = np.arange(EXAMPLES) % 2
    perfect, constant = measure_classes(np.eye(2)[labels], labels, "matthews"), np.eye(2)[np.zeros_like(labels)]
    assert perfect.score(np.arange(EXAMPLES)) == 1 and not perfect.constant
    for metric in ("matthews", "f1"):
        measured = measure_classes(constant, labels, metric)
        assert measured.constant and measured.score(np.arange(EXAMPLES)) == 0
    verdict = verdict_of_one_seed(perfect.score, measured.score, EXAMPLES)
    assert verdict["interval"] == [1, 1] and verdict["word"] == "better (one seed)"


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_correlations_are_measured_as_by_scipy(metric: str):
    targets = np.random.default_rng(0).normal(size=EXAMPLES).round(1)  # with ties
    predictions = targets + np.random.default_rng(1).normal(size=EXAMPLES)
    measured = measure_regression(predictions, targets, metric)
    for rows in SAMPLES:
        assert measured.score(rows) == pytest.approx(regression_metrics(predictions[rows], targets[rows])[metric])
    constant = measure_regression(np.ones(EXAMPLES), targets, metric)
    assert constant.constant and constant.score(np.arange(EXAMPLES)) == 0


def test_perplexity_is_measured_as_in_the_report():
    generator = np.random.default_rng(0)
    counts = np.stack([generator.gamma(2.0, 50.0, EXAMPLES), np.ones(EXAMPLES), np.full(EXAMPLES, 30)], axis=1)
    measured = measure_perplexity(counts, generator.integers(9, size=(EXAMPLES, 30)))
    for rows in SAMPLES:
        assert measured.score(rows) == pytest.approx(token_metrics(counts[rows])["perplexity"])
    assert not measured.constant and measure_perplexity(counts, np.full((EXAMPLES, 30), 7)).constant


def test_bleu_is_measured_as_by_sacrebleu():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 15, EXAMPLES)
    references = [" ".join(generator.choice(list("abcdefgh"), length)) for length in lengths]
    hypotheses = [reference[: len(reference) // 4 * 3] for reference in references]  # some are empty
    measured = measure_bleu(hypotheses, references)
    for rows in SAMPLES:
        scores, _ = translation_metrics([hypotheses[row] for row in rows], [references[row] for row in rows])
        assert measured.score(rows) == pytest.approx(scores["bleu"])
    assert not measured.constant and measure_bleu(["a"] * EXAMPLES, references).constant
