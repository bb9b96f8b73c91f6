"""Several runs in one table: mean and standard deviation over seeds."""

import math
import os
import stat
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.common.reporting.plots import TEACHER, Models, plot_quality
from kd.common.reporting.results import RECIPE, RESULTS, Results, primary_score, validate
from kd.common.reporting.tables import markdown, mean_and_deviation, number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text

# ---------------------------------------------------------------- several seeds of one run


def over_seeds(runs: list[Results]) -> Results:
    """The results of runs that differ in their seed alone, as one that follows the schema.

    Every number is the mean over the runs. `seeds` replaces `seed`; `standard_deviations` (sample, n - 1) holds those
    of `retention`, `gain_over_control` and, by model and split, the metrics; of a model with the same metrics in all
    runs, such as a shared teacher, there are none. Intervals over the examples of one run have no mean: they are null
    where they differ.
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
    """One value of several: dictionaries by the keys that all have, anything else by the statistic."""
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


# ---------------------------------------------------------------- reading runs


class Group(NamedTuple):
    """What runs share that differ in their seed only; of a sweep also the learning rate, which is in the method."""

    domain: str
    task: str
    method: str
    metric: str
    size: int  # parameters of the student

    @classmethod
    def of(cls, results: Results) -> "Group":
        primary = results["primary_metric"]
        method = results["method"] + (f" at {results['learning_rate']:g}" if "learning_rate" in results else "")
        metric = f"{primary['split']} {primary['name']}"
        return cls(results["domain"], results["task"], method, metric, _student(results, "parameters") or 0)


def _student(results: Results, figure: str) -> Any:
    student = results["models"]["student"]
    return student[figure] if student else None


FIGURES: dict[str, Callable[[Results], float | None]] = {  # the columns that are averaged; sizes are the student's
    "teacher": lambda results: primary_score(results, "teacher"),
    "control": lambda results: primary_score(results, "control"),
    "student": lambda results: primary_score(results, "student"),
    "retention": lambda results: results["retention"],
    "gain": lambda results: results["gain_over_control"],
    "parameters": lambda results: _student(results, "parameters"),
    "megabytes": lambda results: _student(results, "megabytes"),
    "latency_ms": lambda results: (_student(results, "latency_ms") or {}).get("median"),
    "seconds": lambda results: results["seconds"]["total"],
}
SIZES = {"parameters", "megabytes"}  # the same for every seed, but for rounding


def find_runs(places: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """The folders of runs, finished or not, in and below `places`, and one line for each place without any.

    A shell's `**` matches files and the insides of runs too: they are skipped.
    """
    named = [Path(place) for place in places]
    unreadable: dict[str, str] = {}

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # reported below, or removed meanwhile
            unreadable[str(error.filename)] = f"cannot read {error.filename}: {error.strerror}"

    marked = {
        Path(folder)
        for place in named
        for folder, _, files in os.walk(place, onerror=note)  # follows no link, which may lead in a circle
        if RESULTS in files or RECIPE in files
    }
    runs = sorted(marked)
    outermost = [place for place in named if not set(place.parents) & set(named)]
    without = [p for p in outermost if not any(run.is_relative_to(p) for run in runs) and str(p) not in unreadable]
    kinds = {place: _describe(place) for place in without}
    return runs, [*unreadable.values(), *(f"{place} {kind}" for place, kind in kinds.items() if kind)]


def _describe(place: Path) -> str | None:
    """Why a place has no runs; None for a file, of which `**` matches many."""
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "holds no run" if stat.S_ISDIR(mode) else None


def read_runs(places: Iterable[str | Path]) -> tuple[list[Results], list[str]]:
    """The results of finished runs in and below `places`, and one line for each that is unfinished, unreadable or a
    repetition.
    """
    runs: dict[tuple[Any, ...], tuple[Path, Results]] = {}
    folders, problems = find_runs(places)
    for folder in folders:
        if not os.path.lexists(folder / RESULTS):
            problems.append(f"{folder} has no {RESULTS}: it is unfinished, or part of another run")
            continue
        try:
            results = read_json(folder / RESULTS)
            validate(results)
            if "seeds" in results:  # the runs of these seeds are below
                continue
            key = (*Group.of(results), results["seed"])
        except UserError as error:
            problems.append(str(error))
            continue
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            problems.append(f"{folder / RESULTS}: {' '.join(str(error).split())}")
            continue
        if key in runs:  # a seed counted twice would make the deviation look smaller than it is
            others = ", ".join(key[:3])
            problems.append(f"{folder} repeats seed {results['seed']} of {others}, as {runs[key][0]} has it")
        else:
            runs[key] = folder, results
    return [results for _, results in runs.values()], problems


# ---------------------------------------------------------------- comparing them


def compare(
    places: Iterable[str | Path],
    markdown_file: Path | None = None,
    csv_file: Path | None = None,
    plot_file: Path | None = None,
) -> None:
    """Prints one row per Group of the runs in and below `places`, and writes it to the files whose paths are not None.

    Raises UserError without any finished run.
    """
    runs, problems = read_runs(places)
    if not runs:
        raise UserError(f"no finished run: {'; '.join(problems)}")
    rows = [Group.of(run)._asdict() | {name: figure(run) for name, figure in FIGURES.items()} for run in runs]
    frame = pd.DataFrame(rows).astype(dict.fromkeys(FIGURES, float))
    header, cells = _table(frame)
    left_out = "\n".join(f"left out: {problem}" for problem in problems)
    print_rich(header, cells, title="mean ± standard deviation over seeds", below=left_out)
    if markdown_file:
        write_text(markdown_file, markdown(header, cells) + "\n")
    if csv_file:
        write_text(csv_file, averages(frame).to_csv(index=False))
    if plot_file:
        plot_quality(plot_file, _panels(runs))


def _table(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    cells = []
    for (domain, task, method, metric, _), runs in frame.groupby([*Group._fields]):
        figures = [
            number(runs[name].mean()) if name in SIZES else mean_and_deviation(runs[name].dropna().tolist(), len(runs))
            for name in FIGURES
        ]
        cells.append([f"{domain}, {task}, {method}", metric, str(len(runs)), *figures])
    return ["run", "metric", "seeds", *(name.replace("_", " ") for name in FIGURES)], cells


def averages(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per Group: its names, the number of seeds, and unrounded mean and standard deviation of each figure; NaN
    where there is none. `frame` has a row per run, with the columns of Group and FIGURES.
    """
    groups = frame.groupby([*Group._fields])
    table = groups[[*FIGURES]].agg(["mean", "std"])
    table.columns = [f"{figure}_{part}" for figure, part in table.columns]
    table.insert(0, "seeds", groups.size())
    return table.reset_index().drop(columns="size")


def _panels(runs: list[Results]) -> dict[tuple[str, str], Models]:
    """What plot_quality draws; a model has a point for each method and size."""
    scores: dict[tuple[str, str, str, int, str], list[float]] = {}
    for results in runs:
        group = Group.of(results)
        for role in ("teacher", "control", "student"):
            score = primary_score(results, role)
            if score is not None:
                size = results["models"][role]["parameters"]
                scores.setdefault((group.task, group.metric, group.method, size, role), []).append(score)
    panels: dict[tuple[str, str], Models] = {}
    for (task, metric, method, size, role), values in sorted(scores.items()):
        name = (TEACHER if role == "teacher" else method, role == "control")
        point = (size, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        panels.setdefault((task, metric), {}).setdefault(name, []).append(point)
    return panels
