"""What came of a sweep: one table and one plot, mean and standard deviation over the seeds."""

import io
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from common.plots import OTHER_STYLES, STYLES
from common.report import Spread
from common.tables import markdown, number, print_rich
from common.utils.files import read_json, write_bytes, write_text
from image_classification.student_model.cells import Cell, results_file

Found = dict[Cell, dict[str, Any]]  # cell -> its results.json


def show(folder: Path, cells: list[Cell]) -> None:
    """Writes sweep.md and sweep.png into the sweep's folder and prints the table."""
    found = {cell: read_json(results_file(folder, cell)) for cell in cells}
    header, rows = table(found)
    write_text(folder / "sweep.md", markdown(header, rows) + "\n")
    write_bytes(folder / "sweep.png", plot(found))
    below = f"{folder / 'sweep.md'}\n{folder / 'sweep.png'}"
    print_rich(header, rows, title="mean ± standard deviation over seeds", below=below)


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    """One row per method, projector, loss and learning rate."""
    first = next(iter(found.values()))
    splits = list(first["models"]["student"]["metrics"])
    header = ["student", "learning rate", "seeds", *(f"{split} accuracy" for split in splits), "gain over control"]
    header += ["parameters", "trained beside", "seconds of its group"]
    rows = []
    for label, rate in dict.fromkeys((cell.label, cell.learning_rate) for cell in found):
        runs = _runs(found, label, rate)
        cells = [label, f"{rate:g}", str(len(runs)), *(_shown(_accuracy(runs, split)) for split in splits)]
        cells.append(_shown(Spread.of([r["gain_over_control"] for r in runs if r["gain_over_control"] is not None])))
        cells.append(number(runs[0]["models"]["student"]["parameters"]))
        cells.append(number(runs[0]["parameters_trained_beside"]))
        cells.append(_shown(Spread.of([run["seconds"]["student"] for run in runs])))
        rows.append(cells)
    return header, rows


def plot(found: Found) -> bytes:
    """Accuracy over the learning rate, one line per kind of student, bars of one standard deviation; PNG."""
    first = next(iter(found.values()))
    split, teacher = first["primary_metric"]["split"], first["models"]["teacher"]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6, 3.4), dpi=200, layout="constrained")
        axes = figure.subplots()
        labels = list(dict.fromkeys(cell.label for cell in found))
        for label, (colour, line, marker) in zip(labels, cycle([*STYLES.values(), *OTHER_STYLES]), strict=False):
            rates = sorted({cell.learning_rate for cell in found if cell.label == label})
            spreads = [_accuracy(_runs(found, label, rate), split) for rate in rates]
            means, deviations = [spread.mean for spread in spreads], [spread.std or 0.0 for spread in spreads]
            axes.errorbar(
                rates, means, deviations, color=colour, linestyle=line, marker=marker, ms=4, capsize=2, label=label
            )
        if teacher:
            level = teacher["metrics"][split]["accuracy"]
            axes.axhline(level, color="#555555", linestyle=":", linewidth=1.2, label="teacher")
        everywhere = sorted({cell.learning_rate for cell in found})
        axes.set_xscale("log")
        axes.set_xticks(everywhere, [f"{rate:g}" for rate in everywhere])
        axes.minorticks_off()
        axes.set_xlabel("Learning rate")
        axes.set_ylabel(f"{split.capitalize()} accuracy")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _runs(found: Found, label: str, rate: float) -> list[dict[str, Any]]:
    """The results of one kind of student at one learning rate, over the seeds."""
    return [results for cell, results in found.items() if (cell.label, cell.learning_rate) == (label, rate)]


def _accuracy(runs: list[dict[str, Any]], split: str) -> Spread:
    spread = Spread.of([run["models"]["student"]["metrics"][split]["accuracy"] for run in runs])
    assert spread is not None, "a sweep shows finished runs"
    return spread


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return number(spread.mean) + (f" ± {number(spread.std)}" if spread.std is not None else "")
