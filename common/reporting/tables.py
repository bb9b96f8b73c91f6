"""Numbers and names as text, text in Markdown, and tables in Markdown and in the terminal."""

import re
import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MARKUP = re.compile(r"[\\`*<|]|\](?=\()|~(?=~)|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")  # Markdown in a line of text
WIDTH, TEXT_WIDTH = 100, 12  # width of a table in the terminal, and minimum width of a column of longer texts
WORDS = {
    "accuracy_in_scope": "accuracy in scope",
    "agreement": "agreement with the teacher",
    "bleu": "BLEU",
    "bleu_beam": "BLEU, beam search",
    "chrf": "chrF",
    "chrf_beam": "chrF, beam search",
    "ece": "expected calibration error",
    "control_cpu_time": "equal-CPU-time control",
    "cpu_seconds": "CPU seconds",
    "episodes_sampled": "episodes with sampled actions",
    "f1": "F1",
    "exact_match_threshold": "exact match with threshold",
    "f1_conll": "F1 as of conlleval",
    "f1_macro": "macro F1",
    "f1_macro_threshold": "macro F1 with threshold",
    "f1_micro": "micro F1",
    "f1_micro_threshold": "micro F1 with threshold",
    "flops_of_parts": "FLOPs of parts",
    "git_commit": "git commit",
    "kl": "KL divergence from the teacher",
    "map": "mean average precision",
    "matthews": "Matthews correlation",
    "mse": "mean squared error",
    "nll": "negative log-likelihood",
    "oos_recall": "out-of-scope recall",
    "oos_threshold": "out-of-scope threshold",
    "accuracy_threshold": "accuracy with threshold",
    "accuracy_in_scope_threshold": "accuracy in scope with threshold",
    "oos_recall_threshold": "out-of-scope recall with threshold",
    "pearson": "Pearson correlation",
    "return_ci95": "95% interval of the mean return",
    "return_iqm": "interquartile mean return",
    "return_mean": "mean return",
    "return_mean_sampled": "mean return of sampled actions",
    "return_of_random_actions": "mean return of random actions",
    "return_std": "standard deviation of the return",
    "spearman": "Spearman correlation",
    "top5_accuracy": "top-5 accuracy",
}


def words(name: str) -> str:
    """Readable text for a key of results.json: "f1_macro" becomes "macro F1"."""
    return WORDS.get(name, name.replace("_", " "))


def number(value: Any) -> str:
    """A number with four significant digits, a list of them, or a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{', '.join(map(number, value))}]"
    if isinstance(value, float):
        return f"{value:,.{decimals(value)}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def decimals(value: float) -> int:
    """Decimals for four significant digits, or for all digits before the point: 0.8100, 4.938, 1,234,567."""
    return 4 if abs(value) < 1 else max(0, 4 - len(str(int(abs(value)))))


def percent(share: float) -> str:
    """A share with two or more significant digits: 77%, 1.1%, 0.61%."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def gain_with_interval(verdict: dict[str, Any], decimals: int = 4) -> str:
    """The gain of a verdict with its interval, if it has one: 0.0223 (-0.0131 to 0.0577)."""
    numbers = [verdict["gain"], *(verdict["interval"] or ())]
    gain, *bounds = (f"{value:.{decimals}f}" for value in numbers)
    return f"{gain} ({' to '.join(bounds)})" if bounds else gain


def mean_and_deviation(values: list[float], seeds: int | None = None) -> str:
    """mean ± sample standard deviation (n - 1), and the number of values if it differs from `seeds`."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    deviation = f" ± {statistics.stdev(values):,.{decimals(mean)}f}" if len(values) > 1 else ""
    return f"{number(mean)}{deviation}" + (f" (n={len(values)})" if seeds not in (None, len(values)) else "")


def si(value: float | None) -> str:
    """A number with an SI prefix: 2.47 M."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _numeric_columns(header: list[str], rows: list[list[str]]) -> list[bool]:
    """The columns that are aligned to the right."""
    return [all(row[column][:1] in set("0123456789+-–[") for row in rows) for column in range(len(header))]


def escaped(text: str) -> str:
    """The text in one line, escaped so that Markdown renders it unchanged."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def code(text: str) -> str:
    """Text in one line as a code span."""
    text, marks = " ".join(text.split()), _longer_than_in(text, 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{marks}{space}{text}{space}{marks}"


def fenced(text: str, language: str = "") -> str:
    """Text as a block of code."""
    marks = _longer_than_in(text, 3)
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def _longer_than_in(text: str, least: int) -> str:
    """Backticks, at least `least`, and more than follow each other in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(header, rows)]
    cells = [list(map(escaped, header)), rule, *(list(map(escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def print_rich(header: list[str], rows: list[list[str]], title: str, below: str = "") -> None:
    """Prints a table that is WIDTH columns wide at most, unless its numbers need more: numbers are never broken."""
    console = Console()
    limit = min(WIDTH, console.width) if console.is_terminal else WIDTH
    numeric = _numeric_columns(header, rows)
    widths = _column_widths(header, rows, numeric, limit)
    console.width = max(limit, sum(widths) + 2 * len(widths))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name, width, right in zip(header, widths, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if below:
        console.print(f"\n{below}", highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _column_widths(header: list[str], rows: list[list[str]], numeric: list[bool], limit: int) -> list[int]:
    """Columns of numbers are as wide as their cells, and their headers wrap. Columns of text shrink to the limit."""
    cells = [max((len(row[column]) for row in rows), default=0) for column in range(len(header))]
    words = [max(map(len, name.split()), default=0) for name in header]
    widths = [max(cell, word) for cell, word in zip(cells, words, strict=True)]
    texts = [column for column, right in enumerate(numeric) if not right]
    while texts and sum(widths) + 2 * (len(widths) - 1) > limit:
        widest = max(texts, key=lambda column: widths[column])
        if widths[widest] <= max(TEXT_WIDTH, words[widest]):
            break
        widths[widest] -= 1
    return widths
