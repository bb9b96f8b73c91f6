"""The report of a search: search.json, search.md, search.png, a table, and a recipe of the best trial."""

import copy
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kd.common.cli import save_recipe
from kd.common.reporting.plots import PAPER, STYLES, save_figure
from kd.common.reporting.tables import markdown, number, print_rich, words
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.files import write_json, write_text
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import SEARCHABLE, PairArguments, SearchArguments, TextArguments
from kd.nlp.student_model.evaluation import validation_split
from kd.nlp.student_model.search import LOGARITHMIC, SearchRun, Trial, best


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
    metric, title = f"{split} {words(data.primary_metric)}", f"Search for {data.name}"
    best_command = write_best_recipe(folder / "best.yaml", text, args, run.args, found)
    headline = _headline(metric, found, len(trials), control, run.args, len(texts.validation))
    table = _table(metric, list(args.ranges), trials, control)
    plot(folder / "search.png", metric, list(args.ranges), trials, control)
    write_text(folder / "search.md", "\n\n".join([
        f"# {title}", headline, *(f"**Warning:** {warning}" for warning in run.warnings), markdown(*table),
        "![Trials](search.png)", "Distill with the best trial:", f"```\n{shlex.join(best_command)}\n```",
        "How to reproduce the search:", f"```\n{shlex.join(command())}\n```",
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
        against = f", {gain:+.4f} compared with labels only at learning rate {rate:.3g} ({number(control.value)})"
    return (
        f"Best {metric} of {count} trials: {number(found.value)}{against}, on {texts:,} texts, seed {training.seed}. "
        "It was chosen on these texts, so this is optimistic: evaluate it with other seeds, and once on test."
    )


def write_best_recipe(
    path: Path, text: TextArguments, args: SearchArguments, training: KDTrainingArguments, found: Trial
) -> list[str]:
    """Writes a recipe with which distill_classifier.py repeats the best trial, and returns the command."""
    training = copy.copy(training)
    for name, value in found.parameters.items():
        setattr(training, name, value)
    training.output_dir = str(path.with_suffix(""))
    training.overwrite_output_dir = training.resume_from_checkpoint = False
    training.no_control = not args.student  # a control cut from a trained teacher is no control
    models: dict[str, Any] = {
        "teacher": args.teacher, "student": args.student, "student_layers": args.student_layers
    }  # fmt: skip
    save_recipe(path, text, PairArguments(align_epochs=0, **models), training)
    flags = {"dataset": text.dataset} | models | {name: getattr(training, name) for name in SEARCHABLE}
    command_line = ["python", "NLP/scripts/distill_classifier.py", str(path)]
    for name, value in flags.items():
        command_line += [f"--{name}", str(value)] if value is not None else []
    return command_line


def _table(
    metric: str, parameters: list[str], trials: list[Trial], control: Trial | None
) -> tuple[list[str], list[list[str]]]:
    """The complete trials, best first, then pruned and diverged ones, then the one on labels alone."""
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
    return ["trial", *map(words, parameters), metric, "seconds", "state"], rows


def plot(path: Path, metric: str, parameters: list[str], trials: list[Trial], control: Trial | None) -> None:
    """The value of each complete trial against each searched parameter, and the value of the trial on labels alone."""
    complete = [trial for trial in trials if trial.state == "complete"]
    chosen = best(trials)
    colour, line, _ = STYLES["control"]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(0.6 + 2.8 * len(parameters), 2.9), dpi=200, layout="constrained")
        panels = figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0]
        for axes, parameter in zip(panels, parameters, strict=True):
            values = [trial.parameters[parameter] for trial in complete]
            axes.plot(values, [trial.value for trial in complete], "o", color="0.6", ms=4, label="trial")
            axes.plot(chosen.parameters[parameter], chosen.value, "^", color=STYLES["student"][0], label="best")
            if control and control.value is not None:
                axes.axhline(control.value, color=colour, linestyle=line, linewidth=1.2, label="labels only")
            axes.set(
                xlabel=parameter.replace("_", " ").capitalize(), xscale="log" if parameter in LOGARITHMIC else "linear"
            )
            axes.grid(alpha=0.25, linewidth=0.6)
        panels[0].set_ylabel(metric[0].upper() + metric[1:])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        save_figure(figure, path)
