"""Hyperparameter search with Optuna.

All trials train the same student from the same weights and with the same seed, on labels and on the teacher's cached
logits. They are evaluated on the validation split, and stored in a database in the run's folder.
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
    """Reports each evaluation to the trial, and stops training if Optuna's pruner prunes it."""

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
    """Runs trials until the study `name` has `count` finished ones, with parameters from `ranges`. Returns them all.

    Suggestions depend only on the seed and the finished trials, so a continued search gives the same trials. A trial
    whose process was killed is run again. Each trial trains a copy of the student.
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
    trainer.remove_callback(PrinterCallback)  # there is one progress bar, over trials
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
