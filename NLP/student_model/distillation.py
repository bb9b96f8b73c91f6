"""One distillation from a text teacher to a text student: who is trained on what, and the report at the end."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from common.arguments import KDTrainingArguments
from common.bottleneck import DiscreteKeyValueBottleneck
from common.report import model_card, print_table, write_report
from common.run import TrainerRun
from common.utils.errors import UserError
from common.utils.files import write_text, writing_folder
from nlp.data.loading import TextData
from nlp.student_model.bottleneck_classifier import BottleneckClassifier
from nlp.student_model.evaluation import evaluate
from nlp.student_model.layers import cut_layers, layer_paths
from nlp.student_model.pipeline import Pipeline, Texts
from nlp.teacher_model.teacher import encoder_of, load_classifier

USAGE = """from transformers import AutoTokenizer
from {module} import {model}

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {model}.from_pretrained("{folder}").eval()
logits = model(**tokenizer("some text", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


class Distillation:
    """Teacher, control and student of one run. `args` are those of scripts/distill_bottleneck.py."""

    def __init__(self, args: Any, training: KDTrainingArguments, data: TextData) -> None:
        self.args, self.data = args, data
        set_seed(training.seed)  # for the random heads of what is loaded here
        self.given = load_classifier(args.teacher, data)  # as it comes
        self.given_student = load_classifier(args.student, data) if args.student else None
        own = self.given_student
        for classifier in filter(None, (self.given, own)):
            classifier.tokenizer.model_max_length = args.max_length  # saved with it, so that evaluation cuts alike
        self.texts = Texts.of(data, self.given.tokenizer)
        self.student_texts = Texts.of(data, own.tokenizer) if own else self.texts
        self._refuse_what_cannot_fit(training.no_control)
        self.run = TrainerRun(training, args)
        self.pipeline = Pipeline(
            self.run, args.pooling, args.bottleneck_shape(), args.value_epochs, args.value_batch_size
        )

    @property
    def method(self) -> str:
        if self.args.bottleneck == "both":
            return f"keys_{self.args.keys}"
        return "student_only" if self.args.bottleneck == "student" else "base"

    @property
    def rate(self) -> float:
        training = self.run.args
        return self.args.scratch_learning_rate if self.given.from_scratch else training.learning_rate

    @property
    def student_layers(self) -> int:
        return self.args.student_layers or max(1, len(layer_paths(self.given.encoder)) // 2)

    def _refuse_what_cannot_fit(self, no_control: bool) -> None:
        """Before anything is written, and before hours of training rather than after."""
        args, own = self.args, self.given_student
        if args.bottleneck != "none":
            for classifier in filter(None, (self.given, own)):
                self._refuse_bottleneck_that_cannot_be(classifier.encoder.config.hidden_size)
        if not own:
            if not 1 <= self.student_layers <= len(layer_paths(self.given.encoder)):
                raise UserError(
                    f"--student_layers must be between 1 and the teacher's {len(layer_paths(self.given.encoder))}, "
                    f"got {self.student_layers}"
                )
            if self.given.trained and not args.control_from and not no_control:
                raise UserError(
                    f"teacher {args.teacher} is trained already, so a control cut from it would have had a teacher: "
                    "name the encoder that it was made from with --control_from, or pass --no_control"
                )
            return
        widths = own.encoder.config.hidden_size, self.given.encoder.config.hidden_size
        if args.bottleneck == "both" and args.keys in ("carried", "reused") and widths[0] != widths[1]:
            raise UserError(
                f"student {args.student} is {widths[0]} wide, the teacher's keys fit a width of {widths[1]}: choose a "
                "student of that width, --student_layers, or --keys new"
            )
        if args.align_epochs and own.tokenizer.get_vocab() != self.given.tokenizer.get_vocab():
            raise UserError(
                f"student {args.student} and teacher {args.teacher} have different vocabularies, so their hidden "
                "states do not stand for the same tokens: pass --align_epochs 0, or a student with that vocabulary"
            )

    def _refuse_bottleneck_that_cannot_be(self, width: int) -> None:
        try:
            with torch.device("meta"):
                DiscreteKeyValueBottleneck(width, 1, **self.args.bottleneck_shape())
        except ValueError as error:
            raise UserError(str(error)) from error

    # ---- who is trained on what ----

    def teacher(self) -> PreTrainedModel:
        """A classifier fine-tuned on the task; with a bottleneck behind its encoder where the system has one."""
        given = self.given
        classifier: PreTrainedModel = copy.deepcopy(given.model)  # the control is cut from what was given
        if not given.trained and not self.args.freeze_teacher_encoder:
            epochs = self.args.scratch_epochs if given.from_scratch else self.args.teacher_epochs
            name = "teacher" if self.args.bottleneck != "both" else "teacher_encoder"
            classifier = self._stage(
                name,
                lambda: self.pipeline.finetune(
                    name, classifier, self.texts, epochs, self.rate, freeze_embeddings=not given.from_scratch
                ),
            )
        self.teacher_encoder = encoder_of(classifier)
        if self.args.bottleneck != "both" or isinstance(classifier, BottleneckClassifier):
            return classifier
        return self._stage("teacher", lambda: self.pipeline.fill("teacher", self.teacher_encoder, self.texts, "new"))

    def control(self) -> PreTrainedModel:
        """The student without the teacher: the same cut of the encoder *as it came*, the same epochs, labels only."""
        source = self.given_student or (load_classifier(self.args.control_from, self.data) if self.args.control_from
                                        else self.given)  # fmt: skip
        texts = self.student_texts
        plain = self.args.bottleneck == "none"
        epochs = self.args.align_epochs + (self.run.args.num_train_epochs if plain else 0)
        name = "control" if plain else "control_encoder"

        def labels_only() -> PreTrainedModel:
            model = source.model if self.given_student else cut_layers(source.model, self.student_layers)
            return self.pipeline.finetune(
                name, copy.deepcopy(model), texts, epochs, self.rate, freeze_embeddings=not source.from_scratch
            )

        trained = self._stage(name, labels_only)
        if plain:
            return trained
        return self._stage("control", lambda: self.pipeline.fill("control", encoder_of(trained), texts, "new"))

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Aligned with the teacher's hidden states, then taught by its logits."""
        own, texts, plain = self.given_student, self.student_texts, self.args.bottleneck == "none"
        if own:
            student = own.model if plain else encoder_of(own.model)
        else:
            student = cut_layers(teacher if plain else self.teacher_encoder, self.student_layers)
        encoder = encoder_of(student) if plain else student
        if self.args.align_epochs:
            name, epochs, rate = "student_encoder", self.args.align_epochs, self.args.align_learning_rate
            encoder = self._stage(
                name,
                lambda: self.pipeline.align(name, encoder, self.teacher_encoder, texts, epochs, rate),
                type(encoder).from_pretrained,
            )
        logits = None if self.args.keys == "reused" else self.pipeline.listen(teacher, self.texts)
        if plain:
            student.base_model.load_state_dict(encoder.state_dict())
            epochs = self.run.args.num_train_epochs
            return self._stage(
                "student", lambda: self.pipeline.finetune("student", student, texts, epochs, self.rate, logits)
            )
        source = teacher if isinstance(teacher, BottleneckClassifier) else None
        return self._stage(
            "student", lambda: self.pipeline.fill("student", encoder, texts, self.args.keys, source, logits)
        )

    def _stage(
        self,
        name: str,
        build: Callable[[], PreTrainedModel],
        load: Callable[[str], PreTrainedModel] = AutoModelForSequenceClassification.from_pretrained,
    ) -> PreTrainedModel:
        texts = self.student_texts if name.startswith(("student", "control")) else self.texts
        return self.run.stage(name, build, load, texts.collate.tokenizer)

    # ---- what it was worth ----

    def report(self, teacher: PreTrainedModel, control: PreTrainedModel | None, student: PreTrainedModel) -> None:
        """Measures all three, writes the report and the student's folder, prints the table."""
        models: dict[str, Any] = {}
        models["teacher"], said = evaluate(
            self.args.teacher, teacher, self.data, self.texts.splits, self.texts.collate
        )
        size = self.args.student or f"{self.student_layers} layers"
        for role, model in (("control", control), ("student", student)):
            splits, collate = self.student_texts.splits, self.student_texts.collate
            name = f"{size}, {'labels only' if role == 'control' else self.method}"
            models[role] = model and evaluate(name, model, self.data, splits, collate, said)[0]
        if not PartialState().is_main_process:
            return
        results = self._results(models)
        trained = {"teacher": teacher, "control": control, "student": student}
        keys = {role: m.config.key_statistics for role, m in trained.items() if isinstance(m, BottleneckClassifier)}
        if keys:
            results["keys"] = keys
        folder = self._save_student(student, results)
        write_report(self.run.folder, results, self.run.history)
        print_table(results)
        print(f"student: {folder}\nreport:  {self.run.folder / 'report.md'}")

    def _results(self, models: dict[str, Any]) -> dict[str, Any]:
        split = next(name for name in self.texts.splits if name.startswith("validation"))
        sizes = {name: len(rows) for name, rows in self.texts.splits.items()}
        return self.run.results(
            domain="NLP",
            task=self.data.name,
            method=self.method,
            data={
                "train": sizes["train"],
                "validation": sum(n for name, n in sizes.items() if name.startswith("validation")),
                "test": sizes.get("test"),
                "fingerprint": self.data.fingerprint,
            },
            models=models,
            split=split,
            metric=self.data.primary_metric,
            selection="last epoch of every stage; no split chose anything",
            data_notes="; ".join(self.data.notes) or "none",
        )

    def _save_student(self, student: PreTrainedModel, results: dict[str, Any]) -> Path:
        folder = self.run.folder / "student"
        bottleneck = isinstance(student, BottleneckClassifier)
        usage = USAGE.format(
            module="nlp.student_model.bottleneck_classifier" if bottleneck else "transformers",
            model="BottleneckClassifier" if bottleneck else "AutoModelForSequenceClassification",
            folder=folder,
        )
        with writing_folder(folder) as partial:
            student.save_pretrained(partial)
            self.student_texts.collate.tokenizer.save_pretrained(partial)
            write_text(partial / "README.md", model_card(results, f"{self.data.name}: {self.method}", usage))
        return folder
