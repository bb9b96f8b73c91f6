"""A teacher that is no better than chance causes a warning; a better one does not."""

import math

import numpy as np
import pytest

from kd.common.metrics.quality import (
    chance_warning,
    classification_metrics,
    classifier_warning,
    language_warning,
    regression_metrics,
    regressor_warning,
)

LABELS = np.array([0] * 60 + [1] * 40)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
def test_constant_and_random_predictions_are_at_chance(metric):
    rng = np.random.default_rng(0)
    mostly = np.where(rng.random(100) < 0.95, LABELS, 1 - LABELS)
    for predictions, at_chance in ((np.zeros(100, int), True), (rng.permutation(LABELS), True), (mostly, False)):
        value = classification_metrics(np.eye(2)[predictions], LABELS)[metric]
        found = classifier_warning("T", metric, value, LABELS, 2)
        assert (found is not None) == at_chance, (metric, value)


def test_ignored_labels_do_not_count_for_the_majority():
    found = classifier_warning("T", "accuracy", 0.6, np.append(LABELS, [-100] * 900), 2)
    assert found and "validation accuracy is 0.6 and that of the best constant prediction is 0.6;" in found
    # one standard error of 0.6 of 100 is 0.049: 0.66 is within 1.645 of them, 0.70 is not
    assert classifier_warning("T", "accuracy", 0.66, LABELS, 2)
    assert classifier_warning("T", "accuracy", 0.70, LABELS, 2) is None


def test_regressors_without_correlation_or_worse_than_the_mean():
    rng = np.random.default_rng(0)
    targets = rng.normal(3, 1, 200)

    def warning(predictions):
        return regressor_warning("T", regression_metrics(predictions, targets), targets)

    assert "spearman is 0 and" in (warning(np.full(200, 3.0)) or "")
    assert "spearman" in (warning(rng.permutation(targets)) or "")
    assert "mse" in (warning(targets * 10) or "")  # correlated, on another scale
    assert warning(targets + rng.normal(0, 0.5, 200)) is None


def test_language_models_are_compared_with_token_frequencies():
    train, tokens = np.array([0, 0, 0, 1]), np.array([0, 1])  # smoothed: 4/8, 2/8, 1/8, 1/8
    expected = math.exp(-(math.log(4 / 8) + math.log(2 / 8)) / 2)
    assert language_warning("T", expected * 0.99, train, tokens, 4) is None
    assert "no better than chance" in (language_warning("T", expected * 1.01, train, tokens, 4) or "")


def test_a_score_that_is_not_finite_is_no_better_than_chance():
    assert chance_warning("T", "return_mean", math.nan, -10.0, "random actions")
    assert chance_warning("T", "return_mean", -10.0, -10.0, "random actions")
    assert chance_warning("T", "return_mean", -9.0, -10.0, "random actions", standard_error=0.5) is None
