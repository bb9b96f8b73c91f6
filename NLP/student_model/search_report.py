"""The results of a search: search.json, search.md, search.png, a recipe of the best trial, a table."""

import copy
import shlex
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.visualization.matplotlib import plot_slice

from kd.common.cli import save_recipe
from kd.common.reporting.plots import STYLES, save_figure
from kd.common.reporting.tables import markdown, number, print_rich
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.files import write_json, write_text
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import SEARCHABLE, PairArguments, SearchArguments, TextArguments
from kd.nlp.student_model.evaluation import validation_split
from kd.nlp.student_model.search import SearchRun, Trial, best


def write_search_report(
    run: SearchRun,
    text: TextArguments,
    args: SearchArguments,
    texts: Texts,
    trials: list[Trial],
    control: Trial | None,
) -> None:
    """Writes best.yaml, search.png, search.md and, last, search.json, and prints the table."""
    data, found, folder = texts.data, best(trials), run.folder
    split = validation_split(data.splits)
    metric, title = f"{split} {data.primary_metric}", f"Search for {data.name}"
    best_command = write_best_recipe(folder / "best.yaml", text, args, run.args, found)
    headline = _headline(metric, found, len(trials), control, run.args, len(texts.validation))
    table = _table(metric, list(args.ranges), trials, control)
    plot(folder / "search.png", run.storage, metric, control)
    write_text(folder / "search.md", "\n\n".join([
        f"# {title}", headline, *(f"**Warning:** {warning}" for warning in run.warnings), markdown(*table),
        "![Trials](search.png)", "To distill with the best of them:", f"```\n{shlex.join(best_command)}\n```",
        "How it was searched:", f"```\n{shlex.join(command())}\n```",
    ]) + "\n")  # fmt: skip
    summary = {
        "task": data.name,
        "fingerprint": data.fingerprint,
        "samples": {name: len(rows) for name, rows in texts.splits.items()},
        "split": split,
        "metric": data.primary_metric,
        "seed": run.args.seed,
        "ranges": args.ranges,
        "best": asdict(found),
        "control": control and asdict(control),
        "trials": [asdict(trial) for trial in trials],
        "warnings": run.warnings,
        "command": command(),
        "environment": environment(run.args.precision, best_device()),
        "best_command": best_command,
    }
    write_json(folder / "search.json", summary)
    print_rich(*table, title=title, below=f"{headline}\n\n{shlex.join(best_command)}")


def _headline(
    metric: str, found: Trial, count: int, control: Trial | None, training: KDTrainingArguments, texts: int
) -> str:
    against = ""
    if control and control.value is not None:
        gain, rate = found.score - control.value, control.parameters.get("learning_rate", training.learning_rate)
        against = f", {gain:+.4f} against labels only at learning rate {rate:.3g} ({number(control.value)})"
    return (
        f"Best {metric} of {count} trials: {number(found.value)}{against}, on {texts:,} texts, seed {training.seed}. "
        "These texts chose it, which flatters it: judge it with other seeds, and once on test."
    )


def write_best_recipe(
    path: Path, text: TextArguments, args: SearchArguments, training: KDTrainingArguments, found: Trial
) -> list[str]:
    """Writes a recipe with which distill_classifier.py trains as the best trial did; returns the command."""
    training = copy.copy(training)
    for name, value in found.parameters.items():
        setattr(training, name, value)
    training.output_dir = str(path.with_suffix(""))
    training.overwrite_output_dir = training.resume_from_checkpoint = False
    training.no_control = not args.student  # cut from a trained teacher it would have had a teacher
    models: dict[str, Any] = {
        "teacher": args.teacher, "student": args.student, "student_layers": args.student_layers
    }  # fmt: skip
    save_recipe(path, text, PairArguments(align_epochs=0, **models), training)
    flags = {"dataset": text.dataset} | models | {name: getattr(training, name) for name in SEARCHABLE}
    words = ["python", "NLP/scripts/distill_classifier.py", str(path)]
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value is not None else []
    return words


def _table(
    metric: str, parameters: list[str], trials: list[Trial], control: Trial | None
) -> tuple[list[str], list[list[str]]]:
    """The trials, best first, then those cut short, then the one on labels alone."""
    ordered = sorted(trials, key=lambda trial: (trial.state == "complete", trial.score), reverse=True)
    named = [(str(trial.number), trial) for trial in ordered] + ([("labels only", control)] if control else [])
    rows = [
        [
            name,
            *(f"{trial.parameters[p]:.3g}" if p in trial.parameters else number(None) for p in parameters),
            number(trial.value),
            f"{trial.seconds:.1f}",
            trial.state,
        ]
        for name, trial in named
    ]
    return ["trial", *parameters, metric, "seconds", "state"], rows


def plot(path: Path, storage: optuna.storages.RDBStorage, metric: str, control: Trial | None) -> None:
    """The value of the complete trials against each searched parameter, and that of the one on labels alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes_found: Any = plot_slice(optuna.load_study(study_name="trials", storage=storage), target_name=metric)
    panels = np.atleast_1d(axes_found)
    figure = panels[0].figure
    if control and control.value is not None:
        colour, line, _ = STYLES["control"]
        for axes in panels:
            axes.axhline(control.value, color=colour, linestyle=line, label="labels only")
        panels[0].legend()
    save_figure(figure, path, dpi=200, bbox_inches="tight")
    plt.close(figure)
