"""Figures as they are shown, and tables in Markdown and in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def number(value: Any) -> str:
    """A figure as it is shown, or a dash for what is absent."""
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


def si(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _numeric_columns(header: list[str], rows: list[list[str]]) -> list[bool]:
    """Columns of figures stand flush right."""
    return [all(row[column][:1] in set("0123456789+-–") for row in rows) for column in range(len(header))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(header, rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [header, rule, *rows]
    )


def print_rich(header: list[str], rows: list[list[str]], title: str, below: str = "") -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a log file has room
    table = Table(title=title)
    for name, numeric in zip(header, _numeric_columns(header, rows), strict=True):
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if below:
        console.print(below, highlight=False, markup=False)
