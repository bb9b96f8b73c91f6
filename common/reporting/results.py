"""The results of a run: the schema of results.json, its check, and several seeds merged into one."""

import json
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

Results = dict[str, Any]  # the content of results.json, as `Schema` describes it
RECIPE, RESULTS = "recipe.yaml", "results.json"  # written when a run starts, and when it has finished


# ---------------------------------------------------------------- the schema, version 1


class Latency(BaseModel):
    batch: int
    median: float
    p90: float


class ModelResults(BaseModel):
    name: str
    parameters: int
    megabytes: float  # size of the weights
    flops: float | None  # one forward pass of one sample
    latency_ms: Latency
    metrics: dict[str, dict[str, float | list[Any] | None]]  # split -> metric -> value, or an interval


class Models(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, ModelResults | None]
    teacher: ModelResults | None
    control: ModelResults | None
    student: ModelResults | None


class Data(BaseModel):  # sizes of the splits
    train: int | None
    validation: int | None
    test: int | None
    fingerprint: str


class PrimaryMetric(BaseModel):
    split: str
    name: str


class Seconds(BaseModel):
    teacher: float | None
    teacher_outputs: float | None
    control: float | None
    student: float | None
    total: float


class Environment(BaseModel):
    python: str
    torch: str
    device: str
    threads: int
    precision: str
    git_commit: str | None


class Schema(BaseModel):
    """results.json; more keys are allowed everywhere.

    A run has a `seed`. The summary of several seeds has `seeds`, means, and `standard_deviations` (`over_seeds`).
    """

    schema_version: Literal[1]
    domain: str
    task: str
    method: str
    command: list[str]
    data: Data
    models: Models
    primary_metric: PrimaryMetric
    # (student - floor) / (teacher - floor) of the primary metric, or teacher / student if `lower_is_better`
    retention: float | None
    gain_over_control: float | None  # student - control, or control - student if `lower_is_better`
    floor: float = 0.0  # the metric without any skill
    chance: float | None = None  # the metric of a constant prediction, of token frequencies or of random actions
    lower_is_better: bool = False
    seconds: Seconds
    environment: Environment
    seed: int | None = None
    seeds: list[int] | None = None
    standard_deviations: dict[str, Any] | None = None
    warnings: list[str] = []


def validate(results: Results) -> None:
    """Raises ValueError, in one line that names the key, if `results` does not follow Schema or is not finite."""
    try:
        Schema.model_validate(results, strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        place = ".".join(["results", *map(str, error["loc"])])
        wrong = f"{place} is {error['input']!r}: {error['msg']}"
        raise ValueError(f"missing key {place}" if error["type"] == "missing" else wrong) from None
    if results.get("seed") is None and results.get("seeds") is None:
        raise ValueError("missing key results.seed, or results.seeds of several runs")
    split, name = results["primary_metric"]["split"], results["primary_metric"]["name"]
    for role, model in results["models"].items():
        metrics, place = model and model["metrics"], f"results.models.{role}.metrics"
        if model and split not in metrics:
            raise ValueError(f"missing key {place}.{split}")
        if model and not isinstance(metrics[split].get(name), int | float):
            raise ValueError(f"missing key {place}.{split}.{name}, a number")
    for figure, others in (("retention", ("teacher", "student")), ("gain_over_control", ("control", "student"))):
        if results[figure] is not None and any(results["models"][role] is None for role in others):
            raise ValueError(f"results.{figure} must be null where models.{' or models.'.join(others)} is")
    json.dumps(results, allow_nan=False)


# ---------------------------------------------------------------- scores


def primary_score(results: Results, stage: str) -> float | None:
    model, primary = results["models"][stage], results["primary_metric"]
    return model["metrics"][primary["split"]][primary["name"]] if model else None


# ---------------------------------------------------------------- several seeds


def over_seeds(runs: list[Results]) -> Results:
    """Merges the results of runs that differ only in their seed; the merged results follow the schema.

    Every number is the mean over the runs. `seeds` replaces `seed`. `standard_deviations` (sample, n - 1) holds those
    of `retention`, `gain_over_control` and the metrics, by model and split. A model with the same metrics in all runs,
    such as a shared teacher, has none. Intervals over the examples of one run are null where they differ.
    """
    merged = _merge([{key: value for key, value in run.items() if key != "seed"} for run in runs], _mean)
    merged["data"] |= {name: round(count) for name, count in merged["data"].items() if isinstance(count, float)}
    merged["seeds"] = [run["seed"] for run in runs]
    merged["warnings"] = list(dict.fromkeys(text for run in runs for text in run.get("warnings", [])))
    metrics = [{role: model["metrics"] for role, model in run["models"].items() if model} for run in runs]
    same = {role for role in metrics[0] if all(found.get(role) == metrics[0][role] for found in metrics)}
    figures = [
        {
            "retention": run["retention"],
            "gain_over_control": run["gain_over_control"],
            "models": {role: values for role, values in found.items() if role not in same},
        }
        for run, found in zip(runs, metrics, strict=True)
    ]
    merged["standard_deviations"] = _merge(figures, _deviation)
    return merged


def _merge(values: list[Any], statistic: Callable[[list[Any]], Any]) -> Any:
    """Merges dictionaries by their common keys, and other values by the statistic."""
    if all(isinstance(value, dict) for value in values):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: _merge([value[key] for value in values], statistic) for key in shared}
    return statistic(values)


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(map(_is_number, values)):
        return statistics.fmean(values)
    return None if isinstance(first, list) or any(value is None for value in values) else first


def _deviation(values: list[Any]) -> float | None:
    return statistics.stdev(map(float, values)) if len(values) > 1 and all(map(_is_number, values)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
