"""What came of a sweep: one table and one plot, mean and standard deviation over the seeds."""

import io
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.common.reporting.plots import OTHER_STYLES, PAPER, STYLES
from kd.common.reporting.tables import markdown, number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_bytes, write_text
from kd.image_classification.student_model.cells import CONTROLS, Cell, lost_file, results_file


class Spread(NamedTuple):
    mean: float
    std: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None) if values else None


Found = dict[Cell, dict[str, Any]]  # cell -> its results.json


def show(folder: Path, cells: list[Cell]) -> None:
    """Writes sweep.md and sweep.png into the sweep's folder and prints the table. A kind of student of which a seed is
    lost has no row, which would be of the seeds that went well. Raises UserError where that leaves none.
    """
    lost = _lost(folder, cells)
    told = "; ".join(f"{label} at {rate:g} ({', '.join(when)})" for (label, rate), when in lost.items())
    found = {cell: read_json(results_file(folder, cell)) for cell in cells if _kind(cell) not in lost}
    if not found:
        raise UserError(f"the loss of each student is not finite: {told}; try a lower learning rate")
    (header, rows), verdicts = table(found), noise(found)
    if lost:
        verdicts.append(f"Lost, with a loss that is not finite, and left out: {told}.")
    write_text(folder / "sweep.md", "\n\n".join([markdown(header, rows), *verdicts]) + "\n")
    write_bytes(folder / "sweep.png", plot(found))
    below = "\n".join([*verdicts, str(folder / "sweep.md"), str(folder / "sweep.png")])
    print_rich(header, rows, title="mean ± standard deviation over seeds", below=below)


def _lost(folder: Path, cells: list[Cell]) -> dict[tuple[str, float], list[str]]:
    """The kinds of students of which some are lost, and when in the training of which seeds that was."""
    lost: dict[tuple[str, float], list[str]] = {}
    for cell in cells:
        if lost_file(folder, cell).exists():
            epoch = read_json(lost_file(folder, cell))["epoch"]
            lost.setdefault(_kind(cell), []).append(f"seed {cell.seed} in epoch {epoch}")
    return lost


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    """One row per method, projector, loss and learning rate."""
    first = next(iter(found.values()))
    splits = list(first["models"]["student"]["metrics"])
    header = ["student", "learning rate", "seeds", *(f"{split} accuracy" for split in splits), "gain over control"]
    header += ["parameters", "trained beside", "seconds of its group"]
    rows = []
    for label, rate in dict.fromkeys(map(_kind, found)):
        runs = _runs(found, label, rate)
        cells = [label, f"{rate:g}", str(len(runs)), *(_shown(_accuracy(runs, split)) for split in splits)]
        cells.append(_shown(Spread.of([r["gain_over_control"] for r in runs if r["gain_over_control"] is not None])))
        cells.append(number(runs[0]["models"]["student"]["parameters"]))
        beside = runs[0].get("parameters_trained_beside")  # which older runs do not know
        cells.append("–" if beside is None else number(beside))
        cells.append(_shown(Spread.of([run["seconds"]["student"] for run in runs])))
        rows.append(cells)
    return header, rows


def noise(found: Found) -> list[str]:
    """Sentences that say which students are no better than their control, and which no worse than the best, by two
    standard deviations of the difference, which is taken seed by seed.
    """
    split = next(iter(found.values()))["primary_metric"]["split"]
    students: dict[str, dict[int, dict[str, Any]]] = {}  # name -> seed -> results
    for cell, results in found.items():
        if cell.method not in CONTROLS:
            students.setdefault(f"{cell.label} at {cell.learning_rate:g}", {})[cell.seed] = results
    if not students:
        return []
    if min(map(len, students.values())) < 2:
        return ["One seed tells nothing about noise."]
    scores = {
        name: {seed: results["models"]["student"]["metrics"][split]["accuracy"] for seed, results in runs.items()}
        for name, runs in students.items()
    }
    best = max(scores, key=lambda name: fmean(scores[name].values()))
    alone, like_control, like_best = [], [], []
    for name, runs in students.items():
        gains = [results["gain_over_control"] for results in runs.values()]
        if None in gains:
            alone.append(name)
        elif not _stands_out(gains):
            like_control.append(name)
        if name != best and not _stands_out([scores[best][seed] - score for seed, score in scores[name].items()]):
            like_best.append(name)
    rule = f"by two standard deviations of the difference in {split} accuracy, seed by seed"
    sentences = [f"Not behind the best, {best}, {rule}: {', '.join(like_best) or 'none'}."]
    if len(alone) < len(students):
        sentences.insert(0, f"Not ahead of their control {rule}: {', '.join(like_control) or 'none'}.")
    return sentences + ([f"Without a control: {', '.join(alone)}."] if alone else [])


def _stands_out(differences: list[float]) -> bool:
    return fmean(differences) > 2 * stdev(differences)


def plot(found: Found) -> bytes:
    """Accuracy over the learning rate, or where there is only one, of each kind of student; PNG. Bars are standard
    deviations.
    """
    first = next(iter(found.values()))
    split, teacher = first["primary_metric"]["split"], first["models"]["teacher"]
    level = teacher and teacher["metrics"][split]["accuracy"]
    labels = list(dict.fromkeys(cell.label for cell in found))
    one_rate = len({cell.learning_rate for cell in found}) == 1
    with matplotlib.rc_context(PAPER):
        size = (5.6, 1.2 + 0.22 * len(labels)) if one_rate else (5.6, 3.4)
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        axes = figure.subplots()
        (_draw_students if one_rate else _draw_rates)(axes, found, labels, split)
        if level is not None:
            line = axes.axvline if one_rate else axes.axhline
            line(level, color="#555555", linestyle=":", linewidth=1.2, label="teacher")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_rates(axes: Axes, found: Found, labels: list[str], split: str) -> None:
    """One line per kind of student."""
    for label, (colour, line, marker) in zip(labels, cycle([*STYLES.values(), *OTHER_STYLES]), strict=False):
        rates = sorted({cell.learning_rate for cell in found if cell.label == label})
        spreads = [_accuracy(_runs(found, label, rate), split) for rate in rates]
        means, deviations = [spread.mean for spread in spreads], [spread.std or 0.0 for spread in spreads]
        style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "label": label}
        axes.errorbar(rates, means, deviations, ms=4, capsize=2, **style)
    everywhere = sorted({cell.learning_rate for cell in found})
    axes.set_xscale("log")
    axes.set_xticks(everywhere, [f"{rate:g}" for rate in everywhere])
    axes.minorticks_off()
    axes.set_xlabel("Learning rate")
    axes.set_ylabel(f"{split.capitalize()} accuracy")


def _draw_students(axes: Axes, found: Found, labels: list[str], split: str) -> None:
    """One row per kind of student, the best at the top; controls are squares, with their deviation as a band."""
    (rate,) = {cell.learning_rate for cell in found}
    spreads = {label: _accuracy(_runs(found, label, rate), split) for label in labels}
    ordered = sorted(labels, key=lambda label: spreads[label].mean)
    for role, of_role in (("student", set(labels) - set(CONTROLS)), ("control", set(labels) & set(CONTROLS))):
        rows = [row for row, label in enumerate(ordered) if label in of_role]
        shown = [spreads[ordered[row]] for row in rows]
        colour, _, marker = STYLES[role]
        label = role if rows else None
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "label": label}
        axes.errorbar([s.mean for s in shown], rows, xerr=[s.std or 0.0 for s in shown], ms=4, capsize=2, **style)
    for label in of_role:
        mean, deviation = spreads[label].mean, spreads[label].std or 0.0
        axes.axvspan(mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(ordered)), ordered, fontsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel(f"{split.capitalize()} accuracy")


def _kind(cell: Cell) -> tuple[str, float]:
    return cell.label, cell.learning_rate


def _runs(found: Found, label: str, rate: float) -> list[dict[str, Any]]:
    """The results of one kind of student at one learning rate, over the seeds."""
    return [results for cell, results in found.items() if _kind(cell) == (label, rate)]


def _accuracy(runs: list[dict[str, Any]], split: str) -> Spread:
    spread = Spread.of([run["models"]["student"]["metrics"][split]["accuracy"] for run in runs])
    assert spread is not None, "a sweep shows finished runs"
    return spread


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return number(spread.mean) + (f" ± {number(spread.std)}" if spread.std is not None else "")
