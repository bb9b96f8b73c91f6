"""Distillation into a student with a discrete key-value bottleneck, from a teacher with or without one."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kd.common.bottleneck.arguments import Keys
from kd.common.bottleneck.training import Samples, train_bottleneck
from kd.common.cli import reject_unused
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import PairArguments, TextArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.distillation import Distillation
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.teacher_model.teacher import encoder_of

KEY_TEXTS = 20_000  # keys are fitted to the embeddings of at most so many texts


class BottleneckDistillation(Distillation):
    """Trains the teacher's encoder and its bottleneck, aligns the student's encoder, trains its bottleneck."""

    def __init__(
        self,
        text: TextArguments,
        pair: PairArguments,
        bottleneck: TextBottleneckArguments,
        training: KDTrainingArguments,
        data: TextData,
        **kwargs: Any,
    ) -> None:
        self.bottleneck, self.method = bottleneck, bottleneck.system
        super().__init__(text, pair, training, data, bottleneck.pooling, bottleneck, **kwargs)

    def refuse_what_cannot_be(self, training: KDTrainingArguments) -> None:
        super().refuse_what_cannot_be(training)
        own = self.given_student
        if self.given.trained:
            reject_unused(f"teacher {self.pair.teacher} is kept as it is", self.bottleneck, "freeze_teacher_encoder")
        elif self.bottleneck.freeze_teacher_encoder:
            reason = "--freeze_teacher_encoder leaves the teacher's encoder as it is"
            reject_unused(reason, self.pair, "teacher_epochs", "scratch_epochs")
        for classifier in filter(None, (self.given, own)):
            self.bottleneck.without_weights(classifier.encoder.config.hidden_size)
        if self.bottleneck.keys not in ("carried", "reused"):
            return
        if isinstance(self.given.model, BottleneckClassifier):
            self._refuse_unfit(self.given.model)
        if own is None:
            return
        widths = own.encoder.config.hidden_size, self.given.encoder.config.hidden_size
        if widths[0] != widths[1]:
            raise UserError(
                f"student {self.pair.student} is {widths[0]} wide, the teacher's keys fit a width of {widths[1]}: "
                "choose a student of that width, --student_layers, or --keys new"
            )

    def _refuse_unfit(self, teacher: BottleneckClassifier) -> None:
        """Raises UserError where a teacher comes with a bottleneck that the student's cannot take over from."""
        name, pooling = self.pair.teacher, teacher.config.pooling
        if pooling != self.bottleneck.pooling:
            raise UserError(
                f"the keys of teacher {name} are for --pooling {pooling}, not {self.bottleneck.pooling}: pass that, "
                "or --keys new"
            )
        try:
            own = self.bottleneck.without_weights(self.given.encoder.config.hidden_size, self.data.num_labels)
            own.check_compatible(teacher.bottleneck, values=self.bottleneck.keys == "reused")
        except ValueError as error:
            raise UserError(f"{error}; give the bottleneck the shape of that of {name}, or pass --keys new") from error

    def make_teacher(self) -> PreTrainedModel:
        """A fine-tuned classifier, whose head a bottleneck replaces where the system gives the teacher one."""
        if self.bottleneck.freeze_teacher_encoder:
            classifier = self.given.model
        else:
            classifier = self.fine_tuned_teacher("teacher_encoder")
        if self.bottleneck.bottleneck == "student" or isinstance(classifier, BottleneckClassifier):
            return classifier
        return self.with_bottleneck("teacher", encoder_of(classifier), self.texts, "new")

    def control(self) -> PreTrainedModel:
        """A bottleneck behind the student's encoder, both from labels alone. Where the encoder serves plain students
        too, it is trained for as many epochs as theirs.
        """
        epochs = self.pair.align_epochs + (self.run.args.num_train_epochs if self.shared else 0)
        trained = self.plain_control("control_encoder", epochs)
        return self.with_bottleneck("control", encoder_of(trained), self.student_texts, "new")

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Aligned with the teacher's hidden states, then its values taught by labels and the teacher's logits."""
        encoder = (
            self.given_student.encoder if self.given_student else cut_layers(encoder_of(teacher), self.student_layers)
        )
        encoder = self.aligned_encoder(encoder, teacher)
        keys = self.bottleneck.keys
        logits = None if keys == "reused" else self.pipeline.listen(teacher, self.texts)
        source = teacher if isinstance(teacher, BottleneckClassifier) else None
        return self.with_bottleneck("student", encoder, self.student_texts, keys, source, logits)

    def with_bottleneck(
        self,
        stage: str,
        encoder: PreTrainedModel,
        texts: Texts,
        keys: Keys,
        source: BottleneckClassifier | None = None,
        teacher_outputs: TeacherOutputs | None = None,
    ) -> PreTrainedModel:
        """A stage: a bottleneck after a frozen encoder, trained on labels and the teacher's cached logits."""
        args, pipeline = self.run.args, self.pipeline

        def train() -> BottleneckClassifier:
            labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
            model = BottleneckClassifier.around(encoder, labels, pipeline.pooling, **self.bottleneck.shape())
            settings = self.bottleneck.value_settings(args.value_learning_rate or args.learning_rate)
            return train_bottleneck(
                self.run,
                stage,
                model,
                keys,
                source.bottleneck if source else None,
                settings | {"train_sampling_strategy": "random"},
                _samples(texts, texts.train),
                _samples(texts, texts.validation),
                key_rows=_at_most(texts.train, KEY_TEXTS, args.seed),
                objective=pipeline.objective(texts.data, teacher_outputs is not None),
                teacher_outputs=teacher_outputs,
                compute_metrics=trainer_metrics(texts.data),
            )

        return self.stage(stage, train)


def _samples(texts: Texts, rows: Dataset) -> Samples:
    return Samples(rows, texts.collate, torch.tensor(rows["labels"]), torch.tensor(rows["sample_id"]))


def _at_most(rows: Dataset, number: int, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(number)) if len(rows) > number else rows
