"""Formatting of figures, and tables in Markdown and in the terminal."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def number(value: Any) -> str:
    """A figure in four significant digits, a list of them, or a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{', '.join(map(number, value))}]"
    if isinstance(value, float):
        return f"{value:,.{decimals(value)}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def decimals(value: float) -> int:
    """Four significant digits, or all before the point: 0.8100, 4.938, 1,234,567."""
    return 4 if abs(value) < 1 else max(0, 4 - len(str(int(abs(value)))))


def mean_and_deviation(values: list[float], seeds: int | None = None) -> str:
    """mean ± sample standard deviation (n - 1), with the number of values where it is not that of the seeds."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    deviation = f"{statistics.stdev(values):,.{decimals(mean)}f}" if len(values) > 1 else "–"
    return f"{number(mean)} ± {deviation}" + (f" (n={len(values)})" if seeds not in (None, len(values)) else "")


def si(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _numeric_columns(header: list[str], rows: list[list[str]]) -> list[bool]:
    """The columns that are aligned to the right."""
    return [all(row[column][:1] in set("0123456789+-–") for row in rows) for column in range(len(header))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(header, rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [header, rule, *rows]
    )


def print_rich(header: list[str], rows: list[list[str]], title: str, below: str = "") -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # no line breaks in a log file
    table = Table(title=title)
    for name, numeric in zip(header, _numeric_columns(header, rows), strict=True):
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if below:
        console.print(below, highlight=False, markup=False)
