"""Metrics of returns against numbers computed by hand, numpy and scipy."""

import json

import numpy as np
import pytest
from scipy.stats import bootstrap, trim_mean

from kd.common.metrics.quality import normalized_return, return_metrics


def test_by_hand():
    metrics = return_metrics(np.array([100.0, 3, 1, 4, 2, 6, 5, -80]))
    assert metrics["return_mean"] == pytest.approx(41 / 8)
    assert metrics["return_iqm"] == pytest.approx((2 + 3 + 4 + 5) / 4)  # without -80, 1 and 6, 100
    deviations = 10000 + 9 + 1 + 16 + 4 + 36 + 25 + 6400 - 41**2 / 8
    assert metrics["return_std"] == pytest.approx((deviations / 7) ** 0.5)
    assert metrics["episodes"] == 8
    assert list(metrics) == ["return_mean", "return_std", "return_iqm", "return_ci95", "episodes"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize("episodes", [2, 3, 5, 10, 101])
def test_numpy_and_scipy_agree(episodes):
    returns = np.random.default_rng(1).normal(-200, 90, episodes)  # Pendulum's are negative
    metrics = return_metrics(returns)
    assert metrics["return_mean"] == pytest.approx(np.mean(returns))
    assert metrics["return_std"] == pytest.approx(np.std(returns, ddof=1))
    assert metrics["return_iqm"] == pytest.approx(trim_mean(returns, 0.25))
    low, high = metrics["return_ci95"]
    assert returns.min() <= low <= metrics["return_mean"] <= high <= returns.max()


def test_interval_equals_scipy():
    returns = np.random.default_rng(2).normal(-200, 90, 50)
    expected = bootstrap((returns,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
    error = 90 / 50**0.5  # standard error of the mean
    assert return_metrics(returns)["return_ci95"] == pytest.approx(list(expected), abs=0.15 * error)


def test_interval_covers_the_true_mean():
    samples = np.random.default_rng(3).normal(-5, 2, (300, 30))
    intervals = np.array([return_metrics(sample, seed)["return_ci95"] for seed, sample in enumerate(samples)])
    covered = (intervals[:, 0] <= -5) & (intervals[:, 1] >= -5)
    assert 0.90 <= covered.mean() <= 0.98


def test_interval_depends_only_on_the_returns_and_the_seed():
    returns = np.random.default_rng(4).normal(size=20)
    state = np.random.get_state()[1].copy()
    first = return_metrics(returns, seed=1)
    assert return_metrics(returns, seed=1) == first
    assert return_metrics(returns, seed=2)["return_ci95"] != first["return_ci95"]
    assert np.array_equal(np.random.get_state()[1], state)  # the global generator is unchanged


@pytest.mark.parametrize("value", [0.1, -0.1, 500.0, 1e9 + 0.1])
@pytest.mark.parametrize("episodes", [1, 3, 7, 10])
def test_equal_returns_have_no_deviation(value, episodes):
    assert return_metrics(np.full(episodes, value)) == {
        "return_mean": value,
        "return_std": 0.0,
        "return_iqm": value,
        "return_ci95": [value, value],
        "episodes": episodes,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_returns_of_other_types_are_computed_in_float64(dtype):
    returns = np.array([2**24 - 1, 1, 2, 4])
    assert return_metrics(returns.astype(dtype)) == return_metrics(returns.astype(np.float64))


@pytest.mark.parametrize("shape", [(0,), (), (3, 1)])
def test_no_episodes_and_wrong_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match="at least one episode"):
        return_metrics(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_returns_that_are_not_finite_are_an_error(value):
    with pytest.raises(ValueError, match="finite"):
        return_metrics(np.array([1.0, value]))


@pytest.mark.parametrize(
    ("value", "random", "teacher", "expected"),
    [
        (350.0, 20.0, 500.0, 330 / 480),
        (-200.0, -1200.0, -150.0, 1000 / 1050),  # Pendulum: both negative, and the teacher is nearer to zero
        (-1200.0, -1200.0, -150.0, 0.0),
        (-150.0, -1200.0, -150.0, 1.0),
        (-1725.0, -1200.0, -150.0, -0.5),  # worse than random
        (600.0, -100.0, 250.0, 2.0),  # better than the teacher
        (1.0, 5.0, 5.0, None),
        (1.0, -150.0, -1200.0, None),
    ],
)
def test_normalized_return_by_hand(value, random, teacher, expected):
    assert normalized_return(value, random, teacher) == (None if expected is None else pytest.approx(expected))
