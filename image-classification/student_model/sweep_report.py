"""The report of a sweep: a table and a plot with mean and standard deviation over seeds."""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.common.metrics.verdict import OVER_EXAMPLES, OVER_SEEDS, verdict_of_gains, verdict_over_seeds
from kd.common.reporting.plots import OTHER_STYLES, PAPER, STYLES, save_figure
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import gain_with_interval, markdown, mean_and_deviation, number, print_rich, words
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text
from kd.image_classification.student_model.sweep import DIVERGED, Student

KD = "kd"  # the method with which the others are compared
LONGEST_LABEL = 24
GROUP = ["label", "rate"]  # columns that identify a student
CONTROL_SENTENCES = {  # by the word of the verdict
    "better": "Better than the control",
    "no difference shown": "No difference shown to the control",
    "worse": "Worse than the control",
    "None": "Without a control",
}


def write_sweep_report(folder: Path, students: list[Student], seeds: list[int]) -> None:
    """Writes sweep.md and sweep.png into the sweep's folder and prints the table.

    A student that diverged with any seed is left out of the table: the mean over its other seeds would be biased.
    Raises UserError if all students diverged.
    """
    folders = {(student, seed): student.folder(folder / f"seed{seed}") for student in students for seed in seeds}
    diverged: dict[Student, list[str]] = {}
    for (student, seed), path in folders.items():
        if (path / DIVERGED).exists():
            epoch = read_json(path / DIVERGED)["epoch"]
            diverged.setdefault(student, []).append(f"seed {seed} in epoch {epoch}")
    named = "; ".join(f"{s.label} at {s.learning_rate:g} ({', '.join(when)})" for s, when in diverged.items())
    results = {key: read_json(path / RESULTS) for key, path in folders.items() if key[0] not in diverged}
    if not results:
        raise UserError(f"the loss of each student is not finite: {named}; lower the learning rate")
    first = next(iter(results.values()))
    split, teacher = first["primary_metric"]["split"], first["models"]["teacher"]
    rows = rows_of(results)
    (header, cells), notes = table(rows), compare_students(results, split)
    if diverged:
        notes.append(f"Diverged (the loss is not finite) and left out: {named}.")
    sections = [markdown(header, cells)]
    if "test" in teacher["metrics"]:
        intervals = f", with 95% intervals ({OVER_SEEDS})" if len(seeds) > 1 else ""
        sections += [f"On test{intervals}:", markdown(*table_on_test(results))]
    write_text(folder / "sweep.md", "\n\n".join([*sections, *notes]) + "\n")
    plot(folder / "sweep.png", rows, split, teacher["metrics"][split]["accuracy"])
    below = "\n".join([*notes, str(folder / "sweep.md"), str(folder / "sweep.png")])
    print_rich(header, cells, title="Mean ± standard deviation over seeds", below=below)


def rows_of(results: dict[tuple[Student, int], dict[str, Any]]) -> pd.DataFrame:
    """A row per student and seed."""
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
            "seconds": found["seconds"]["student"],
        }
        for (student, seed), found in results.items()
    ).astype({"gain over control": float})


def table(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A row per method, projector, loss and learning rate."""
    means = [name for name in rows if name.endswith(" accuracy")] + ["gain over control"]
    sizes = ["parameters", "auxiliary parameters"]
    cells = []
    for (label, rate), runs in rows.groupby(GROUP, sort=False):
        figures = [mean_and_deviation(runs[name].dropna().tolist()) for name in means] + [
            number(int(runs[name].iloc[0])) for name in sizes
        ]
        cells.append([label, f"{rate:g}", str(len(runs)), *figures, mean_and_deviation(runs["seconds"].tolist())])
    return ["student", "learning rate", "seeds", *means, *sizes, "seconds"], cells


def table_on_test(results: dict[tuple[Student, int], dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row per student: test accuracy, its gain over the control and over plain KD, agreement and calibration."""
    metrics = {key: found["models"]["student"]["metrics"]["test"] for key, found in results.items()}
    students = list(dict.fromkeys(student for student, _ in results))
    kd = [student for student in students if student.method.split(":")[0] == KD]
    cells = []
    for student in students:
        seeds = [seed for one, seed in results if one == student]
        same_rate = [one for one in kd if one.learning_rate == student.learning_rate and not student.is_control]
        others = [student.control, next(iter(same_rate), None)]
        runs = [metrics[student, seed] for seed in seeds]
        accuracy, *rest = [
            mean_and_deviation([run[name] for run in runs if name in run], len(runs))  # no ece of logits that are NaN
            for name in ("accuracy", "agreement", "ece")
        ]
        gains = [_gain(metrics, student, other, seeds) if other != student else None for other in others]
        cells.append([student.label, f"{student.learning_rate:g}", accuracy, *(gain or "–" for gain in gains), *rest])
    names = ["test accuracy", "gain over control", f"gain over {KD}", words("agreement"), words("ece")]
    return ["student", "learning rate", *names], cells


def _gain(
    metrics: dict[tuple[Student, int], dict[str, float]], student: Student, other: Student | None, seeds: list[int]
) -> str | None:
    """The mean gain in accuracy over another student and its interval; None if that one lacks a seed."""
    if other is None or any((other, seed) not in metrics for seed in seeds):
        return None
    gains = [metrics[student, seed]["accuracy"] - metrics[other, seed]["accuracy"] for seed in seeds]
    return gain_with_interval(verdict_of_gains(gains))


def compare_students(results: dict[tuple[Student, int], dict[str, Any]], split: str) -> list[str]:
    """Sentences with the verdict on each student: against its control and, over several seeds, against the best."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for (student, _), entry in results.items():
        if not student.is_control:
            runs.setdefault(f"{student.label} at {student.learning_rate:g}", []).append(entry)
    if not runs:
        return []
    seeds = len({seed for _, seed in results})
    sentences = [f"Verdicts on {split} accuracy, by 95% intervals: {OVER_SEEDS if seeds > 1 else OVER_EXAMPLES}."]
    names: dict[str, list[str]] = {}
    for name, of_student in runs.items():
        verdicts = [control for one in of_student if (control := (one.get("verdict") or {}).get("control"))]
        word = verdict_over_seeds(verdicts)["word"] if len(verdicts) == len(of_student) else None
        names.setdefault(str(word).removesuffix(" (one seed)"), []).append(name)
    for word, sentence in CONTROL_SENTENCES.items():
        if word in names:
            sentences.append(f"{sentence}: {', '.join(names[word])}.")
    if seeds < 2:
        return [*sentences, "The variation over seeds cannot be estimated from one seed."]
    return [*sentences, _compared_with_best(runs, split)]


def _compared_with_best(runs: dict[str, list[dict[str, Any]]], split: str) -> str:
    scores = {n: [r["models"]["student"]["metrics"][split]["accuracy"] for r in found] for n, found in runs.items()}
    best = max(scores, key=lambda name: fmean(scores[name]))

    def is_like_best(name: str) -> bool:
        gains = [one - other for one, other in zip(scores[best], scores[name], strict=True)]
        return verdict_of_gains(gains)["word"] != "better"

    like_best = [name for name in scores if name != best and is_like_best(name)]
    return f"No difference shown to the best, {best}: {', '.join(like_best) or 'none'}."


def plot(path: Path, rows: pd.DataFrame, split: str, teacher_accuracy: float) -> None:
    """Plots accuracy over the learning rate, or for one rate a row per student; bars are standard deviations."""
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
    """A line per student."""
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
    """A row per student, the best at the top. The deviation of a control is also a band."""
    spreads = spreads.sort_values("mean", kind="stable", ignore_index=True)
    for role, shown in (("student", spreads[~spreads["is_control"]]), ("control", spreads[spreads["is_control"]])):
        colour, _, marker = STYLES[role]
        label = None if shown.empty else role
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "label": label}
        axes.errorbar(shown["mean"], shown.index, xerr=shown["std"], ms=4, capsize=2, **style)
    for mean, deviation in zip(shown["mean"], shown["std"], strict=True):
        axes.axvspan(mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
    for row, (mean, deviation) in enumerate(zip(spreads["mean"], spreads["std"], strict=True)):
        place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(f"{mean:.3f}", (mean + deviation, row), **place)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(spreads)), _short_labels(spreads["label"]), fontsize=8)
    axes.set_ylim(-0.6, len(spreads) - 0.4)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel(f"{split.capitalize()} accuracy")


def _short_labels(labels: Iterable[str]) -> list[str]:
    """Labels without a method's arguments, where these are long and no two labels become the same."""
    full = list(labels)
    short = [f"{label.split(':')[0]}:..." if len(label) > LONGEST_LABEL and ":" in label else label for label in full]
    return [label if short.count(shortened) > 1 else shortened for label, shortened in zip(full, short, strict=True)]
