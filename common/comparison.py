"""Several runs side by side: mean and standard deviation over seeds.

    python -m common.report runs/NLP/seed0 runs/NLP/seed1 --markdown comparison.md --csv comparison.csv

groups runs by domain, task and method.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.report import Results, primary_score, validate
from common.tables import decimals, markdown, number, print_rich
from common.utils.errors import UserError
from common.utils.files import read_json, write_text


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
GROUP = ["domain", "task", "method", "metric"]


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Results], list[str]]:
    """The results of finished runs, and one line for each folder that is unfinished, unreadable or a repetition."""
    runs: dict[tuple[Any, ...], Results] = {}
    problems = []
    for folder in folders:
        try:
            results = read_json(Path(folder) / "results.json")
            validate(results)
        except (UserError, ValueError) as error:
            problems.append(str(error) if isinstance(error, UserError) else f"{folder}/results.json: {error}")
            continue
        key = (*_group(results), results["seed"])
        if key in runs:  # a seed counted twice would make the spread look smaller than it is
            problems.append(f"{folder} repeats seed {results['seed']} of {', '.join(key[:3])}")
        else:
            runs[key] = results
    return list(runs.values()), problems


def comparison(run_folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row per (domain, task, method, primary metric) over seeds; every figure is a Spread, or None if absent."""
    return _rows(read_runs(run_folders)[0])


def _rows(runs: list[Results]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(map(_group, runs)):
        members = [results for results in runs if _group(results) == group]
        row: dict[str, Any] = dict(zip(GROUP, group, strict=True)) | {"seeds": len(members)}
        for figure, value_of in FIGURES.items():
            values = [value for value in map(value_of, members) if value is not None]
            row[figure] = Spread.of(values)
        rows.append(row)
    return rows


def _group(results: Results) -> tuple[str, str, str, str]:
    primary = results["primary_metric"]
    return results["domain"], results["task"], results["method"], f"{primary['split']} {primary['name']}"


def _comparison_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "metric", "seeds", *(figure.replace("_", " ") for figure in FIGURES)]
    cells = []
    for row in rows:
        names = [", ".join(row[key] for key in GROUP[:3]), row["metric"], str(row["seeds"])]
        cells.append([*names, *(show_spread(row[figure], row["seeds"]) for figure in FIGURES)])
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
    """`python -m common.report RUN... [--markdown FILE] [--csv FILE]`"""
    parser = Parser(prog="python -m common.report", description="Mean and standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which holds results.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded figures as CSV")
    arguments = parser.parse_args(argv)
    compare(arguments.runs, arguments.markdown, arguments.csv)


def compare(folders: Iterable[str | Path], markdown_file: Path | None = None, csv_file: Path | None = None) -> None:
    """Prints the comparison of the runs in `folders`, and writes it where files are given. Raises UserError without
    any finished run.
    """
    runs, problems = read_runs(folders)
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
