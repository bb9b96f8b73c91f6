"""What all distillations of text classifiers share: a fine-tuned teacher, a control, an aligned student, a report."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from kd.common.pretrained import reading, stage_loader
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import PairArguments, TextArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier, Pooling
from kd.nlp.student_model.evaluation import evaluate, guessing, validation_split
from kd.nlp.student_model.layers import check_cut, cut_layers, layer_paths
from kd.nlp.student_model.methods import check_smoothing, layer_pairs
from kd.nlp.student_model.pipeline import Pipeline
from kd.nlp.teacher_model.teacher import (
    Pretrained,
    encoder_of,
    in_label_order,
    load_classifier,
    load_trained,
    models_and_tokenizers,
)

USAGE = """from transformers import AutoTokenizer
from {module} import {model}

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {model}.from_pretrained("{folder}").eval()
logits = model(**tokenizer("some text", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""
Logits = dict[str, np.ndarray]  # by split
read_stage = stage_loader(AutoModelForSequenceClassification)


class Distillation:
    """The trunk of a run; `others` are the script's further arguments, for its recipe. All stages but the student are
    kept in `shared`, if given, where runs of other systems with the same teacher find them. The data's class ids
    become those of a teacher that is trained for the same labels in another order.
    """

    method: str
    more_teachers: Sequence[str] = ()

    def __init__(
        self,
        text: TextArguments,
        pair: PairArguments,
        training: KDTrainingArguments,
        data: TextData,
        pooling: Pooling,
        *others: Any,
        shared: Path | None = None,
    ) -> None:
        self.data = data = in_label_order(pair.teacher, data)
        self.pair, self.pooling, self.shared = pair, pooling, shared
        self.others = [load_trained(name, data) for name in self.more_teachers]
        set_seed(training.seed)  # for the random heads of what is loaded here
        self.given = load_classifier(pair.teacher, data)  # as it comes
        self.given_student = load_classifier(pair.student, data) if pair.student else None
        cut_elsewhere = pair.control_from and not (pair.student or training.no_control)
        self.control_from = load_classifier(str(pair.control_from), data) if cut_elsewhere else None
        own = self.given_student
        self.notes = [note for one in (self.given, *self.others, own, self.control_from) if one for note in one.notes]
        for classifier in filter(None, (self.given, own, self.control_from)):
            classifier.cut_texts(text.max_length)
        self.texts = Texts.of(data, self.given.tokenizer)
        self.student_texts = Texts.of(data, own.tokenizer) if own else self.texts
        self.same_tokens = not own or own.tokenizer.get_vocab() == self.given.tokenizer.get_vocab()
        self.refuse_what_cannot_be(training)
        self.run = TrainerRun(training, text, pair, *others)
        starts: dict[str, Pretrained | None] = {
            "teacher": self.given,
            "student": own,
            "control_from": self.control_from,
        }
        starts |= {f"another_teacher_{i}": other for i, other in enumerate(self.others, 1)}
        self.run.check_inputs(data.fingerprint, **models_and_tokenizers(starts))
        self.pipeline = Pipeline(self.run, pooling, (shared or self.run.folder) / "teacher_outputs")
        self.measured: tuple[dict[str, Any], Logits] | None = None

    def rate(self, start: Pretrained) -> float:
        """The learning rate of fine-tuning that starts from these weights, or from a cut of them."""
        return self.pair.scratch_learning_rate if start.from_scratch else self.run.args.learning_rate

    @property
    def student_layers(self) -> int:
        return self.pair.student_layers or max(1, len(layer_paths(self.given.encoder)) // 2)

    def refuse_what_cannot_be(self, training: KDTrainingArguments) -> None:
        """Before anything is written, and before hours of training rather than after."""
        pair, layers = self.pair, len(layer_paths(self.given.encoder))
        check_smoothing(training, self.data.name, self.data.num_labels)
        loaded = [model for model in (self.given, self.given_student, self.control_from) if model]
        pair.refuse_ignored_of(self.given.trained, self.given.from_scratch, any(m.from_scratch for m in loaded))
        if self.given_student is None:
            if not 1 <= self.student_layers <= layers:
                raise UserError(
                    f"--student_layers must be between 1 and the teacher's {layers}, got {self.student_layers}"
                )
            if self.given.trained and not pair.control_from and not training.no_control:
                raise UserError(
                    f"teacher {pair.teacher} is trained already, so a control cut from it would have had a teacher: "
                    "name the encoder that it was made from with --control_from, or pass --no_control"
                )
            check_cut(self.given.encoder, self.student_layers)
            if self.control_from:
                self._refuse_origin(self.control_from)
        elif pair.align_epochs:
            if not self.same_tokens:
                raise UserError(
                    f"student {pair.student} and teacher {pair.teacher} have different vocabularies, so their hidden "
                    "states do not stand for the same tokens: pass --align_epochs 0, or a student with that vocabulary"
                )
            layer_pairs("uniform", len(layer_paths(self.given_student.encoder)), layers)

    def _refuse_origin(self, origin: Pretrained) -> None:
        """Raises UserError where no control can be cut from what --control_from names."""
        name, teacher = self.pair.control_from, self.pair.teacher
        if origin.trained:
            raise UserError(f"--control_from {name} is trained already: name the encoder that {teacher} was made from")
        if origin.tokenizer.get_vocab() != self.given.tokenizer.get_vocab():
            raise UserError(
                f"--control_from {name} and teacher {teacher} have different vocabularies: name the encoder that the "
                "teacher was made from"
            )
        if (layers := len(layer_paths(origin.encoder))) < self.student_layers:
            raise UserError(
                f"--control_from {name} has fewer layers ({layers}) than the control needs ({self.student_layers}): "
                "name the encoder that the teacher was made from, or pass --student_layers"
            )
        check_cut(origin.encoder, self.student_layers)

    # ---- stages ----

    def teacher(self) -> PreTrainedModel:
        """The teacher, measured before it teaches: one that is no better than guessing is called out."""
        teacher = self.make_teacher()
        self.measured = self.measure_teacher(teacher)
        self.run.warn(guessing(self.measured[0], self.data, self.texts.splits))
        return teacher

    def make_teacher(self) -> PreTrainedModel:
        raise NotImplementedError

    def fine_tuned_teacher(self, stage: str) -> PreTrainedModel:
        """A classifier fine-tuned on the task, unless it is one already."""
        given = self.given
        if given.trained:
            return given.model
        epochs = self.pair.scratch_epochs if given.from_scratch else self.pair.teacher_epochs
        model: PreTrainedModel = copy.deepcopy(given.model)  # the control is cut from what was given
        return self.stage(
            stage,
            lambda: self.pipeline.finetune(
                stage, model, self.texts, epochs, self.rate(given), freeze_embeddings=not given.from_scratch
            ),
        )

    def plain_control(self, stage: str, epochs: float) -> PreTrainedModel:
        """The student without the teacher: the same cut of the encoder *as it came*, as many epochs, labels only."""
        source = self.given_student or self.control_from or self.given

        def labels_only() -> PreTrainedModel:
            model = source.model if self.given_student else cut_layers(source.model, self.student_layers)
            return self.pipeline.finetune(
                stage,
                copy.deepcopy(model),
                self.student_texts,
                epochs,
                self.rate(source),
                freeze_embeddings=not source.from_scratch,
            )

        return self.stage(stage, labels_only)

    def aligned_encoder(self, encoder: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
        """The student's encoder, the same object, given the hidden states of the teacher's if there are epochs for
        that. A pooler stays its own: alignment leaves it alone, and not every system that shares the stage has one.
        """
        pair, stage = self.pair, "student_encoder"
        if not pair.align_epochs:
            return encoder

        def load(folder: str) -> PreTrainedModel:
            with reading(folder, "a finished stage"):
                aligned = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
            kept = {name: weight for name, weight in aligned.items() if not name.startswith("pooler.")}
            encoder.load_state_dict(encoder.state_dict() | kept)
            return encoder

        return self.stage(
            stage,
            lambda: self.pipeline.align(
                stage, encoder, encoder_of(teacher), self.texts, pair.align_epochs, pair.align_learning_rate
            ),
            load,
        )

    def stage(
        self,
        name: str,
        build: Callable[[], PreTrainedModel],
        load: Callable[[str], PreTrainedModel] = read_stage,
    ) -> PreTrainedModel:
        texts = self.student_texts if name.startswith(("student", "control")) else self.texts
        folder = None if name == "student" else self.shared
        if folder and name == "student_encoder":
            folder = folder / self.pooling  # what is pooled is aligned too
        return self.run.stage(name, build, load, texts.collate.tokenizer, folder)

    # ---- what it was worth ----

    def measure_teacher(self, teacher: PreTrainedModel) -> tuple[dict[str, Any], Logits]:
        return evaluate(self.pair.teacher, teacher, self.data, self.texts.splits, self.texts.collate)

    def report(
        self, teacher: PreTrainedModel, control: PreTrainedModel | None, student: PreTrainedModel
    ) -> dict[str, Any] | None:
        """Measures all three, writes the report and the student's folder, prints the table. Returns the results, in
        the main process.
        """
        models: dict[str, Any] = {}
        models["teacher"], said = self.measured or self.measure_teacher(teacher)
        size = self.pair.student or f"{self.student_layers} layers"
        for role, model in (("control", control), ("student", student)):
            splits, collate = self.student_texts.splits, self.student_texts.collate
            name = f"{size}, {'labels only' if role == 'control' else self.method}"
            models[role] = model and evaluate(name, model, self.data, splits, collate, said)[0]
        if not PartialState().is_main_process:
            return None
        trained = {role: m for role, m in (("teacher", teacher), ("control", control), ("student", student)) if m}
        keys = {role: m.config.key_statistics for role, m in trained.items() if isinstance(m, BottleneckClassifier)}
        results = self._results(models, **({"keys": keys} if keys else {}))
        bottleneck = isinstance(student, BottleneckClassifier)
        usage = USAGE.format(
            module="kd.nlp.student_model.bottleneck_classifier" if bottleneck else "transformers",
            model="BottleneckClassifier" if bottleneck else "AutoModelForSequenceClassification",
            folder=self.run.folder / "student",
        )
        self.run.finish(results, student, usage, self.student_texts.collate.tokenizer)
        return results

    def _results(self, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
        sizes = {name: len(rows) for name, rows in self.texts.splits.items()}
        return self.run.results(
            domain="NLP",
            task=self.data.name,
            method=self.method,
            data={
                "test": None,
                **sizes,  # MNLI has two validation splits, which are named here as well
                "validation": sum(n for name, n in sizes.items() if name.startswith("validation")),
                "fingerprint": self.data.fingerprint,
            },
            models=models,
            split=validation_split(self.texts.splits),
            metric=self.data.primary_metric,
            selection=self.run.args.selection,
            data_notes="; ".join(self.data.notes) or "none",
            model_notes="; ".join(self.notes) or "none",
            **extra,
        )
