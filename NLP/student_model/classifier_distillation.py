"""Distillation of plain classifiers: alignment, soft targets of one or several teachers, and terms on the inside."""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kd.common.cli import reject_unused
from kd.common.methods import Method
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.teacher_outputs import JoinedOutputs, TeacherOutputs
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.distillation import Distillation, Logits
from kd.nlp.student_model.evaluation import evaluate, guessing, metrics_by_split
from kd.nlp.student_model.layers import cut_layers, layer_paths
from kd.nlp.student_model.methods import (
    PLAIN,
    attentions,
    check_method,
    embeddings,
    hidden_states,
    layer_pairs,
    needs_features,
    text_method,
)
from kd.nlp.teacher_model.teacher import encoder_of


class ClassifierDistillation(Distillation):
    """Fine-tunes the teacher, aligns the student's encoder, fine-tunes the student on labels and what teachers say."""

    def __init__(
        self,
        text: TextArguments,
        pair: PairArguments,
        matching: MatchingArguments,
        training: KDTrainingArguments,
        data: TextData,
        **kwargs: Any,
    ) -> None:
        self.wanted, self.method = matching, matching.method
        self.more_teachers = matching.more_teachers
        super().__init__(text, pair, training, data, "cls", matching, **kwargs)

    def refuse_what_cannot_be(self, training: KDTrainingArguments) -> None:
        super().refuse_what_cannot_be(training)
        wanted, pair = self.wanted, self.pair
        inside = wanted.hidden_weight or wanted.embedding_weight or wanted.attention_weight
        if (inside or needs_features(wanted.method)) and not self.same_tokens:
            raise UserError(
                f"student {pair.student} and teacher {pair.teacher} have different vocabularies, so nothing inside "
                "can be matched: leave --hidden_weight, --embedding_weight and --attention_weight at 0, and choose a "
                "--method of logits"
            )
        if needs_features(wanted.method) and self.others:
            raise UserError(f"--method {wanted.method} needs a single teacher: leave out --more_teachers")
        check_method(wanted.method, training, self.data.name, self.data.num_labels)
        if wanted.attention_weight and self.others:
            raise UserError("--attention_weight needs a single teacher: leave it at 0, or leave out --more_teachers")
        if (inside or needs_features(wanted.method)) and isinstance(self.given.model, BottleneckClassifier):
            raise UserError(
                f"teacher {pair.teacher} has a bottleneck, and shows nothing of its inside here: leave "
                "--hidden_weight, --embedding_weight and --attention_weight at 0, and choose a --method of logits"
            )
        student = self.given_student
        if all(start.from_scratch for start in (self.given, student, self.control_from) if start):
            reject_unused("models of random weights are trained at --scratch_learning_rate", training, "learning_rate")
        layers = len(layer_paths(student.encoder)) if student else self.student_layers
        if wanted.hidden_weight or wanted.attention_weight:
            layer_pairs(wanted.layer_map, layers, len(layer_paths(self.given.encoder)))
        if isinstance(self.given.model, BottleneckClassifier) and not student:
            raise UserError(
                f"teacher {pair.teacher} has a bottleneck, and no plain student can be cut from it: name one"
            )
        if wanted.student_from == "pretrained" and (self.given.trained or student):
            raise UserError(
                "--student_from pretrained needs a teacher that is fine-tuned here and a student cut from it"
            )

    def _stage_of(self, role: str) -> str:
        return f"{role}_encoder" if self.shared else role

    def make_teacher(self) -> PreTrainedModel:
        return self.fine_tuned_teacher(self._stage_of("teacher"))

    def control(self) -> PreTrainedModel:
        """As many epochs as the student has, of alignment and of fine-tuning."""
        epochs = self.pair.align_epochs + self.run.args.num_train_epochs
        return self.plain_control(self._stage_of("control"), epochs)

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        if self.given_student:
            student: PreTrainedModel = self.given_student.model
        else:
            source = teacher if self.wanted.student_from == "teacher" else self.given.model
            student = cut_layers(source, self.student_layers)
        self.aligned_encoder(encoder_of(student), teacher)

        def fine_tune() -> PreTrainedModel:
            matching = self._matching(student, teacher)
            heard = self.pipeline.hear(teacher, self.texts, matching, lambda: self._logits(teacher))
            if "teacher" in heard and self.others:
                raise UserError("the hidden states are too many to cache, which several teachers need: name one")
            texts = self.texts if self.same_tokens else self.student_texts
            rate = self.wanted.student_learning_rate
            if rate is None:
                rate = self.rate(self.given_student or self.given)
            epochs = self.run.args.num_train_epochs
            return self.pipeline.finetune("student", student, texts, epochs, rate, heard, matching)

        return self.stage("student", fine_tune)

    def _matching(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Method:
        wanted, found = self.wanted, Method({})
        if wanted.method != PLAIN:
            found += text_method(wanted.method, self.run.args, student, teacher, self.texts, self.pooling)
        if wanted.hidden_weight:
            found += hidden_states(
                student, teacher, wanted.hidden_weight, wanted.hidden_loss, wanted.layer_map, self.pooling
            )
        if wanted.embedding_weight:
            found += embeddings(student, teacher, wanted.embedding_weight, wanted.hidden_loss)
        if wanted.attention_weight:
            found += attentions(student, teacher, wanted.attention_weight, wanted.layer_map)
        return found

    def _logits(self, teacher: PreTrainedModel) -> TeacherOutputs:
        """The mean of the teachers' logits: the geometric mean of their distributions (arXiv:1503.02531)."""
        said = self.pipeline.listen(teacher, self.texts)
        if not self.others:
            return said
        each = [said, *(self.pipeline.listen(o.model, Texts.of(self.data, o.tokenizer)) for o in self.others)]
        return JoinedOutputs(each)

    def measure_teacher(self, teacher: PreTrainedModel) -> tuple[dict[str, Any], Logits]:
        """Several teachers are worth what their mean logits are worth, and cost what they cost together."""
        entry, said = super().measure_teacher(teacher)
        if not self.others:
            return entry, said
        entries, spoken = [entry], [said]
        for name, other in zip(self.more_teachers, self.others, strict=True):
            texts = Texts.of(self.data, other.tokenizer)
            one, logits = evaluate(name, other.model, self.data, texts.splits, texts.collate)
            entries.append(one)
            spoken.append(logits)
        for one in entries:
            self.run.warn(guessing(one, self.data, self.texts.splits))
        mean = {split: np.mean([logits[split] for logits in spoken], axis=0) for split in said}
        return _together(entries) | {"metrics": metrics_by_split(self.data, mean, self.texts.splits)}, mean


def _together(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The costs of models that all have to answer."""
    latencies = [entry["latency_ms"] for entry in entries]
    return {
        "name": " + ".join(entry["name"] for entry in entries),
        "parameters": sum(entry["parameters"] for entry in entries),
        "megabytes": sum(entry["megabytes"] for entry in entries),
        "flops": sum(entry["flops"] or 0 for entry in entries) or None,
        "latency_ms": latencies[0] | {key: sum(one[key] for one in latencies) for key in ("median", "p90")},
    }
