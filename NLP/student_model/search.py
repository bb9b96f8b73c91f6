"""Trials of distillation settings, suggested by Optuna.

Every trial trains the same student from the same weights, with the same seed, on labels and the teacher's cached
logits, and is measured on the validation split. Trials are kept in a database in the run's folder.
"""

import copy
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from kd.common.reporting.tables import number
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import Ranges
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.methods import labels_and_logits

LOGARITHMIC = {"learning_rate"}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

optuna.logging.set_verbosity(logging.WARNING)  # a line per trial would break the progress bar


@dataclass(frozen=True)
class Trial:
    """`value` is the primary metric on validation after the last epoch of a complete trial, at the last evaluation of
    one that was pruned (worse than the median of the others at that step) or diverged (the loss was not finite).
    """

    number: int  # from 1
    parameters: dict[str, float]
    value: float | None
    seconds: float
    state: str  # complete, pruned or diverged

    @property
    def score(self) -> float:
        """The value, for sorting."""
        return -math.inf if self.value is None else self.value


class SearchRun(TrainerRun):
    """A run whose outputs are those of a search."""

    last_file = "search.json"
    files = (*TrainerRun.files, "search.json", "search.md", "search.png", "best.yaml", "checkpoints/search.db*")

    @property
    def storage(self) -> optuna.storages.RDBStorage:
        """SQLite: a process that is killed while it writes leaves no broken line, as in a journal file."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        return optuna.storages.RDBStorage(f"sqlite:///{folder.resolve() / 'search.db'}")


class Pruning(TrainerCallback):
    """Reports each evaluation to a trial, and stops a training that Optuna's pruner finds hopeless."""

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
    """`count` finished trials of parameters from `ranges`: those of the study `name`, and the ones that it lacks.

    Suggestions follow from the seed and the finished trials alone, so interruptions change nothing; a trial that was
    running when its process was killed is run again. The student is copied for each trial.
    """
    study = optuna.create_study(study_name=name, storage=run.storage, direction="maximize", load_if_exists=True)
    for killed in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(killed.number, state=TrialState.FAIL)
    study.pruner = optuna.pruners.MedianPruner()
    metric = texts.data.primary_metric
    with tqdm(total=count, initial=len(finished_trials(study)), desc=name) as bar:
        while bar.n < count:
            seed = np.random.SeedSequence((run.args.seed, int(bar.n))).generate_state(1).item()
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            study.optimize(
                lambda trial: train_trial(run, trial, ranges, f"{name}_{bar.n + 1}", student, texts, teacher_outputs),
                n_trials=1,
            )
            bar.update()
            bar.set_postfix_str(f"last {metric} {number(finished_trials(study)[-1].value)}")
    return [_plain(i, trial) for i, trial in enumerate(finished_trials(study), 1)]


def train_trial(
    run: SearchRun,
    trial: optuna.Trial,
    ranges: Ranges,
    name: str,
    student: PreTrainedModel,
    texts: Texts,
    teacher_outputs: TeacherOutputs,
) -> float:
    """Trains one trial; returns the primary metric on validation. Raises TrialPruned where the trial was stopped, or
    the loss is not finite.
    """
    data, args = texts.data, copy.copy(run.args)
    for parameter, (low, high) in ranges.items():
        setattr(args, parameter, trial.suggest_float(parameter, low, high, log=parameter in LOGARITHMIC))
    args.output_dir, args.save_strategy, args.disable_tqdm = str(run.folder / "checkpoints"), "no", True
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard" / name)
    pruning = Pruning(trial, data.primary_metric)
    model = copy.deepcopy(student)
    trainer = KDTrainer(
        model=model,
        args=args,
        objective=labels_and_logits(data, args).objective,
        teacher_outputs=teacher_outputs,
        train_dataset=texts.train,
        eval_dataset=texts.validation,
        data_collator=texts.collate,
        not_for_student=texts.unused_inputs(model),
        compute_metrics=trainer_metrics(data),
        callbacks=[pruning],
    )
    trainer.remove_callback(PrinterCallback)  # there is one bar, over trials
    try:
        trainer.train()
    except UserError as error:  # a loss that is not finite is a fault of these parameters, not of others
        trial.set_user_attr("diverged", str(error))
        raise optuna.TrialPruned(str(error)) from error
    if pruning.pruned:
        raise optuna.TrialPruned
    if pruning.value is not None:
        return pruning.value
    trainer.remove_callback(pruning)
    return trainer.evaluate()[pruning.metric]


def best(trials: list[Trial]) -> Trial:
    """The complete trial of the highest value, the first of equals. Raises UserError where every trial diverged."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        raise UserError("no trial came to its end: every loss became infinite or NaN; search lower learning rates")
    return max(complete, key=lambda trial: trial.score)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def _plain(place: int, trial: FrozenTrial) -> Trial:
    state = "diverged" if "diverged" in trial.user_attrs else trial.state.name.lower()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return Trial(place, dict(trial.params), trial.value, seconds, state)
