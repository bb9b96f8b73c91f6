"""Base of the distillation of language models and translators: models, stages and results."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.methods import Method
from kd.common.metrics.quality import language_warning, token_counts
from kd.common.pretrained import load_tokenizer, stage_loader
from kd.common.token_terms import TokenWeights, label_term, per_token
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.student_model.arguments import CUT
from kd.nlp.student_model.on_policy import OnPolicyObjective, StudentSamples, check_on_policy
from kd.nlp.student_model.teacher_logits import LogitStore, with_sample_ids
from kd.nlp.student_model.token_objective import divergence_of, token_level
from kd.nlp.teacher_model import SCRATCH
from kd.nlp.teacher_model.generative import Generator
from kd.nlp.teacher_model.teacher import models_and_tokenizers

Splits = dict[str, Dataset]


def check_same_vocabulary(
    args: Any, student: Generator | None, teacher: Generator | None, methods: tuple[str, ...] = ()
) -> None:
    """Raises UserError if a named student does not have the vocabulary of a named teacher. `methods` are those of the
    script that need no common vocabulary.
    """
    if student and (teacher is None or not student.has_vocabulary_of(teacher)):
        instead = "".join(f"--method {name}, " for name in methods)
        raise UserError(
            f"student {args.student} and teacher {args.teacher} have different vocabularies: pass {instead}--student "
            f"{SCRATCH} or {CUT}, or a student with the teacher's tokenizer"
        )


def open_run(
    training: KDTrainingArguments, args: Any, data: Any, teacher: Generator | None, student: Generator | None
) -> TrainerRun:
    """Opens the output folder for a new run, or continues the run in it. `data` has a fingerprint.

    Raises UserError if that run started from other data or models, or if --on_policy_share does not fit other flags.
    """
    check_on_policy(args, training)
    run = TrainerRun(training, args)
    run.check_inputs(data.fingerprint, **models_and_tokenizers({"teacher": teacher, "student": student}))
    return run


@dataclass(frozen=True)
class GenerationTask(ABC):
    """The data and the models of a run, and the stages that train the models.

    args: Arguments of the script.
    data: Corpus or TranslationData.
    splits: The data in tokens.
    pretrained_teacher, pretrained_student: Models that were named; None for random weights or a cut.
    """

    args: Any
    data: Any
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    pretrained_teacher: PreTrainedModel | None
    pretrained_student: PreTrainedModel | None

    auto_class: ClassVar[Any]  # loads a finished stage

    @classmethod
    def of(cls, run: TrainerRun, args: Any, data: Any, teacher: Generator | None, student: Generator | None) -> Self:
        """Tokenizes the data with the teacher's tokenizer. For a teacher with random weights a tokenizer is learned.
        This is a stage, so that a continued run keeps the vocabulary.
        """
        if teacher is None:
            read = stage_loader(AutoTokenizer, load_tokenizer)
            tokenizer = run.stage("tokenizer", lambda: cls.learn_tokenizer(args, data), read)
        else:
            tokenizer = teacher.tokenizer
        splits = cls.tokenize(args, data, tokenizer)
        return cls(args, data, tokenizer, splits, teacher and teacher.model, student and student.model)

    # ---- defined by subclasses ----

    @staticmethod
    @abstractmethod
    def learn_tokenizer(args: Any, data: Any) -> PreTrainedTokenizerBase: ...

    @staticmethod
    @abstractmethod
    def tokenize(args: Any, data: Any, tokenizer: PreTrainedTokenizerBase) -> Splits: ...

    @abstractmethod
    def initial_teacher(self) -> PreTrainedModel:
        """The teacher before training."""

    @abstractmethod
    def initial_control(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The control before training. Its weights contain nothing that the teacher learned in this run."""

    @abstractmethod
    def initial_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The student before training. A cut has layers of the trained teacher."""

    @abstractmethod
    def learning_rate(self, training: KDTrainingArguments, role: str) -> float: ...

    @abstractmethod
    def collator(self, model: PreTrainedModel) -> Callable[[Any], dict[str, Any]]: ...

    @abstractmethod
    def token_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Validation metrics of `token_counts` (sequences, 3)."""

    def method(self, training: KDTrainingArguments, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Method:
        """Labels, and with a teacher also its distributions over the next token."""
        smoothing, weights = training.label_smoothing_factor, self.token_weights
        if teacher is None:
            return Method({"task": (1.0, label_term(smoothing, weights))})
        divergence = divergence_of(self.divergence, training.temperature)
        return token_level(training.alpha, divergence, smoothing, weights)

    @property
    def token_weights(self) -> TokenWeights:
        """The weights of the tokens in the mean of a batch."""
        return per_token

    @property
    def divergence(self) -> str:
        """The divergence from the teacher, as `divergence_of` takes it."""
        return str(self.args.method)

    @property
    def common_arguments(self) -> dict[str, Any]:
        """Training arguments of all stages."""
        return {}

    @property
    def stored_form(self) -> str | None:
        """--teacher_logits; None for a script without that flag."""
        return getattr(self.args, "teacher_logits", None)

    def logit_store(self, run: TrainerRun) -> LogitStore | None:
        """The folder of --teacher_logits, if that is set."""
        if self.stored_form is None:
            return None
        return LogitStore.of(self.args, run.args, self.divergence, (run.shared or run.folder) / "teacher_logits")

    def teacher_arguments(self, run: TrainerRun, teacher: PreTrainedModel) -> dict[str, Any]:
        """The arguments of KDTrainer for the outputs of the teacher."""
        return {"teacher": teacher}

    def training_rows(self, run: TrainerRun, rows: Dataset) -> Any:
        """The rows of a stage as the trainer reads them."""
        return rows

    @property
    def method_name(self) -> str:
        """The name of the method in reports."""
        share, form = self.args.on_policy_share, self.stored_form
        name = f"{self.args.method}_on_policy_{share:g}" if share else str(self.args.method)
        return f"{name}, {form}" if form else name

    # ---- stages ----

    def train_teacher(self, run: TrainerRun) -> PreTrainedModel:
        """The stage `teacher`: trains on labels. With --teacher_epochs 0, a pretrained teacher stays unchanged."""
        if store := self.logit_store(run):
            pretrained = self.pretrained_teacher
            store.check_tokens(self.tokenizer, pretrained.config.vocab_size if pretrained else len(self.tokenizer))
        epochs = self.args.teacher_epochs
        if self.pretrained_teacher is not None and epochs == 0:
            return self.pretrained_teacher
        return self.stage(run, "teacher", self.initial_teacher, num_train_epochs=epochs)

    def train_control(self, run: TrainerRun, teacher: PreTrainedModel) -> PreTrainedModel:
        """The stage `control`: the student's network and number of updates, on labels alone."""
        return self.stage(run, "control", partial(self.initial_control, teacher))

    def train_student(self, run: TrainerRun, teacher: PreTrainedModel) -> PreTrainedModel:
        """The stage `student`: trains on labels and on the teacher's distributions over the next token."""
        return self.stage(run, "student", partial(self.initial_student, teacher), teacher)

    def stage(
        self,
        run: TrainerRun,
        role: str,
        initial: Callable[[], PreTrainedModel],
        teacher: PreTrainedModel | None = None,
        rows: Dataset | None = None,
        **training_arguments: Any,
    ) -> PreTrainedModel:
        """Trains the result of `initial`, or loads the finished stage.

        Args:
            teacher: Computes the distributions that the model learns; None trains on labels alone.
            rows: Training data. Default: the train split.
            training_arguments: Training arguments of this stage.
        """

        def build() -> PreTrainedModel:
            return self.train(run, role, initial(), teacher, rows, **training_arguments)

        return run.stage(role, build, stage_loader(self.auto_class), self.tokenizer)

    def train(
        self,
        run: TrainerRun,
        role: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        rows: Dataset | None,
        **training_arguments: Any,
    ) -> PreTrainedModel:
        """Metrics are computed from `token_counts`, because logits (batch, positions, vocabulary) are too large to
        gather.
        """
        method, collate = self.method(run.args, model, teacher), self.collator(model)
        rows = self.training_rows(run, self.splits["train"] if rows is None else rows)
        source = {} if teacher is None else self.teacher_arguments(run, teacher)
        if teacher is not None and (store := self.logit_store(run)):
            rows = with_sample_ids(rows)
            with run.timed("teacher_outputs"):
                outputs = store.open(teacher, self.tokenizer, rows, collate, run.args.per_device_eval_batch_size)
            method, source = store.replace_term(method), {"teacher_outputs": outputs}
        samples = None
        if teacher is not None and self.args.on_policy_share:
            samples = StudentSamples(self.args, self.tokenizer, run.args.seed, run.args.process_index)
        return run.train(
            role,
            model,
            {"learning_rate": self.learning_rate(run.args, role)} | self.common_arguments | training_arguments,
            objective=method.objective if samples is None else OnPolicyObjective(method),
            replace_batch=samples,
            features=method.features,
            teacher_features=method.teacher_features,
            train_dataset=rows,
            eval_dataset=self.splits["validation"],
            data_collator=collate,
            preprocess_logits_for_metrics=token_counts,
            compute_metrics=lambda prediction: self.token_metrics(np.asarray(prediction.predictions)),
            **source,
        )

    # ---- results ----

    def warn_if_at_chance(self, run: TrainerRun, entry: dict[str, Any], vocabulary: int) -> None:
        """Warns if a teacher, by its entry in results.json, predicts no better than the frequencies of the tokens."""
        perplexity = entry["metrics"]["validation"]["perplexity"]
        train, validation = (label_tokens(self.splits[split]) for split in ("train", "validation"))
        run.warn(language_warning(entry["name"], perplexity, train, validation, vocabulary))

    def results(self, run: TrainerRun, task: str, models: dict[str, Any], **headline: Any) -> dict[str, Any]:
        """The run's results.json. See `Run.results` for `headline`."""
        splits = self.splits
        sizes = {split: len(splits[split]) if split in splits else None for split in ("train", "validation", "test")}
        return run.results(
            domain="NLP",
            task=task,
            data={**sizes, "fingerprint": self.data.fingerprint},
            models=models,
            split="validation",
            selection=run.args.selection,
            data_notes="; ".join(self.data.notes) or "none",
            **headline,
        )


def label_tokens(rows: Dataset) -> np.ndarray:
    """The labels (tokens,) of all rows, without IGNORED ones."""
    labels = rows.select_columns(["labels"]).with_format("arrow")[:]["labels"].combine_chunks().flatten().to_numpy()
    return np.asarray(labels[labels != IGNORED])
