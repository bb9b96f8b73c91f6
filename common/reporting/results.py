"""The results of a run: the schema of results.json, its check, and several seeds merged into one."""

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from kd.common.metrics.verdict import (
    AT_CHANCE,
    MARGIN,
    Measurement,
    seeds_needed,
    verdict_of_one_seed,
    verdict_over_seeds,
    with_margin,
)
from kd.common.utils.errors import UserError

Results = dict[str, Any]  # the content of results.json, as `Schema` describes it
RECIPE, RESULTS = "recipe.yaml", "results.json"  # written when a run starts, and when it has finished


def read_recipe(folder: Path) -> dict[str, Any]:
    """The arguments that a run was started with. Raises UserError if they cannot be read."""
    path = folder / RECIPE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}): the arguments of the run cannot be read"
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: it contains no arguments")
    return recipe


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
    units: dict[str, str] = {}  # what a split consists of if not of samples, such as episodes


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


class Verdict(BaseModel):
    gain: float  # positive is better, also where `lower_is_better`
    interval: list[float] | None  # of the gain; None for too few evaluation examples
    confidence: float
    method: str  # of the interval
    seeds: int
    word: str  # better, no difference shown, or worse; with " (one seed)"


class Verdicts(BaseModel):
    control: Verdict | None
    teacher: Verdict | None  # has also `margin` and `not_worse_by_margin`
    others: dict[str, Verdict] = {}  # of the student against other models, by role
    shared_teacher: bool = True  # whether one teacher taught the students of all seeds
    warnings: list[str]


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
    # of retention, from that of the verdict on the teacher; null where teachers differ by seed or `lower_is_better`
    retention_interval: list[float] | None = None
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
    verdict: Verdicts | None = None  # missing in results of earlier versions


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
        if results[figure] is not None and any(primary_score(results, role) is None for role in others):
            raise ValueError(f"results.{figure} must be null where models.{' or models.'.join(others)} is")
    json.dumps(results, allow_nan=False)


# ---------------------------------------------------------------- scores


def primary_score(results: Results, stage: str) -> float | None:
    """The primary metric of a model, or of a teacher that is columns of the data; None if it is not known."""
    model, split, name = results["models"][stage], *(results["primary_metric"][key] for key in ("split", "name"))
    if model:
        return model["metrics"][split][name]
    return (
        score_of_outputs(results.get("teacher_outputs"), split, name, results["data"]) if stage == "teacher" else None
    )


def score_of_outputs(
    measured: Mapping[str, Any] | None, split: str, name: str, sizes: Mapping[str, Any]
) -> float | None:
    """The metric of a teacher's outputs in the data, if every row of the split has one; else it is not comparable."""
    of_split = (measured or {}).get(split)
    return of_split[name] if of_split and of_split["rows"] == sizes[split] else None


def useless_teacher(results: Results) -> str | None:
    """What the teacher is not better than: "chance", or "the control"; None for a useful teacher."""
    teacher, control = primary_score(results, "teacher"), primary_score(results, "control")
    if any(AT_CHANCE in warning for warning in results.get("warnings", [])):
        return "chance"
    sign = -1 if results.get("lower_is_better") else 1
    if teacher is not None and control is not None and sign * teacher <= sign * control:
        return "the control"
    return None


# ---------------------------------------------------------------- verdicts

CONSTANT = "the student predicts the same for all inputs of the evaluation"


def verdict_of_run(results: Results, measurements: Mapping[str, Measurement], margin: float | None) -> dict[str, Any]:
    """The verdict of one seed.

    Args:
        measurements: By role: the student and, unless there is none, control, teacher and any other models.
        margin: What counts as equal to the teacher. None: a share of the teacher's distance from chance.
    """
    student = measurements["student"]
    found = {
        role: verdict_of_one_seed(student.score, other.score, student.examples, results["lower_is_better"])
        for role, other in measurements.items()
        if role != "student"
    }
    if teacher := found.get("teacher"):
        found["teacher"] = with_margin(teacher, _default_margin(results) if margin is None else margin)
    return _with_warnings(results, found, student.constant)


def _default_margin(results: Results) -> float:
    teacher, chance = primary_score(results, "teacher"), results.get("chance")
    assert teacher is not None
    return MARGIN * abs(teacher - (results["floor"] if chance is None else chance))


def _verdict_of_runs(runs: list[Results], merged: Results, shared_teacher: bool) -> dict[str, Any]:
    """The verdict over seeds from those of the seeds."""
    verdicts, found = [run["verdict"] for run in runs], {}
    by_role = [verdict | verdict.get("others", {}) for verdict in verdicts]
    for role in ("control", "teacher", *verdicts[0].get("others", {})):
        of_role = [verdict[role] for verdict in by_role if verdict.get(role)]
        if len(of_role) == len(runs):
            found[role] = verdict_over_seeds(of_role)
    if teacher := found.get("teacher"):
        found["teacher"] = with_margin(teacher, statistics.fmean(verdict["teacher"]["margin"] for verdict in verdicts))
    constant = any(CONSTANT in verdict["warnings"] for verdict in verdicts)
    return _with_warnings(merged, found, constant) | {"shared_teacher": shared_teacher}


def retention_interval(results: Results) -> list[float] | None:
    """The interval of (student - floor) / (teacher - floor), from that of student - teacher, which is paired: it
    contains the variation of the teacher over the evaluation examples. None if there is no interval, if lower is
    better, or if each seed has another teacher.
    """
    verdict, score = results.get("verdict") or {}, primary_score(results, "teacher")
    interval = (verdict.get("teacher") or {}).get("interval")
    same = "seeds" not in results or verdict.get("shared_teacher")
    if interval is None or score is None or not same or results["retention"] is None or results.get("lower_is_better"):
        return None
    return [1 + bound / (score - results["floor"]) for bound in interval]


def _with_warnings(results: Results, found: dict[str, Any], constant: bool) -> dict[str, Any]:
    warnings = [text for text in results["warnings"] if AT_CHANCE in text]
    if useless_teacher(results) == "the control":
        warnings.append("the teacher is no better than the control: check it before distilling from it")
    if constant:
        warnings.append(CONSTANT)
    if (control := found.get("control")) and (needed := seeds_needed(control)):
        warnings.append(
            f"{control['seeds']} seeds are too few to show a gain over the control of this size: about {needed} are "
            "needed for a probability of 80%"
        )
    unit = results["data"].get("units", {}).get(results["primary_metric"]["split"], "examples")
    found = {role: one | {"method": one["method"].replace("examples", unit)} for role, one in found.items()}
    others = {role: verdict for role, verdict in found.items() if role not in ("control", "teacher")}
    return {"control": found.get("control"), "teacher": found.get("teacher"), "others": others, "warnings": warnings}


# ---------------------------------------------------------------- several seeds


def over_seeds(runs: list[Results]) -> Results:
    """Merges the results of runs that differ only in their seed; the merged results follow the schema.

    Every number is the mean over the runs. `seeds` replaces `seed`. `standard_deviations` (sample, n - 1) holds those
    of `retention`, `gain_over_control` and the metrics, by model and split. A model with the same metrics in all runs,
    such as a shared teacher, has none. Intervals over the examples of one run are null where they differ. The verdict
    is that over seeds.
    """
    kept = [{key: value for key, value in run.items() if key not in ("seed", "verdict")} for run in runs]
    merged = _merge(kept, _mean)
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
    if all(run.get("verdict") for run in runs):  # not those of earlier versions
        merged["verdict"] = _verdict_of_runs(runs, merged, "teacher" in same or "teacher_outputs" in merged)
    merged["retention_interval"] = retention_interval(merged)
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
