"""Plots: training curves of teacher, control and student, and quality against size over many runs.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import io
import math
import re
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from kd.common.reporting.tables import words
from kd.common.utils.files import write_bytes

STYLES = {  # colour, line, marker: each alone identifies the stage
    "teacher": ("#0072B2", "-", "o"),
    "control": ("#D55E00", "--", "s"),
    "student": ("#009E73", "-", "^"),
}
OTHER_STYLES = [("#CC79A7", "-.", "D"), ("#E69F00", ":", "v"), ("#56B4E9", "--", "P"), ("#000000", "-", "X")]
PAPER: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
GREY = "0.45"
LEGEND_WIDTH = 1.7  # inches of an entry of the legend
FINAL_SIZE = 9  # marker size of final scores
LABEL_SIZE, LABEL_DISTANCE, LABEL_HEIGHT = 7, 8, 9.5  # labels of models, in typographic points
History = dict[str, list[dict[str, Any]]]  # stage -> its log
Curve = list[tuple[float, float]]
Style = tuple[str, str, str]


# ---------------------------------------------------------------- training curves


def plot_curves(path: str | Path, history: History, results: dict[str, Any], progress: str = "epoch") -> None:
    """A panel for the primary metric on evaluation data and one for each kind of training loss that was logged more
    than once, over `progress`, with a line per stage.

    `history` maps a stage to its log dictionaries, as in the `state.log_history` of transformers.Trainer: `progress`
    (such as "epoch") with "loss", its parts "loss_NAME", or "eval_" + the primary metric. The final score of each
    model, as in the table of the report, is a circle. For a model without evaluations during training, such as a
    downloaded teacher, it is a dotted line.
    """
    losses, styles = _losses(history, progress), _styles(history, results)
    rows, columns = _grid(len(losses) + 1)
    end = max((entry[progress] for log in history.values() for entry in log if progress in entry), default=1)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(max(3.1 * columns, 6.2), 2.6 * rows + 0.4), dpi=200, layout="constrained")
        metric, *panels = figure.subplots(rows, columns, squeeze=False).flat
        _draw_metric(metric, history, results, progress, styles)
        for axes, (kind, curves) in zip(panels, losses.items(), strict=False):
            axes.set_ylabel(_capitalized(f"{kind} loss (weighted)" if kind else "training loss"))
            for stage, curve in curves.items():
                _draw(axes, stage, styles[stage], curve)
        for axes in figure.axes:
            axes.set_visible(bool(axes.lines))
            axes.set(xlabel=_capitalized(progress.replace("_", " ")), xlim=(0, 1.04 * end))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=end >= 3, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(EngFormatter(sep="") if end >= 10_000 else ScalarFormatter())
            axes.grid(alpha=0.25, linewidth=0.6)
        _add_legend(figure)
        save_figure(figure, path)


def _losses(history: History, progress: str) -> dict[str, dict[str, Curve]]:
    """Kind of loss -> stage -> curve. A kind is the sum of numbered parts, such as hidden_0 and hidden_1. A log
    without parts has one loss, of the kind "".
    """
    losses: dict[str, dict[str, Curve]] = {}
    for stage, log in history.items():
        kinds: dict[str, list[str]] = {}
        for part in dict.fromkeys(name for entry in log for name in entry if name.startswith("loss_")) or ["loss"]:
            kind = re.sub(r"(_\d+|_pooled)*$", "", part.removeprefix("loss").removeprefix("_"))
            kinds.setdefault(words(kind), []).append(part)
        for kind, parts in kinds.items():
            logged = [entry for entry in log if progress in entry and all(part in entry for part in parts)]
            if logged:
                curve = [(entry[progress], sum(entry[part] for part in parts)) for entry in logged]
                losses.setdefault(kind, {})[stage] = curve
    return {kind: curves for kind, curves in losses.items() if max(map(len, curves.values())) > 1}


def _draw_metric(
    axes: Axes, history: History, results: dict[str, Any], progress: str, styles: dict[str, Style]
) -> None:
    """The evaluations during training, the final scores, and chance level."""
    split, name = results["primary_metric"]["split"], results["primary_metric"]["name"]
    # Curves are never measured on test.
    axes.set_ylabel(_capitalized(words(name) if split == "test" else f"{split} {words(name)}"))
    for stage, (colour, line, marker) in styles.items():
        logged = [entry for entry in history.get(stage, []) if f"eval_{name}" in entry and progress in entry]
        curve = [(entry[progress], entry[f"eval_{name}"]) for entry in logged]
        _draw(axes, stage, (colour, line, marker), curve)
        if (model := results["models"].get(stage)) is None:
            continue
        final = model["metrics"][split][name]
        if curve:
            axes.plot(curve[-1][0], final, "o", color=colour, markerfacecolor="none", ms=FINAL_SIZE, mew=1.1)
        else:
            axes.axhline(final, color=colour, linestyle=":", linewidth=1.3, label=words(stage))
    if results.get("chance") is not None:
        axes.axhline(results["chance"], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="chance")
    low, high = axes.get_ylim()
    if results.get("lower_is_better") and 0 < 10 * low < high:
        axes.set_yscale("log")


def _styles(history: History, results: dict[str, Any]) -> dict[str, Style]:
    stages = dict.fromkeys([*STYLES, *results["models"], *history])
    return STYLES | dict(zip((stage for stage in stages if stage not in STYLES), cycle(OTHER_STYLES), strict=False))


def _draw(axes: Axes, stage: str, style: Style, curve: Curve) -> None:
    if not curve:
        return
    colour, line, marker = style
    every, (places, values) = max(1, len(curve) // 12), zip(*curve, strict=True)
    axes.plot(places, values, line, color=colour, marker=marker, markevery=every, ms=3.5, lw=1.3, label=words(stage))


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _add_legend(figure: Figure) -> None:
    """Adds one legend below all panels."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if any(line.get_markersize() == FINAL_SIZE for axes in figure.axes for line in axes.lines):
        entries["final score"] = Line2D([], [], marker="o", linestyle="", color=GREY, markerfacecolor="none")
    if entries:
        columns = int(figure.get_figwidth() / LEGEND_WIDTH)
        figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=columns, frameon=False)


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns."""
    columns = 2 if panels == 4 else min(panels, 3)
    return math.ceil(panels / columns), columns


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Writes a figure as PNG, atomically; `options` of `Figure.savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_bytes(path, buffer.getvalue())


# ---------------------------------------------------------------- quality against size


class Point(NamedTuple):
    """A model in the plot: its label, its role, its parameters, and mean and standard deviation of its metric."""

    label: str
    role: str
    size: int
    mean: float
    deviation: float


def plot_quality(path: str | Path, panels: dict[tuple[str, str], list[Point]]) -> None:
    """Quality against size: a panel for each (task, metric), a labelled point for each model. Controls are hollow, and
    bars are standard deviations over seeds.
    """
    rows, columns = _grid(len(panels))
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(4.4 * columns, 3.4 * rows), dpi=200, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ((task, metric), points), axes in zip(panels.items(), grid, strict=False):
            axes.set(title=task, xscale="log", xlabel="Parameters", ylabel=_capitalized(metric))
            axes.grid(alpha=0.25, linewidth=0.6)
            _draw_points(axes, points)
        for axes in grid:
            axes.set_visible(False)
        figure.draw_without_rendering()  # labels need the final positions of the points
        for points, axes in zip(panels.values(), figure.axes, strict=False):
            _add_labels(axes, points)
        save_figure(figure, path)


def _draw_points(axes: Axes, points: list[Point]) -> None:
    for _, role, size, mean, deviation in points:
        colour, _, marker = STYLES[role]
        face = "none" if role == "control" else colour
        axes.errorbar(size, mean, deviation, fmt="none", color=colour, elinewidth=1, capsize=2)
        axes.plot(size, mean, marker, color=colour, markerfacecolor=face, ms=5.5)
    smallest, largest = min(point.size for point in points), max(point.size for point in points)
    axes.set_xlim(smallest / 1.5, max(largest * 1.5, smallest * (largest / smallest) ** 1.4))  # room for the labels
    marks = LogLocator(subs=(1, 2, 5) if largest < 30 * smallest else (1,))
    axes.xaxis.set_major_locator(marks if largest > 4 * smallest else MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())


def _add_labels(axes: Axes, points: list[Point]) -> None:
    """Writes the label of each point to its right, or to its left near the edge, moved up where it would overlap."""
    scale = 72 / axes.figure.dpi  # pixels -> typographic points
    right = axes.get_window_extent().x1 * scale
    placed: list[tuple[float, float, float]] = []  # left and right end, height
    for point in sorted(points, key=lambda point: point.mean):
        x, y = axes.transData.transform((point.size, point.mean)) * scale
        width = 0.6 * LABEL_SIZE * len(point.label)
        start = x + LABEL_DISTANCE if x + LABEL_DISTANCE + width < right else x - LABEL_DISTANCE - width
        height = y
        for left, end, taken in placed:  # in the order of their heights
            if left < start + width and start < end and abs(height - taken) < LABEL_HEIGHT:
                height = taken + LABEL_HEIGHT
        placed = sorted([*placed, (start, start + width, height)], key=lambda label: label[2])
        end_of_line = (0 if start > x else 1, 0.5)  # end at the label of the line from a moved label to its point
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3, "relpos": end_of_line}
        axes.annotate(
            point.label,
            (point.size, point.mean),
            xytext=(start - x, height - y),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=STYLES[point.role][0],
            arrowprops=line if height - y > 3 else None,
        )
