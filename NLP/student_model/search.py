"""Hyperparameter search with Optuna.

All trials train the same student from the same weights and with the same seed, on labels and on the teacher's cached
logits. They are evaluated on the validation split, and stored in a database in the run's folder.
"""

import copy
import logging
import math
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from kd.common.cli import save_recipe
from kd.common.reporting.plots import PAPER, STYLES, save_figure
from kd.common.reporting.tables import markdown, number, print_rich, words
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import column_array
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.training.trainer_run import TrainerRun, count_epochs_in
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_json, write_text
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import PairArguments, TextArguments
from kd.nlp.student_model.evaluation import trainer_metrics, validation_split
from kd.nlp.student_model.methods import labels_and_logits
from kd.nlp.student_model.search_arguments import SEARCHABLE, Ranges, SearchArguments

LOGARITHMIC = {"learning_rate"}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

optuna.logging.set_verbosity(logging.WARNING)  # a line per trial would break the progress bar


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    number: Counted from 1.
    value: The primary metric on validation: after the last epoch of a complete trial, or at the last evaluation of a
        pruned or diverged one.
    state: complete; pruned (worse than the median of the other trials at the same step); or diverged (the loss became
        infinite or NaN).
    """

    number: int
    parameters: dict[str, float]
    value: float | None
    seconds: float
    state: str

    @property
    def score(self) -> float:
        """The value, or minus infinity if there is none."""
        return -math.inf if self.value is None else self.value


class SearchRun(TrainerRun):
    """The run of a search: its output files and its database."""

    last_file = "search.json"
    files = (*TrainerRun.files, "search.json", "search.md", "search.png", "best.yaml", "checkpoints/search.db*")

    @property
    def storage(self) -> optuna.storages.RDBStorage:
        """SQLite, because a journal file is damaged if the process is killed while it writes."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        return optuna.storages.RDBStorage(f"sqlite:///{folder.resolve() / 'search.db'}")


class Pruning(TrainerCallback):
    """Reports each evaluation to the trial, and stops training if Optuna prunes the trial."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric, self.pruned = trial, f"eval_{metric}", False
        self.value: float | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:  # type: ignore[override]
        self.value = metrics[self.metric]
        self.trial.report(self.value, state.global_step)
        self.pruned = control.should_training_stop = self.trial.should_prune()


def run_trials(
    run: SearchRun,
    name: str,
    ranges: Ranges,
    count: int,
    student: PreTrainedModel,
    texts: Texts,
    teacher_outputs: TeacherOutputs,
) -> list[Trial]:
    """Runs trials with parameters from `ranges` until the study `name` has `count` finished trials. Returns all.

    Suggestions depend only on the seed and the finished trials, so a continued search produces the same trials. An
    interrupted trial is run again. Each trial trains a copy of the student.
    """
    study = optuna.create_study(study_name=name, storage=run.storage, direction="maximize", load_if_exists=True)
    for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
    study.pruner = optuna.pruners.MedianPruner()
    metric = texts.data.primary_metric
    first = len(finished_trials(study))
    with tqdm(total=count, initial=first, desc=name) as bar:
        for trials in range(first, count):
            seed = np.random.SeedSequence((run.args.seed, trials)).generate_state(1).item()
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            study.optimize(
                lambda trial, index=trials + 1: train_trial(  # type: ignore[misc]
                    run, trial, ranges, f"{name}_{index}", student, texts, teacher_outputs
                ),
                n_trials=1,
            )
            bar.update()
            last = f"{metric} {number(finished_trials(study)[-1].value)}"
            bar.set_postfix_str(last)
            if bar.disable:  # not on a terminal
                print(f"{name}, {trials + 1} of {count}: {last}", flush=True)
    return [_summary(i, trial) for i, trial in enumerate(finished_trials(study), 1)]


def train_trial(
    run: SearchRun,
    trial: optuna.Trial,
    ranges: Ranges,
    name: str,
    student: PreTrainedModel,
    texts: Texts,
    teacher_outputs: TeacherOutputs,
) -> float:
    """Trains one trial and returns the primary metric on validation.

    Raises TrialPruned if the trial is pruned or diverges.
    """
    data, args = texts.data, copy.copy(run.args)
    for parameter, (low, high) in ranges.items():
        setattr(args, parameter, trial.suggest_float(parameter, low, high, log=parameter in LOGARITHMIC))
    args.output_dir, args.save_strategy, args.disable_tqdm = str(run.folder / "checkpoints"), "no", True
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard" / name)
    pruning = Pruning(trial, data.primary_metric)
    model = copy.deepcopy(student)
    train = texts.labelled_train if args.alpha == 1 else texts.train
    if len(train) < len(texts.train):
        count_epochs_in(args, len(texts.train))
    train_labels = torch.from_numpy(column_array(train, "labels"))
    trainer = KDTrainer(
        model=model,
        args=args,
        objective=labels_and_logits(data, args).for_labels(train_labels).objective,
        teacher_outputs=teacher_outputs,
        train_dataset=train,
        eval_dataset=texts.validation,
        data_collator=texts.collate,
        not_for_student=texts.unused_inputs(model),
        compute_metrics=trainer_metrics(data),
        callbacks=[pruning],
    )
    trainer.remove_callback(PrinterCallback)  # only the progress bar over trials is printed
    try:
        trainer.train()
    except UserError as error:  # the loss became infinite or NaN with these parameters
        trial.set_user_attr("diverged", str(error))
        raise optuna.TrialPruned(str(error)) from error
    if pruning.pruned:
        raise optuna.TrialPruned
    if pruning.value is not None:
        return pruning.value
    trainer.remove_callback(pruning)
    return trainer.evaluate()[pruning.metric]


def best(trials: list[Trial]) -> Trial:
    """The complete trial with the highest value, the first one in a tie. Raises UserError if every trial diverged."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        raise UserError("all trials diverged (the loss became infinite or NaN): lower --learning_rate_range")
    return max(complete, key=lambda trial: trial.score)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def _summary(number: int, trial: FrozenTrial) -> Trial:
    state = "diverged" if "diverged" in trial.user_attrs else trial.state.name.lower()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return Trial(number, dict(trial.params), trial.value, seconds, state)


# ---- report ----


def write_search_report(
    run: SearchRun,
    text: TextArguments,
    args: SearchArguments,
    texts: Texts,
    trials: list[Trial],
    control: Trial | None,
) -> None:
    """Writes best.yaml, search.png, search.md and finally search.json, and prints the table."""
    data, found, folder = texts.data, best(trials), run.folder
    split = validation_split(data.splits)
    metric, title = f"{split} {words(data.primary_metric)}", f"Search for {data.name}"
    best_command = write_best_recipe(folder / "best.yaml", text, args, run.args, found)
    headline = _headline(metric, found, len(trials), control, run.args, len(texts.validation))
    table = _table(metric, list(args.ranges), trials, control)
    plot(folder / "search.png", metric, list(args.ranges), trials, control)
    write_text(folder / "search.md", "\n\n".join([
        f"# {title}", headline, *(f"**Warning:** {warning}" for warning in run.warnings), markdown(*table),
        "![Trials](search.png)", "To distill with the best parameters:", f"```\n{shlex.join(best_command)}\n```",
        "Command of the search:", f"```\n{shlex.join(command())}\n```",
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
        against = f", {gain:+.4f} over labels only at learning rate {rate:.3g} ({number(control.value)})"
    return (
        f"Best {metric} of {count} trials: {number(found.value)}{against}, on {texts:,} texts, seed {training.seed}. "
        "This value is optimistic, because the trial was selected on these texts: train with its parameters and other "
        "seeds, and evaluate once on the test split."
    )


def write_best_recipe(
    path: Path, text: TextArguments, args: SearchArguments, training: KDTrainingArguments, found: Trial
) -> list[str]:
    """Writes a recipe of distill_classifier.py with the parameters of the best trial. Returns the command."""
    training = copy.copy(training)
    for name, value in found.parameters.items():
        setattr(training, name, value)
    training.output_dir = str(path.with_suffix(""))
    training.overwrite_output_dir = training.resume_from_checkpoint = False
    training.no_control = not args.student  # a cut of a trained teacher is not a control
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
    """Complete trials, best first, then pruned and diverged ones, then the control."""
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
    color, line, _ = STYLES["control"]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(0.6 + 2.8 * len(parameters), 2.9), dpi=200, layout="constrained")
        panels = figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0]
        for axes, parameter in zip(panels, parameters, strict=True):
            values = [trial.parameters[parameter] for trial in complete]
            axes.plot(values, [trial.value for trial in complete], "o", color="0.6", ms=4, label="trial")
            axes.plot(chosen.parameters[parameter], chosen.value, "^", color=STYLES["student"][0], label="best")
            if control and control.value is not None:
                axes.axhline(control.value, color=color, linestyle=line, linewidth=1.2, label="labels only")
            axes.set_xlabel(parameter.replace("_", " ").capitalize())
            if parameter in LOGARITHMIC:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.25, linewidth=0.6)
        panels[0].set_ylabel(metric[0].upper() + metric[1:])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        save_figure(figure, path)
