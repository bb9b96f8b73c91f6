"""Compares runs: mean and standard deviation over seeds, one table for each task and metric.

    python -m kd.common.reporting runs --markdown comparison.md --csv comparison.csv --plot comparison.png

Finds all finished runs in and below the folders, of any domain, and groups them by domain, task, method, metric and
size of the student. The verdict of a group is that over its seeds.
"""

import csv
import io
import os
import re
import stat
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kd.common.cli import Parser, run, show_help

PARSER = Parser(prog="python -m kd.common.reporting", description=__doc__)
PARSER.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or a folder that contains runs.")
PARSER.add_argument("--markdown", type=Path, metavar="FILE", help="Write the table as Markdown.")
PARSER.add_argument("--csv", type=Path, metavar="FILE", help="Write the unrounded numbers as CSV.")
PARSER.add_argument("--plot", type=Path, metavar="FILE", help="Plot quality against the number of parameters.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.metrics.verdict import verdict_over_seeds
from kd.common.reporting.plots import Point, plot_quality
from kd.common.reporting.results import RECIPE, RESULTS, Results, primary_score, validate
from kd.common.reporting.tables import markdown, mean_and_deviation, number, print_rich, si, words
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text


def main(argv: list[str] | None = None) -> None:
    args = PARSER.parse_args(argv)
    compare(args.runs, args.markdown, args.csv, args.plot)


# ---------------------------------------------------------------- reading runs


class Group(NamedTuple):
    """The properties by which runs are grouped: runs of a group differ only in their seed. The method of a sweep run
    includes its learning rate.
    """

    domain: str
    task: str
    method: str
    metric: str
    size: int  # parameters of the student

    @classmethod
    def of(cls, results: Results) -> "Group":
        primary = results["primary_metric"]
        method = results["method"] + (f" at {results['learning_rate']:g}" if "learning_rate" in results else "")
        metric = f"{primary['split']} {words(primary['name'])}"
        return cls(results["domain"], results["task"], method, metric, _student(results, "parameters") or 0)


def _student(results: Results, figure: str) -> Any:
    student = results["models"]["student"]
    return student[figure] if student else None


FIGURES: dict[str, Callable[[Results], float | None]] = {  # the columns that are averaged
    "teacher": lambda results: primary_score(results, "teacher"),
    "control": lambda results: primary_score(results, "control"),
    "student": lambda results: primary_score(results, "student"),
    "gain": lambda results: results["gain_over_control"],
    "retention": lambda results: results["retention"],
    "parameters": lambda results: _student(results, "parameters"),
    "megabytes": lambda results: _student(results, "megabytes"),
    "latency_ms": lambda results: (_student(results, "latency_ms") or {}).get("median"),
    "seconds": lambda results: results["seconds"]["total"],
}
PRINTED = ["teacher", "control", "student", "gain", "parameters"]  # more columns would not fit a terminal
SIZES = {"parameters", "megabytes"}  # equal for all seeds
FOLDER = "folder"  # key of results that were read


def find_runs(places: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Returns the folders of runs, finished or not, in and below `places`, and a line for each place without any.

    A shell expands `**` to files and to the folders inside of runs too: they are skipped.
    """
    named = [Path(place) for place in places]
    unreadable: dict[str, str] = {}

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # reported below, or removed meanwhile
            unreadable[str(error.filename)] = f"cannot read {error.filename}: {error.strerror}"

    marked = {
        Path(folder)
        for place in named
        for folder, _, files in os.walk(place, onerror=note)  # follows no links, which may form a cycle
        if RESULTS in files or RECIPE in files
    }
    runs = sorted(marked)
    outermost = [place for place in named if not set(place.parents) & set(named)]
    without = [p for p in outermost if not any(run.is_relative_to(p) for run in runs) and str(p) not in unreadable]
    kinds = {place: _describe(place) for place in without}
    return runs, [*unreadable.values(), *(f"{place} {kind}" for place, kind in kinds.items() if kind)]


def _describe(place: Path) -> str | None:
    """The reason why a path contains no runs; None for a file, because `**` matches many files."""
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "contains no run" if stat.S_ISDIR(mode) else None


def read_runs(places: Iterable[str | Path]) -> tuple[list[Results], list[str]]:
    """Returns the results of finished runs in and below `places`, and a line for each run that is unfinished,
    unreadable or a duplicate.
    """
    runs: dict[tuple[Any, ...], tuple[Path, Results]] = {}
    folders, problems = find_runs(places)
    finished = {folder for folder in folders if os.path.lexists(folder / RESULTS)}
    for folder in folders:
        if folder not in finished:
            if not _contains_runs(folder, finished):
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
        if key in runs:  # counting a seed twice would make the deviation too small
            others = ", ".join(key[:3])
            problems.append(f"{folder} repeats seed {results['seed']} of {others} from {runs[key][0]}")
        else:
            runs[key] = folder, results | {FOLDER: str(folder)}
    return [results for _, results in runs.values()], problems


def _contains_runs(folder: Path, finished: set[Path]) -> bool:
    """Whether a folder only groups runs, such as OUT/TASK of GLUE: it contains finished runs, but no finished seed
    run. A folder with a finished seed run is an unfinished run of several seeds.
    """
    below = [run for run in finished if folder in run.parents]
    return bool(below) and not any(run.parent == folder and run.name.startswith("seed") for run in below)


# ---------------------------------------------------------------- comparing them


def compare(
    places: Iterable[str | Path],
    markdown_file: Path | None = None,
    csv_file: Path | None = None,
    plot_file: Path | None = None,
) -> None:
    """Prints a row for each Group of the runs in and below `places`, and writes the files whose paths are not None.

    Raises UserError if there is no finished run.
    """
    runs, problems = read_runs(places)
    if not runs:
        raise UserError(f"no finished run: {'; '.join(problems)}")
    groups: dict[Group, list[Results]] = {}
    for results in sorted(runs, key=lambda results: (Group.of(results), results["seed"])):
        groups.setdefault(Group.of(results), []).append(results)
    for (domain, task, metric), part in _by_metric(groups).items():
        header, rows = _table(part, PRINTED)
        rows = [[group.method, *row[2:]] for group, row in zip(part, rows, strict=True)]
        title = f"{domain}: {task}, {metric}, mean ± standard deviation over seeds"
        verdicts = [f"{group.method} ({names_of(runs)}): {verdict_of(runs)}" for group, runs in part.items()]
        print_rich(
            ["method", *header[2:]], rows, title, "\n".join(["Verdict on the gain over the control:", *verdicts])
        )
        print()
    print(*(f"left out: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    if markdown_file:
        header, rows = _table(groups, list(FIGURES))
        more = [[verdict_of(runs), names_of(runs)] for runs in groups.values()]
        rows = [[*row, *cells] for row, cells in zip(rows, more, strict=True)]
        write_text(markdown_file, markdown([*header, "verdict", "folder"], rows) + "\n")
    if csv_file:
        write_text(csv_file, averages(groups))
    if plot_file:
        plot_quality(plot_file, _panels(groups))


def _by_metric(groups: dict[Group, list[Results]]) -> dict[tuple[str, str, str], dict[Group, list[Results]]]:
    """The groups of each domain, task and metric."""
    parts: dict[tuple[str, str, str], dict[Group, list[Results]]] = {}
    for group, runs in groups.items():
        parts.setdefault((group.domain, group.task, group.metric), {})[group] = runs
    return parts


def names_of(runs: list[Results]) -> str:
    """The folders of the runs of a group, without seedN."""
    names = (re.sub(r"[/\\]seed\d+(?=[/\\]|$)", "", run[FOLDER]) for run in runs)
    return ", ".join(dict.fromkeys(names))


def verdict_of(runs: list[Results]) -> str:
    """The word of the verdict on student and control over the seeds of a group, with their number; a dash if there is
    none.
    """
    verdicts = [control for run in runs if (control := (run.get("verdict") or {}).get("control"))]
    if len(verdicts) < len(runs):
        return number(None)
    verdict = verdict_over_seeds(verdicts)
    return str(verdict["word"]) + (f" ({verdict['seeds']} seeds)" if verdict["seeds"] > 1 else "")


def _values(runs: list[Results], figure: str) -> list[float]:
    return [float(value) for results in runs if (value := FIGURES[figure](results)) is not None]


def _table(groups: dict[Group, list[Results]], figures: list[str]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for group, runs in groups.items():
        row = [f"{group.task}, {group.method}", group.metric, str(len(runs))]
        for figure in figures:
            values = _values(runs, figure)
            if figure == "parameters":
                row.append(si(values[0]) if values else number(None))
            elif figure in SIZES:
                row.append(number(values[0] if values else None))
            else:
                row.append(mean_and_deviation(values, len(runs)))
        cells.append(row)
    return ["run", "metric", "seeds", *map(words, figures)], cells


def averages(groups: dict[Group, list[Results]]) -> str:
    """CSV with a row per Group: its names, the number of seeds, the unrounded mean and standard deviation of each
    figure, empty where there is none, the verdict and the folders.
    """
    text = io.StringIO()
    parts = [f"{figure}_{part}" for figure in FIGURES for part in ("mean", "std")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Group._fields[:4], "seeds", *parts, "verdict", "folder"])
    for group, runs in groups.items():
        row: list[Any] = [*group[:4], len(runs)]
        for values in (_values(runs, figure) for figure in FIGURES):
            row += [statistics.fmean(values) if values else "", statistics.stdev(values) if len(values) > 1 else ""]
        writer.writerow([*row, verdict_of(runs), names_of(runs)])
    return text.getvalue()


def _panels(groups: dict[Group, list[Results]]) -> dict[tuple[str, str], list[Point]]:
    """The points that plot_quality draws: for each method and size teacher, control and student."""
    panels: dict[tuple[str, str], list[Point]] = {}
    for group, runs in groups.items():
        for role in ("teacher", "control", "student"):
            models = [results for results in runs if results["models"][role]]
            scores = [score for results in models if (score := primary_score(results, role)) is not None]
            if scores:
                deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
                size = models[0]["models"][role]["parameters"]
                point = Point(
                    role if role != "student" else group.method, role, size, statistics.fmean(scores), deviation
                )
                points = panels.setdefault((group.task, group.metric), [])
                points += [point] if point not in points else []
    return panels


if __name__ == "__main__":
    run(main)
