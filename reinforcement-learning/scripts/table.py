"""Prints a table of distilled policies: a row for each run of distill_policy.py.

    python reinforcement-learning/scripts/table.py runs/reinforcement-learning/zoo --markdown zoo.md

Finds all finished runs in and below the folders. Runs of several seeds have one row: means, standard deviations over
the seeds, and the normalized return (student - random) / (teacher - random) with its 95% interval. The parameters are
those of the actors. The CPU seconds are those of the student's distillation, without evaluations.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

from kd.common.cli import Parser, run, show_help

PARSER = Parser(prog="table.py", description=__doc__)
PARSER.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or a folder that contains runs.")
PARSER.add_argument("--markdown", type=Path, metavar="FILE", help="Write the table as Markdown.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.__main__ import find_runs
from kd.common.reporting.report import score_text
from kd.common.reporting.results import RESULTS, Results, validate
from kd.common.reporting.tables import markdown, number, percent, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text

HEADER = ["teacher", "environment", "actor", "student's actor", "teacher's return", "student", "behaviour cloning"]
HEADER += ["control, steps", "control, CPU time", "normalized return", "CPU s"]
ROLES = ("teacher", "student", "behaviour_cloning", "control", "control_cpu_time")


def main(argv: list[str] | None = None) -> None:
    args = PARSER.parse_args(argv)
    runs = read_runs(args.runs)
    rows = [row(results) for results in runs]
    shares = [results["retention"] for results in runs if results["retention"] is not None]
    summary = f"Mean normalized return of {len(shares)} runs: {number(statistics.fmean(shares))}." if shares else ""
    print_rich(HEADER, rows, "Distilled policies", summary)
    if args.markdown:
        write_text(args.markdown, f"{markdown(HEADER, rows)}\n\n{summary}\n")


def read_runs(places: Iterable[str | Path]) -> list[Results]:
    """The results of the runs in and below `places`, without the single seeds of runs of several seeds. Raises
    UserError if there are none.
    """
    found: dict[Path, Results] = {}
    folders, problems = find_runs(places)
    for folder in folders:
        if not (folder / RESULTS).exists():
            continue
        results = read_json(folder / RESULTS)
        try:
            validate(results)
        except ValueError as error:
            raise UserError(f"{folder / RESULTS}: {error}") from None
        if results["domain"] == "reinforcement-learning" and "actors" in results and results["models"]["student"]:
            found[folder] = results
    several = {folder for folder, results in found.items() if "seeds" in results}
    runs = [results for folder, results in found.items() if not several & set(folder.parents)]
    if not runs:
        raise UserError("; ".join(["no finished run of distill_policy.py", *problems]))
    return runs


def row(results: Results) -> list[str]:
    actors, work = results["actors"], results.get("work", {})
    sizes = [f"{actors['teacher']['parameters']:,}"]
    sizes += [f"{actors['student']['parameters']:,} ({percent(actors['student']['share_of_the_teacher'])})"]
    scores = [score_text(results, role) if results["models"].get(role) else number(None) for role in ROLES]
    seconds = number(work.get("student", {}).get("cpu_seconds"))
    return [results["models"]["teacher"]["name"], results["task"], *sizes, *scores, normalized(results), seconds]


def normalized(results: Results) -> str:
    """The normalized return with its interval."""
    if results["retention"] is None:
        return number(None)
    interval = results.get("retention_interval")
    return f"{results['retention']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


if __name__ == "__main__":
    run(main)
