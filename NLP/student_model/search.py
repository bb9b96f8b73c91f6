"""Trials of distillation settings: what transformers' own hyper-parameter search needs to train with a teacher.

Every trial trains the same student from the same weights, with the same seed, on labels and the teacher's cached
logits, and is measured on the validation split. Trials lie in a database in the run's folder as they come.
"""

import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback

from kd.common.objective import Objective, labels_and_soft_targets
from kd.common.reporting.tables import number
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import Ranges
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.pipeline import switch_off_dropout

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


class TrialTrainer(KDTrainer):
    """Trains for the objective that follows from the arguments once a trial has set them.

    The backend of the search keeps a trial's value in `objective`, where KDTrainer has what it minimises. So the name
    is KDTrainer's during training, and the backend's before and after.
    """

    def __init__(
        self, args: KDTrainingArguments, objective_of: Callable[[KDTrainingArguments], Objective], **trainer: Any
    ) -> None:
        super().__init__(args=args, objective=objective_of(args), **trainer)
        self.objective_of, self.value = objective_of, None

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.objective = self.objective_in_step = self.objective_of(self.args)

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        minimised = self.objective
        super()._report_to_hp_search(trial, step, metrics)
        self.value, self.objective = self.objective, minimised  # type: ignore[assignment]

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Trains one trial. Raises TrialPruned where it is hopeless or its loss is not finite."""
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except UserError as error:  # a loss that is not finite says something about these parameters, not about others
            trial.set_user_attr("diverged", str(error))
            raise optuna.TrialPruned(str(error)) from error
        self.objective = self.value  # type: ignore[assignment]
        return output


class Search:
    """Trials of one student. Its weights and those of what it is taught stay as they are.

    `said` is what the teacher said about the training texts. The student loses its dropout and trains all but its
    embeddings, as distill_classifier.py has it.
    """

    def __init__(self, run: SearchRun, student: PreTrainedModel, texts: Texts, said: TeacherOutputs) -> None:
        self.run, self.student, self.texts, self.said = run, student, texts, said
        switch_off_dropout(student)
        student.requires_grad_(True)
        student.get_input_embeddings().requires_grad_(False)
        folder = run.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        # SQLite, because a process that is killed while it writes leaves no broken line, as in a journal file.
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{folder.resolve() / 'search.db'}")

    def trials(self, name: str, ranges: Ranges, count: int) -> list[Trial]:
        """`count` finished trials of parameters from `ranges`: those of the study `name`, and the ones it lacks.

        What is tried next follows from the seed and the finished trials alone, so interruptions change nothing; a
        trial that was running when its process was killed is run anew.
        """
        study = optuna.create_study(study_name=name, storage=self.storage, direction="maximize", load_if_exists=True)
        for killed in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(killed.number, state=TrialState.FAIL)
        with tqdm(total=count, initial=len(_finished(study)), desc=name) as bar:
            while bar.n < count:
                self._add_trial(study, ranges)
                bar.update()
                bar.set_postfix_str(f"last {self.texts.data.primary_metric} {number(_finished(study)[-1].value)}")
        return [_plain(i, trial) for i, trial in enumerate(_finished(study), 1)]

    def _add_trial(self, study: optuna.Study, ranges: Ranges) -> None:
        before = len(_finished(study))
        seed = np.random.SeedSequence((self.run.args.seed, before)).generate_state(1).item()
        try:
            self._trainer(f"{study.study_name}_{before + 1}").hyperparameter_search(
                lambda trial: suggest(trial, ranges),
                lambda metrics: metrics[f"eval_{self.texts.data.primary_metric}"],
                n_trials=1,
                direction="maximize",
                backend="optuna",
                study_name=study.study_name,
                storage=self.storage,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=optuna.pruners.MedianPruner(),
            )
        except ValueError:
            if len(_finished(study)) == before:
                raise
            # Else the trial was finished and the backend then asked for the best, while none is complete.

    def _trainer(self, name: str) -> TrialTrainer:
        """A trainer per trial, so that no trial finds anything of the one before."""
        data, args = self.texts.data, copy.copy(self.run.args)
        args.output_dir, args.save_strategy, args.disable_tqdm = str(self.run.folder / "checkpoints"), "no", True
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.run.folder / "tensorboard" / name)
        trainer = TrialTrainer(
            args,
            lambda tried: labels_and_soft_targets(
                tried.alpha, tried.temperature, data.regression, tried.label_smoothing_factor
            ),
            model_init=lambda: copy.deepcopy(self.student),
            teacher_outputs=self.said,
            train_dataset=self.texts.train,
            eval_dataset=self.texts.validation,
            data_collator=self.texts.collate,
            not_for_student=self.texts.unused_by(self.student),
            compute_metrics=trainer_metrics(data),
        )
        trainer.remove_callback(PrinterCallback)  # there is one bar, over trials
        return trainer


def suggest(trial: optuna.Trial, ranges: Ranges) -> dict[str, float]:
    return {
        name: trial.suggest_float(name, low, high, log=name in LOGARITHMIC) for name, (low, high) in ranges.items()
    }


def best(trials: list[Trial]) -> Trial:
    """The complete trial of the highest value, the first of equals. Raises UserError where every trial diverged."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        raise UserError("no trial came to its end: every loss became infinite or NaN; search lower learning rates")
    return max(complete, key=lambda trial: trial.score)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def _plain(place: int, trial: FrozenTrial) -> Trial:
    state = "diverged" if "diverged" in trial.user_attrs else trial.state.name.lower()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return Trial(place, dict(trial.params), trial.value, seconds, state)
