"""Plots: training curves of teacher, control and student, and quality against size over many runs.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from kd.common.utils.files import write_bytes

STYLES = {  # colour, line, marker: each alone identifies the stage
    "teacher": ("#0072B2", "-", "o"),
    "control": ("#D55E00", "--", "s"),
    "student": ("#009E73", "-", "^"),
}
OTHER_STYLES = [("#CC79A7", "-.", "D"), ("#E69F00", ":", "v"), ("#56B4E9", "--", "P"), ("#000000", "-", "X")]

COLOURS, _, MARKERS = zip(STYLES["student"], STYLES["control"], *OTHER_STYLES, strict=True)
METHOD_STYLES = [
    (COLOURS[i], MARKERS[(i + turn) % len(MARKERS)]) for turn in range(len(MARKERS)) for i in range(len(COLOURS))
]
PAPER: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
Point = tuple[int, float, float]  # parameters, mean and standard deviation of a metric
TEACHER = "teacher"
Models = dict[tuple[str, bool], list[Point]]  # TEACHER or a method, and whether it is its control


def plot_curves(
    path: str | Path, history: dict[str, list[dict[str, Any]]], results: dict[str, Any], progress: str = "epoch"
) -> None:
    """Training loss (left) and primary metric on evaluation data (right) over `progress`, one line per stage.

    `history` maps a stage to its log dictionaries, as in the `state.log_history` of transformers.Trainer: `progress`
    (such as "epoch") with "loss" or with "eval_" + the primary metric. A model without evaluations during training,
    such as a downloaded teacher, shows its final metric as a horizontal line.
    """
    primary = results["primary_metric"]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(7.2, 2.9), dpi=200, layout="constrained")
        losses, metrics = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        for stage, style in _styles(history, results).items():
            log = history.get(stage, [])
            _draw(losses, stage, style, _points(log, progress, "loss"))
            points = _points(log, progress, f"eval_{primary['name']}")
            _draw(metrics, stage, style, points)
            model = results["models"].get(stage)
            if not points and model:
                level = model["metrics"][primary["split"]][primary["name"]]
                metrics.axhline(level, color=style[0], linestyle=":", linewidth=1.2, label=f"{stage} (final)")
        _finish(losses, progress, "Training loss (weighted sum)")
        quantity = primary["name"] if primary["split"] == "test" else f"{primary['split']} {primary['name']}"
        _finish(metrics, progress, quantity.replace("_", " ").capitalize())  # no curve is of the test split
        save_figure(figure, path)


def plot_quality(path: str | Path, panels: dict[tuple[str, str], Models]) -> None:
    """Quality against size: a panel for each (task, metric), a marker for each model; the control of a method is
    hollow. Bars are standard deviations over seeds.
    """
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(3.6 * columns, 3.6 * rows), dpi=200, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ((task, metric), models), axes in zip(panels.items(), grid, strict=False):
            axes.set(title=task, xscale="log", xlabel="Parameters", ylabel=metric.replace("_", " ").capitalize())
            axes.grid(alpha=0.25, linewidth=0.6)
            _draw_models(axes, models)
        for axes in grid:
            axes.set_visible(False)
        save_figure(figure, path)


def _draw_models(axes: Axes, models: Models) -> None:
    methods = dict.fromkeys(name for name, _ in models if name != TEACHER)
    styles = dict(zip(methods, itertools.cycle(METHOD_STYLES), strict=False)) | {TEACHER: STYLES["teacher"][::2]}
    for (name, is_control), points in models.items():
        colour, marker = styles[name]
        sizes, means, deviations = zip(*points, strict=True)
        face, label = ("none", None) if is_control else (colour, name)
        axes.errorbar(sizes, means, deviations, fmt="none", color=colour, elinewidth=1, capsize=2)
        axes.plot(sizes, means, marker, color=colour, markerfacecolor=face, ms=5.5, label=label)
    every_size = [size for points in models.values() for size, _, _ in points]
    smallest, largest = min(every_size) / 1.5, max(every_size) * 1.5
    axes.set_xlim(smallest, largest)
    marks = LogLocator(subs=(1, 2, 5) if largest < 30 * smallest else (1,))
    axes.xaxis.set_major_locator(marks if largest > 4 * smallest else MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    if any(is_control for _, is_control in models):
        axes.plot([], [], "o", color="0.4", markerfacecolor="none", label="hollow: its control")
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Writes a figure as PNG, atomically; `options` of `Figure.savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_bytes(path, buffer.getvalue())


def _styles(history: dict[str, Any], results: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    stages = dict.fromkeys([*STYLES, *results["models"], *history])
    others = [stage for stage in stages if stage not in STYLES]
    return STYLES | {stage: OTHER_STYLES[i % len(OTHER_STYLES)] for i, stage in enumerate(others)}


def _points(log: list[dict[str, Any]], progress: str, key: str) -> list[tuple[float, float]]:
    return [(entry[progress], entry[key]) for entry in log if key in entry and progress in entry]


def _draw(axes: Axes, stage: str, style: tuple[str, str, str], points: list[tuple[float, float]]) -> None:
    if not points:
        return
    colour, line, marker = style
    every = max(1, len(points) // 12)
    places, values = zip(*points, strict=True)
    axes.plot(places, values, line, color=colour, marker=marker, markevery=every, ms=3.5, lw=1.3, label=stage)


def _finish(axes: Axes, progress: str, quantity: str) -> None:
    axes.set_xlabel(progress.replace("_", " ").capitalize())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", color="0.4", transform=axes.transAxes)
