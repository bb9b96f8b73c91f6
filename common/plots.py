"""curves.png: how teacher, control and student trained, in Okabe and Ito's colours (safe for the colour-blind)."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.utils.files import write_bytes

STYLES = {  # colour, line, marker: each alone tells the stages apart
    "teacher": ("#0072B2", "-", "o"),
    "control": ("#D55E00", "--", "s"),
    "student": ("#009E73", "-", "^"),
}
OTHER_STYLES = [("#CC79A7", "-.", "D"), ("#E69F00", ":", "v"), ("#56B4E9", "--", "P"), ("#000000", "-", "X")]


def plot_curves(
    path: str | Path, history: dict[str, list[dict[str, Any]]], results: dict[str, Any], progress: str = "epoch"
) -> None:
    """Training loss (left) and primary metric on evaluation data (right) over `progress`, one line per stage.

    `history` maps a stage to its log dictionaries, as in the `state.log_history` of transformers.Trainer: `progress`
    (such as "epoch") with "loss" or with "eval_" + the primary metric. A model without evaluations during training,
    such as a teacher that was downloaded, shows its final metric as a level line.
    """
    primary = results["primary_metric"]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
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
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
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
