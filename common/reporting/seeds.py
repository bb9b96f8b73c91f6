"""The results of several seeds as one: means, and standard deviations."""

import math
import statistics
from typing import Any

from kd.common.reporting.results import Results


def over_seeds(runs: list[Results]) -> Results:
    """The results of runs that differ in their seed alone, as one that follows the schema.

    Every number is the mean over the runs. `seeds` replaces `seed`; `standard_deviations` (sample, n - 1) holds those
    of `retention`, `gain_over_control` and, by model and split, the metrics. Intervals over the examples of one run
    have no mean: they are null where they differ.
    """
    merged = _mean([{key: value for key, value in run.items() if key != "seed"} for run in runs])
    merged["data"] |= {name: round(count) for name, count in merged["data"].items() if isinstance(count, float)}
    merged["seeds"] = [run["seed"] for run in runs]
    merged["warnings"] = list(dict.fromkeys(text for run in runs for text in run.get("warnings", [])))
    figures = [
        {
            "retention": run["retention"],
            "gain_over_control": run["gain_over_control"],
            "models": {role: model["metrics"] for role, model in run["models"].items() if model},
        }
        for run in runs
    ]
    merged["standard_deviations"] = _deviation(figures)
    return merged


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: _mean([value[key] for value in values]) for key in first if all(key in value for value in values)}
    if all(_is_number(value) for value in values):
        return first if all(value == first for value in values) else statistics.fmean(values)
    if any(value is None for value in values) or (isinstance(first, list) and any(value != first for value in values)):
        return None
    return first


def _deviation(values: list[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {k: _deviation([v[k] for v in values]) for k in first if all(k in value for value in values)}
    if len(values) > 1 and all(_is_number(value) for value in values):
        return statistics.stdev(map(float, values))
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
