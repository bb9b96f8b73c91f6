"""Several runs in one table: mean and standard deviation over seeds.

    python -m kd.common.reporting runs/** --markdown comparison.md --csv comparison.csv --plot comparison.png

finds the runs in and below these folders, of any mix of domains, and groups them by domain, task, method, metric and
the student's size.
"""

from pathlib import Path

from kd.common.cli import Parser, run
from kd.common.reporting.comparison import compare


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kd.common.reporting", description="Mean and standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of many")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded figures as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw quality against size")
    args = parser.parse_args(argv)
    compare(args.runs, args.markdown, args.csv, args.plot)


if __name__ == "__main__":
    run(main)
