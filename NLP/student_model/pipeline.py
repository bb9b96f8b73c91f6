"""The steps that every text distillation is made of: fine-tune, listen to the teacher, align."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kd.common.methods import Method
from kd.common.objective import Objective, labels_and_soft_targets, task_loss
from kd.common.training.batching import column_array
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import JoinedOutputs, TeacherOutputs, cache_teacher_outputs
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.bottleneck_classifier import Pooling
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.methods import hidden_states, width

FEATURE_BYTES = 4 * 2**30  # above this the hidden states of a teacher are recomputed each epoch, not cached


@dataclass
class Pipeline:
    """The steps, as stages of one run. What teachers say is cached in `outputs_folder`."""

    run: TrainerRun
    pooling: Pooling
    outputs_folder: Path

    @property
    def precision(self) -> str:
        return self.run.args.precision

    def objective(self, data: TextData, with_teacher: bool, matching: Method | None = None) -> Objective:
        """alpha * labels + (1 - alpha) * soft targets, unless `matching` has a method's own terms for these, and what
        is to match inside; or the labels alone.
        """
        args, smoothing = self.run.args, self.run.args.label_smoothing_factor
        if not with_teacher:
            return Objective(task=(1.0, task_loss(data.regression, smoothing)))
        others = {} if matching is None else matching.terms
        if "task" in others:
            return Objective(**others)
        return labels_and_soft_targets(args.alpha, args.temperature, data.regression, smoothing, **others)

    def finetune(
        self,
        name: str,
        model: PreTrainedModel,
        texts: Texts,
        epochs: float,
        rate: float,
        teacher: dict[str, Any] | None = None,
        matching: Method | None = None,
        freeze_embeddings: bool = True,
    ) -> PreTrainedModel:
        """Trains a classifier end to end, on labels alone or with a teacher (what `listen` or `hear` gave), then
        without dropout.
        """
        if teacher is not None:
            switch_off_dropout(model)
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(not freeze_embeddings)
        return self.run.train(
            name,
            model,
            {"num_train_epochs": epochs, "learning_rate": rate},
            objective=self.objective(texts.data, teacher is not None, matching),
            features={} if matching is None else matching.features,
            train_dataset=texts.train,
            eval_dataset=texts.validation,
            data_collator=texts.collate,
            not_for_student=texts.unused_by(model),
            compute_metrics=trainer_metrics(texts.data),
            **(teacher or {}),
        )

    def listen(
        self,
        teacher: PreTrainedModel,
        texts: Texts,
        features: dict[str, str] | None = None,
        logits: bool = True,
    ) -> TeacherOutputs:
        """The cached outputs of a teacher for the training texts: its logits, and hidden states in fp16 by name, which
        are the outputs of submodules ({name: path}), recorded by the same hooks as those of a live teacher.
        """
        with self.run.timed("teacher_outputs"):
            return cache_teacher_outputs(
                teacher,
                texts.train,
                texts.collate,
                self.outputs_folder,
                features=features,
                logits=logits,
                precision=self.precision,
            )

    def hear(
        self,
        teacher: PreTrainedModel,
        texts: Texts,
        matching: Method,
        logits: Callable[[], TeacherOutputs] | None = None,
    ) -> dict[str, Any]:
        """A teacher as the trainer takes it: cached where the hidden states that `matching` needs are not too many,
        else live. `logits` gives those to learn from where they are cached; None: none are wanted.
        """
        if not matching.teacher_features:
            return {"teacher_outputs": logits and logits()}
        tokens = column_array(texts.train, "length").sum()
        if tokens * len(matching.teacher_features) * width(teacher) * 2 <= FEATURE_BYTES:
            said = self.listen(teacher, texts, matching.teacher_features, logits=False)
            return {"teacher_outputs": said if logits is None else JoinedOutputs([said, logits()])}
        return {"teacher": teacher, "teacher_features": matching.teacher_features}

    def align(
        self, name: str, encoder: PreTrainedModel, teacher: PreTrainedModel, texts: Texts, epochs: float, rate: float
    ) -> PreTrainedModel:
        """Trains a student encoder, on texts without labels, to have the hidden states of the teacher's layers at the
        same relative depth, without dropout, which would only blur what is to be matched.
        """
        switch_off_dropout(encoder)
        for part in (encoder.get_input_embeddings(), getattr(encoder, "pooler", None)):
            if part is not None:
                part.requires_grad_(False)  # copied from the teacher, or without a say in the hidden states
        matching = hidden_states(encoder, teacher, 1.0, pooling=self.pooling)
        return self.run.train(
            name,
            encoder,
            {"num_train_epochs": epochs, "learning_rate": rate},
            objective=Objective(**matching.terms),
            features=matching.features,
            train_dataset=texts.train.remove_columns("labels"),
            data_collator=texts.collate,
            not_for_student=texts.unused_by(encoder),
            **self.hear(teacher, texts, matching),
        )


def switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
