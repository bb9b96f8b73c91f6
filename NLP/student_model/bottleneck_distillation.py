"""Distillation into a student with a discrete key-value bottleneck, from a teacher with or without one."""

from typing import Any

import torch
from transformers import PreTrainedModel

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import reject_unused
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.student_model.arguments import BottleneckArguments, PairArguments, TextArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.distillation import Distillation
from kd.nlp.student_model.fill import Filling
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.teacher_model.teacher import encoder_of


class BottleneckDistillation(Distillation):
    """Fine-tunes the teacher's encoder, fills its bottleneck, aligns the student's encoder, fills its bottleneck."""

    def __init__(
        self,
        text: TextArguments,
        pair: PairArguments,
        bottleneck: BottleneckArguments,
        training: KDTrainingArguments,
        data: TextData,
        **kwargs: Any,
    ) -> None:
        self.bottleneck, self.method = bottleneck, bottleneck.system
        super().__init__(text, pair, training, data, bottleneck.pooling, bottleneck, **kwargs)
        self.filling = Filling(self.pipeline, bottleneck.shape(), bottleneck.value_epochs, bottleneck.value_batch_size)

    def refuse_what_cannot_be(self, training: KDTrainingArguments) -> None:
        super().refuse_what_cannot_be(training)
        own = self.given_student
        if self.given.trained:
            reject_unused(f"teacher {self.pair.teacher} is kept as it is", self.bottleneck, "freeze_teacher_encoder")
        elif self.bottleneck.freeze_teacher_encoder:
            reason = "--freeze_teacher_encoder leaves the teacher's encoder as it is"
            reject_unused(reason, self.pair, "teacher_epochs", "scratch_epochs")
        for classifier in filter(None, (self.given, own)):
            self._of_shape(classifier.encoder.config.hidden_size)
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

    def _of_shape(self, width: int) -> DiscreteKeyValueBottleneck:
        """A bottleneck of the shape that is asked for, without its weights. Raises UserError where there is none."""
        try:
            with torch.device("meta"):
                return DiscreteKeyValueBottleneck(width, self.data.num_labels, **self.bottleneck.shape())
        except ValueError as error:
            raise UserError(str(error)) from error

    def _refuse_unfit(self, teacher: BottleneckClassifier) -> None:
        """Raises UserError where a teacher comes with a bottleneck that the student's cannot take over from."""
        name, pooling = self.pair.teacher, teacher.config.pooling
        if pooling != self.bottleneck.pooling:
            raise UserError(
                f"the keys of teacher {name} are for --pooling {pooling}, not {self.bottleneck.pooling}: pass that, "
                "or --keys new"
            )
        try:
            own = self._of_shape(self.given.encoder.config.hidden_size)
            own.refuse_unfit(teacher.bottleneck, values=self.bottleneck.keys == "reused")
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
        return self.stage("teacher", lambda: self.filling.fill("teacher", encoder_of(classifier), self.texts, "new"))

    def control(self) -> PreTrainedModel:
        """A bottleneck behind the student's encoder, both from labels alone. Where the encoder serves plain students
        too, it is trained for as many epochs as theirs.
        """
        epochs = self.pair.align_epochs + (self.run.args.num_train_epochs if self.shared else 0)
        trained = self.plain_control("control_encoder", epochs)
        return self.stage(
            "control", lambda: self.filling.fill("control", encoder_of(trained), self.student_texts, "new")
        )

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Aligned with the teacher's hidden states, then its values taught by labels and the teacher's logits."""
        encoder = (
            self.given_student.encoder if self.given_student else cut_layers(encoder_of(teacher), self.student_layers)
        )
        encoder = self.aligned_encoder(encoder, teacher)
        keys = self.bottleneck.keys
        logits = None if keys == "reused" else self.pipeline.listen(teacher, self.texts)
        source = teacher if isinstance(teacher, BottleneckClassifier) else None
        return self.stage(
            "student", lambda: self.filling.fill("student", encoder, self.student_texts, keys, source, logits)
        )
