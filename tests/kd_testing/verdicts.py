"""Checks the verdicts of runs against computations from their metrics."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kd.common.reporting.results import primary_score, validate


def check_verdict(results: dict[str, Any]) -> None:
    """Checks the verdict of a run of one seed with teacher and control."""
    validate(results)
    for role in ("control", "teacher"):
        verdict, (low, high) = results["verdict"][role], results["verdict"][role]["interval"]
        assert verdict["gain"] == pytest.approx(_gain(results, role), abs=1e-6)
        assert low <= verdict["gain"] <= high and (low < high or verdict["gain"] == low)
        assert verdict["seeds"] == 1 and verdict["word"] == _word(low, high) + " (one seed)"
    _check_margin(results)


def check_verdict_over_seeds(results: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Checks the verdict over seeds, from the metrics and the intervals of the runs."""
    validate(results)
    for role in ("control", "teacher"):
        gains = [_gain(run, role) for run in runs]
        interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95) if np.std(gains) else (np.mean(gains),) * 2
        of_runs = [run["verdict"][role]["interval"] for run in runs]
        half = max((interval[1] - interval[0]) / 2, np.mean([(high - low) / 2 for low, high in of_runs]))
        verdict, mean = results["verdict"][role], np.mean(gains)
        assert verdict["gain"] == pytest.approx(mean, abs=1e-6)
        assert verdict["interval"] == pytest.approx([mean - half, mean + half], abs=1e-5)
        assert verdict["seeds"] == len(runs) and verdict["word"] == _word(*verdict["interval"])
    _check_margin(results)


def _gain(results: dict[str, Any], role: str) -> float:
    student, other = primary_score(results, "student"), primary_score(results, role)
    assert student is not None and other is not None
    return other - student if results["lower_is_better"] else student - other


def _word(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _check_margin(results: dict[str, Any]) -> None:
    teacher, verdict = primary_score(results, "teacher"), results["verdict"]["teacher"]
    assert teacher is not None
    chance = results.get("chance")
    distance = abs(teacher - (results["floor"] if chance is None else chance))
    assert math.isclose(verdict["margin"], 0.01 * distance, rel_tol=1e-6, abs_tol=1e-9)
    assert verdict["not_worse_by_margin"] == (verdict["interval"][0] > -verdict["margin"])
