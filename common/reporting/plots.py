"""Plots: training curves of teacher, control and student, and quality against size over many runs.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import io
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

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
LABEL_SIZE, LABEL_DISTANCE, LABEL_HEIGHT = 7, 8, 9.5  # of the labels of points, in typographic points
History = dict[str, list[dict[str, Any]]]  # stage -> its log
Curve = list[tuple[float, float]]


# ---------------------------------------------------------------- training curves


def plot_curves(path: str | Path, history: History, results: dict[str, Any], progress: str = "epoch") -> None:
    """A panel for each kind of training loss and one for the primary metric on evaluation data, over `progress`, with
    a line per stage.

    `history` maps a stage to its log dictionaries, as in the `state.log_history` of transformers.Trainer: `progress`
    (such as "epoch") with "loss", its parts "loss_NAME", or "eval_" + the primary metric. The final score of each
    model, as in the table of the report, is a large marker; without evaluations during training, as of a downloaded
    teacher, it is a dotted line.
    """
    losses = _losses(history, progress)
    columns = min(len(losses) + 1, 3)
    rows = math.ceil((len(losses) + 1) / columns)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(max(3.1 * columns, 6.2), 2.6 * rows + 0.4), dpi=200, layout="constrained")
        metric, *panels = figure.subplots(rows, columns, squeeze=False).flat
        styles = _styles(history, results)
        _draw_metric(metric, history, results, progress, styles)
        _label(metric, progress, words(results["primary_metric"]["name"]))
        for axes, (kind, curves) in zip(panels, losses.items(), strict=False):
            for stage, curve in curves.items():
                _draw(axes, stage, styles[stage], curve)
            _label(axes, progress, f"{kind} loss (weighted)" if kind else "training loss")
        for axes in panels[len(losses) :]:
            axes.set_visible(False)
        _add_legend(figure)
        save_figure(figure, path)


def _losses(history: History, progress: str) -> dict[str, dict[str, Curve]]:
    """Kind of loss -> stage -> curve. A kind sums the numbered parts of an objective, such as hidden_0 and hidden_1.
    The kind of a log without parts is empty.
    """
    losses: dict[str, dict[str, Curve]] = {}
    for stage, log in history.items():
        parts = dict.fromkeys(name for entry in log for name in entry if name.startswith("loss_")) or {"loss": None}
        kinds: dict[str, list[str]] = {}
        for part in parts:
            kinds.setdefault(words(re.sub(r"(_\d+|_pooled)*$", "", part.removeprefix("loss").removeprefix("_"))), []).append(part)
        for kind, names in kinds.items():
            logged = [entry for entry in log if progress in entry and all(name in entry for name in names)]
            if logged:
                curve = [(entry[progress], sum(entry[name] for name in names)) for entry in logged]
                losses.setdefault(kind, {})[stage] = curve
    return losses


def _draw_metric(
    axes: Axes, history: History, results: dict[str, Any], progress: str, styles: dict[str, tuple[str, str, str]]
) -> None:
    """The evaluations during training, the final scores, and chance level."""
    primary = results["primary_metric"]
    for stage, style in styles.items():
        key = f"eval_{primary['name']}"
        curve = [(entry[progress], entry[key]) for entry in history.get(stage, []) if {key, progress} <= entry.keys()]
        model = results["models"].get(stage)
        final = model["metrics"][primary["split"]][primary["name"]] if model else None
        _draw(axes, stage, style, curve)
        if final is not None and curve:
            axes.plot(curve[-1][0], final, style[2], color=style[0], markerfacecolor="none", ms=8, mew=1.3, clip_on=False)
        elif final is not None:
            axes.axhline(final, color=style[0], linestyle=":", linewidth=1.3, label=words(stage))
    if results.get("chance") is not None:
        axes.axhline(results["chance"], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="chance")
    if results.get("lower_is_better"):
        axes.set_yscale("log")


def _styles(history: History, results: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    stages = dict.fromkeys([*STYLES, *results["models"], *history])
    others = [stage for stage in stages if stage not in STYLES]
    return STYLES | {stage: OTHER_STYLES[i % len(OTHER_STYLES)] for i, stage in enumerate(others)}


def _draw(axes: Axes, stage: str, style: tuple[str, str, str], curve: Curve) -> None:
    if not curve:
        return
    colour, line, marker = style
    every = max(1, len(curve) // 12)
    axes.plot(*zip(*curve, strict=True), line, color=colour, marker=marker, markevery=every, ms=3.5, lw=1.3, label=words(stage))


def _label(axes: Axes, progress: str, quantity: str) -> None:
    axes.set_xlabel(_capitalized(progress.replace("_", " ")))
    axes.set_ylabel(_capitalized(quantity))
    last = max((max(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 2 or line.get_marker() != "None"), default=1)
    axes.set_xlim(0, last * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=last >= 3, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _add_legend(figure: Figure) -> None:
    """One legend below all panels."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)


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
    """Quality against size: a panel for each (task, metric), a labelled point for each model. Controls are hollow; bars
    are standard deviations over seeds.
    """
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
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
    for label, role, size, mean, deviation in points:
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
        moved = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            point.label,
            (point.size, point.mean),
            xytext=(start - x, height - y),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=STYLES[point.role][0],
            arrowprops=moved if height - y > 3 else None,
        )
