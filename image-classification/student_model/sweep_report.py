"""The report of a sweep: one table and one plot, mean and standard deviation over the seeds."""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.common.reporting.plots import OTHER_STYLES, PAPER, STYLES, save_figure
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import markdown, number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text
from kd.image_classification.student_model.sweep import DIVERGED, Student

GROUP = ["label", "rate"]  # columns that the seeds of one student share


def show(folder: Path, students: list[Student], seeds: list[int]) -> None:
    """Writes sweep.md and sweep.png into the sweep's folder and prints the table.

    A student that diverged with one seed has no row, which would be of the seeds that went well. Raises UserError
    where that leaves none.
    """
    diverged: dict[Student, list[str]] = {}
    for student in students:
        files = {seed: student.folder(folder / f"seed{seed}") / DIVERGED for seed in seeds}
        when = [f"seed {seed} in epoch {read_json(file)['epoch']}" for seed, file in files.items() if file.exists()]
        if when:
            diverged[student] = when
    named = "; ".join(f"{s.label} at {s.learning_rate:g} ({', '.join(when)})" for s, when in diverged.items())
    results = {
        (student, seed): read_json(student.folder(folder / f"seed{seed}") / RESULTS)
        for student in students
        if student not in diverged
        for seed in seeds
    }
    if not results:
        raise UserError(f"the loss of each student is not finite: {named}; try a lower learning rate")
    first = next(iter(results.values()))
    split, teacher = first["primary_metric"]["split"], first["models"]["teacher"]
    rows = rows_of(results)
    (header, cells), verdicts = table(rows), noise(rows, split)
    if diverged:
        verdicts.append(f"Diverged, with a loss that is not finite, and left out: {named}.")
    write_text(folder / "sweep.md", "\n\n".join([markdown(header, cells), *verdicts]) + "\n")
    plot(folder / "sweep.png", rows, split, teacher["metrics"][split]["accuracy"])
    below = "\n".join([*verdicts, str(folder / "sweep.md"), str(folder / "sweep.png")])
    print_rich(header, cells, title="mean ± standard deviation over seeds", below=below)


def rows_of(results: dict[tuple[Student, int], dict[str, Any]]) -> pd.DataFrame:
    """One row per student and seed."""
    return pd.DataFrame(
        {
            "label": student.label,
            "rate": student.learning_rate,
            "seed": seed,
            "is_control": student.is_control,
            **{f"{split} accuracy": m["accuracy"] for split, m in found["models"]["student"]["metrics"].items()},
            "gain over control": found["gain_over_control"],
            "parameters": found["models"]["student"]["parameters"],
            "auxiliary parameters": found["auxiliary_parameters"],
            "seconds of its group": found["seconds"]["student"],
        }
        for (student, seed), found in results.items()
    ).astype({"gain over control": float})


def table(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """One row per method, projector, loss and learning rate."""
    means = [name for name in rows if name.endswith(" accuracy")] + ["gain over control"]
    sizes = ["parameters", "auxiliary parameters"]
    cells = []
    for (label, rate), runs in rows.groupby(GROUP, sort=False):
        figures = [_spread(runs[name]) for name in means] + [number(int(runs[name].iloc[0])) for name in sizes]
        cells.append([label, f"{rate:g}", str(len(runs)), *figures, _spread(runs["seconds of its group"])])
    return ["student", "learning rate", "seeds", *means, *sizes, "seconds of its group"], cells


def noise(rows: pd.DataFrame, split: str) -> list[str]:
    """Sentences that name the students that are no better than their control, and those no worse than the best.

    Both by two standard deviations of the difference, which is taken seed by seed.
    """
    rows = rows[~rows["is_control"]]
    rows = rows.assign(name=[f"{label} at {rate:g}" for label, rate in zip(rows["label"], rows["rate"], strict=True)])
    if rows.empty:
        return []
    if rows["seed"].nunique() < 2:
        return ["One seed does not show noise."]
    scores = rows.pivot(index="seed", columns="name", values=f"{split} accuracy")
    gains = rows.pivot(index="seed", columns="name", values="gain over control")
    names = list(rows["name"].unique())
    best = scores[names].mean().idxmax()
    alone = [name for name in names if gains[name].isna().any()]
    like_control = [name for name in names if name not in alone and not _stands_out(gains[name])]
    like_best = [name for name in names if name != best and not _stands_out(scores[best] - scores[name])]
    rule = f"by two standard deviations of the difference in {split} accuracy, seed by seed"
    sentences = [f"Not behind the best, {best}, {rule}: {', '.join(like_best) or 'none'}."]
    if len(alone) < len(names):
        sentences.insert(0, f"Not ahead of their control {rule}: {', '.join(like_control) or 'none'}.")
    return sentences + ([f"Without a control: {', '.join(alone)}."] if alone else [])


def _stands_out(differences: pd.Series) -> bool:
    return bool(differences.mean() > 2 * differences.std())


def plot(path: Path, rows: pd.DataFrame, split: str, teacher_accuracy: float) -> None:
    """Accuracy over the learning rate, or of each student at the only one; bars are standard deviations."""
    labels, one_rate = rows["label"].unique(), rows["rate"].nunique() == 1
    spreads = rows.groupby([*GROUP, "is_control"], sort=False)[f"{split} accuracy"].agg(["mean", "std"]).fillna(0.0)
    with matplotlib.rc_context(PAPER):
        size = (5.6, 1.2 + 0.22 * len(labels)) if one_rate else (5.6, 3.4)
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        axes = figure.subplots()
        (_draw_students if one_rate else _draw_rates)(axes, spreads.reset_index(), split)
        line = axes.axvline if one_rate else axes.axhline
        line(teacher_accuracy, color="#555555", linestyle=":", linewidth=1.2, label="teacher")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        save_figure(figure, path)


def _draw_rates(axes: Axes, spreads: pd.DataFrame, split: str) -> None:
    """One line per kind of student."""
    styles = cycle([*STYLES.values(), *OTHER_STYLES])
    for (label, line), (colour, dashes, marker) in zip(spreads.groupby("label", sort=False), styles, strict=False):
        line = line.sort_values("rate")
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": marker, "label": label}
        axes.errorbar(line["rate"], line["mean"], line["std"], ms=4, capsize=2, **style)
    rates = sorted(spreads["rate"].unique())
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("Learning rate")
    axes.set_ylabel(f"{split.capitalize()} accuracy")


def _draw_students(axes: Axes, spreads: pd.DataFrame, split: str) -> None:
    """One row per student, the best at the top; controls are squares, with their deviation as a band."""
    spreads = spreads.sort_values("mean", kind="stable", ignore_index=True)
    for role, shown in (("student", spreads[~spreads["is_control"]]), ("control", spreads[spreads["is_control"]])):
        colour, _, marker = STYLES[role]
        label = None if shown.empty else role
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "label": label}
        axes.errorbar(shown["mean"], shown.index, xerr=shown["std"], ms=4, capsize=2, **style)
    for mean, deviation in zip(shown["mean"], shown["std"], strict=True):
        axes.axvspan(mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(spreads)), spreads["label"], fontsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel(f"{split.capitalize()} accuracy")


def _spread(values: pd.Series) -> str:
    """mean ± standard deviation of the values that there are."""
    values = values.dropna()
    if values.empty:
        return "–"
    deviation = f" ± {number(float(values.std()))}" if len(values) > 1 else ""
    return number(float(values.mean())) + deviation
