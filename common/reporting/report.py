"""Several runs side by side: mean and standard deviation over seeds.

    python -m kd.common.reporting.report runs/** --markdown comparison.md --csv comparison.csv --plot comparison.png

finds the runs in and below the folders it is given, of any mix of domains, and groups them by domain, task, method,
metric and the student's size.
"""

import csv
import io
import os
import stat
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.cli import Parser, run
from kd.common.reporting.plots import TEACHER, Models, plot_quality
from kd.common.reporting.results import RECIPE, RESULTS, Results, primary_score, validate
from kd.common.reporting.tables import decimals, markdown, number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for a single value) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


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
GROUP = ["domain", "task", "method", "metric"]


def find_runs(places: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """The folders of runs, finished or not, in and below `places`, and one line for each place without any.

    A shell's `**` names files and the insides of runs too: they are passed over.
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
    kinds = {place: _what_is(place) for place in without}
    return runs, [*unreadable.values(), *(f"{place} {kind}" for place, kind in kinds.items() if kind)]


def _what_is(place: Path) -> str | None:
    """What a place without runs is; None for a file, of which there are many among what `**` names."""
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
            if "seeds" in results:  # the runs of these seeds lie below
                continue
            key = (*_group(results), results["seed"])
            for figure in FIGURES.values():
                float(figure(results) or 0)
        except UserError as error:
            problems.append(str(error))
            continue
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            problems.append(f"{folder / RESULTS}: {' '.join(str(error).split())}")
            continue
        if key in runs:  # a seed counted twice would make the spread look smaller than it is
            others = ", ".join(key[:3])
            problems.append(f"{folder} repeats seed {results['seed']} of {others}, as {runs[key][0]} has it")
        else:
            runs[key] = folder, results
    return [results for _, results in runs.values()], problems


def comparison(places: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row per (domain, task, method, primary metric, student's size) over the seeds of the runs in and below
    `places`, sorted; every figure is a Spread, or None if absent.
    """
    return _rows(read_runs(places)[0])


def _rows(runs: list[Results]) -> list[dict[str, Any]]:
    rows = []
    for group in sorted(set(map(_group, runs))):
        members = [results for results in runs if _group(results) == group]
        row: dict[str, Any] = dict(zip(GROUP, group, strict=False)) | {"seeds": len(members)}
        for figure, value_of in FIGURES.items():
            values = [value for value in map(value_of, members) if value is not None]
            row[figure] = Spread.of(values)
        rows.append(row)
    return rows


def _group(results: Results) -> tuple[str, str, str, str, int]:
    """What runs share that differ in their seed only: the parts of GROUP, and the student's size. The students of a
    sweep differ in their learning rates too.
    """
    primary, size = results["primary_metric"], _student(results, "parameters") or 0
    method = results["method"] + (f" at {results['learning_rate']:g}" if "learning_rate" in results else "")
    return results["domain"], results["task"], method, f"{primary['split']} {primary['name']}", size


def _comparison_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "metric", "seeds", *(figure.replace("_", " ") for figure in FIGURES)]
    cells = []
    for row in rows:
        names = [", ".join(row[key] for key in GROUP[:3]), row["metric"], str(row["seeds"])]
        figures = [
            number(row[figure] and row[figure].mean) if figure in SIZES else show_spread(row[figure], row["seeds"])
            for figure in FIGURES
        ]
        cells.append([*names, *figures])
    return header, cells


def show_spread(spread: Spread | None, seeds: int | None = None) -> str:
    """mean ± standard deviation, with the number of values where it is not that of the seeds."""
    if spread is None:
        return "–"
    std = "–" if spread.std is None else f"{spread.std:,.{decimals(spread.mean)}f}"
    partial = f" (n={spread.n})" if seeds not in (None, spread.n) else ""
    return f"{number(spread.mean)} ± {std}{partial}"


def _csv(rows: list[dict[str, Any]]) -> str:
    """Unrounded, with two columns per figure: mean and standard deviation; empty where there is none."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*GROUP, "seeds", *(f"{figure}_{part}" for figure in FIGURES for part in ("mean", "std"))])
    for row in rows:
        spreads = [[row[key].mean, row[key].std] if row[key] else [None, None] for key in FIGURES]
        writer.writerow([row[key] for key in (*GROUP, "seeds")] + [value for pair in spreads for value in pair])
    return table.getvalue()


def main(argv: list[str] | None = None) -> None:
    """`python -m kd.common.reporting.report RUN... [--markdown FILE] [--csv FILE]`"""
    parser = Parser(prog="python -m kd.common.reporting.report", description="Mean and standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of many")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded figures as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw quality against size")
    arguments = parser.parse_args(argv)
    compare(arguments.runs, arguments.markdown, arguments.csv, arguments.plot)


def compare(
    places: Iterable[str | Path],
    markdown_file: Path | None = None,
    csv_file: Path | None = None,
    plot_file: Path | None = None,
) -> None:
    """Prints the comparison of the runs in and below `places`, and writes it where files are given. Raises UserError
    without any finished run.
    """
    runs, problems = read_runs(places)
    if not runs:
        raise UserError(f"no finished run: {'; '.join(problems)}")
    rows = _rows(runs)
    header, cells = _comparison_table(rows)
    left_out = "\n".join(f"left out: {problem}" for problem in problems)
    print_rich(header, cells, title="mean ± standard deviation over seeds", below=left_out)
    if markdown_file:
        write_text(markdown_file, markdown(header, cells) + "\n")
    if csv_file:
        write_text(csv_file, _csv(rows))
    if plot_file:
        plot_quality(plot_file, _panels(runs))


def _panels(runs: list[Results]) -> dict[tuple[str, str], Models]:
    """What plot_quality draws; a model has a point for each method and size."""
    scores: dict[tuple[str, str, str, int, str], list[float]] = {}
    for results in runs:
        _, task, method, metric, _ = _group(results)
        for role, model in results["models"].items():
            score = primary_score(results, role)
            if role in ("teacher", "control", "student") and model and score is not None:
                scores.setdefault((task, metric, method, model["parameters"], role), []).append(score)
    panels: dict[tuple[str, str], Models] = {}
    for (task, metric, method, size, role), values in sorted(scores.items()):
        spread = Spread.of(values)
        assert spread is not None, "each has at least one value"
        name = (TEACHER if role == "teacher" else method, role == "control")
        panels.setdefault((task, metric), {}).setdefault(name, []).append((size, spread.mean, spread.std or 0.0))
    return panels


if __name__ == "__main__":
    run(main)
