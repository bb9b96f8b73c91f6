"""The run of image classifiers: training on labels alone or with a teacher, evaluation and report."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import set_seed

from kd.common.data.fingerprints import outputs_key
from kd.common.methods import Method, labels
from kd.common.metrics.quality import classifier_warning, constant_score
from kd.common.metrics.verdict import Measurement
from kd.common.objective import Objective
from kd.common.outputs import EnsembleTeacher
from kd.common.pretrained import stage_loader
from kd.common.reporting.model_card import save_student
from kd.common.reporting.report import write_report
from kd.common.training.inference import identity_collate
from kd.common.training.side_by_side import SideBySideObjective
from kd.common.training.teacher_outputs import TeacherOutputs, TeacherViews
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.files import check_writable
from kd.image_classification.data.image_data import ImageData, LargeImageData
from kd.image_classification.data.views import ImageViews, Views
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.cards import card_of
from kd.image_classification.student_model.evaluation import (
    Logits,
    evaluate,
    image_processor,
    measure,
    measure_columns,
    trainer_metrics,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

Model = TypeVar("Model", bound=nn.Module)
Models = Mapping[str, tuple[str, ImageClassifier | None]]  # name and model by role
read_stage = stage_loader(ImageClassifier)


class ImageRun(TrainerRun):
    """A run on `data`, by default in the folder `runs/image-classification/NAME`.

    Raises UserError if the arguments do not fit the data, or if a resumed run was started with other data or models.

    Args:
        instances: the other arguments of the script, which are saved in the recipe.
        teacher, ensemble_teachers: pretrained teachers; None if the run trains its teacher.
    """

    args: ImageTrainingArguments

    def __init__(
        self,
        name: str,
        training: ImageTrainingArguments,
        data: ImageData,
        *instances: Any,
        teacher: nn.Module | None = None,
        ensemble_teachers: nn.Module | None = None,
    ) -> None:
        validate_training(training, data)
        has_teacher = teacher is not None or data.teacher is not None
        if not len(data.labelled_train().splits["train"]) and not (has_teacher and training.no_control):
            raise UserError(
                "no training image has a label: pass a trained --teacher and --no_control, or put images into "
                "train/CLASS/"
            )
        folder = re.sub(r"[^\w-]+", "_", name)  # a method with arguments contains colons
        training.output_dir = training.output_dir or f"runs/image-classification/{folder}"
        super().__init__(training, *instances)
        self.data = data
        self.check_inputs(data.fingerprint, teacher=teacher, ensemble_teachers=ensemble_teachers)

    # ---- training ----

    def train_on_labels(self, stage: str, model: ImageClassifier, epochs: float | None = None) -> ImageClassifier:
        """Trains `model` on the images with a label alone, or loads it if the stage is finished. It makes as many
        updates as a training on all images.
        """
        settings = {} if epochs is None else {"num_train_epochs": epochs}

        def train() -> ImageClassifier:
            return self.fit(stage, model, labels().objective, settings, on_labels=True)

        return self.stage(stage, train, read_stage, image_processor(self.data))

    def distill(
        self,
        stage: str,
        student: ImageClassifier,
        method: Method,
        teacher: nn.Module | TeacherOutputs,
        teacher_views: Path | None = None,
    ) -> ImageClassifier:
        """Trains `student` with a teacher, or its outputs by row, by `method`, or loads it if the stage is finished.

        `teacher_views`: folder of a cache of the teacher's logits for every view, for methods without features.
        """

        def train() -> ImageClassifier:
            source: dict[str, Any] = {"teacher_outputs": teacher}
            if isinstance(teacher, nn.Module):
                source = {
                    "teacher": frozen(teacher, self.args.precision),
                    "teacher_views": teacher_views and self.teacher_view_cache(teacher, teacher_views),
                    "teacher_features": method.teacher_features,
                }
            objective = method.for_labels(self.data.splits["train"].labels).objective
            return self.fit(stage, student, objective, features=method.features, **source)

        return self.stage(stage, train, read_stage, image_processor(self.data))

    def train_pair(
        self, name: str, description: str, distilled: Callable[["ImageRun", ImageClassifier], ImageClassifier]
    ) -> Models:
        """The control, on labels alone (None with --no_control), and the student, by `distilled`. Both start from the
        same weights of the architecture NAME.
        """

        def initial() -> ImageClassifier:
            set_seed(self.args.seed)
            return new_classifier(name, self.data.config)

        control = None if self.args.no_control else self.train_on_labels("control", initial())
        return {
            "control": (f"{name}, labels only", control),
            "student": (f"{name}, {description}", distilled(self, initial())),
        }

    def fit(
        self,
        stage: str,
        model: Model,
        objective: Objective | SideBySideObjective,
        settings: dict[str, Any] | None = None,
        validate: bool = True,
        on_labels: bool = False,
        **trainer: Any,
    ) -> Model:
        """Trains the model of a stage on augmented images, and resumes from its last checkpoint, if any.

        Args:
            settings: training arguments that differ in this stage from those of the run.
            validate: whether to log the accuracy on the validation images after each epoch.
            on_labels: whether to leave out images without a label.
            trainer: other arguments of KDTrainer.
        """
        device, splits = best_device(), self.data.splits
        return self.train(
            stage,
            model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            settings or {},
            objective=objective,
            samples=len(splits["train"]),
            train_dataset=self.training_views(device, on_labels),
            eval_dataset=self.data.views("validation", device) if validate and "validation" in splits else None,
            data_collator=identity_collate,
            compute_metrics=trainer_metrics,
            **trainer,
        )

    def training_views(self, device: torch.device, on_labels: bool = False) -> ImageViews:
        """The augmented training images, or those with a label."""
        strong, data = self.args.strong_augmentation, self.data.labelled_train() if on_labels else self.data
        return data.views("train", device, augment=True, seed=self.args.seed, strong=strong)

    def teacher_view_cache(self, teacher: nn.Module, folder: Path) -> TeacherViews:
        """The cache of the teacher's logits for every view. Call `validate_teacher_views` first."""
        data, views = self.data, self.training_views(torch.device("cpu"))
        assert isinstance(views, Views), "only views of small images are numbered"
        key = outputs_key(teacher, data.fingerprint, data.config, views.number_of_views, self.args.precision)
        return TeacherViews(folder, key, len(views), views.number_of_views, len(data.label_names))

    # ---- reports ----

    def evaluate_teacher(
        self,
        name: str,
        teacher: ImageClassifier | EnsembleTeacher,
        results: tuple[dict[str, Any], Logits] | None = None,
    ) -> tuple[dict[str, Any], Logits]:
        """`evaluate`, or its `results` if the teacher is evaluated already, with a warning if the teacher is no better
        than chance.
        """
        data, split = self.data, self.data.selection_split
        entry, logits = results or evaluate(name, teacher, data, workers=self.args.dataloader_num_workers)
        labels, accuracy = data.splits[split].labels.numpy(), entry["metrics"][split]["accuracy"]
        self.warn(classifier_warning(name, "accuracy", accuracy, labels, len(data.label_names), split))
        return entry, logits

    def report(
        self,
        method: str,
        models: Models,
        teacher: tuple[dict[str, Any], Logits] | None = None,
        auxiliary_parameters: int = 0,
        labels_only: bool = False,
        **others: Any,
    ) -> None:
        """Evaluates the models, writes the report and the student into the run's folder, and prints the table.

        Args:
            models: {role: (name, model)}; the model is None if the run does not have one.
            teacher: result of `evaluate_teacher`.
            auxiliary_parameters: number of parameters that were trained with the student and are not part of it.
            labels_only: whether the student was trained without a teacher.
            others: further entries of the results.
        """
        entries: dict[str, Any] = {} if teacher is None else {"teacher": teacher[0]}
        measurements = measure_columns(self.data) if teacher is None else {"teacher": measure(self.data, teacher[1])}
        teacher_logits, workers = None if teacher is None else teacher[1], self.args.dataloader_num_workers
        for role, (name, model) in models.items():
            entries[role] = None
            if model is not None:
                entries[role], logits = evaluate(name, model, self.data, teacher_logits, workers)
                measurements[role] = measure(self.data, logits)
        others |= {"auxiliary_parameters": auxiliary_parameters, "labels_only": labels_only}
        results = self.image_results(method, entries, measurements, **others)
        self.write_results(self.folder, results, models.get("student", ("", None))[1], self.history)
        if PartialState().is_main_process:
            self.show(results)

    def image_results(
        self, method: str, entries: dict[str, Any], measurements: Mapping[str, Measurement], **others: Any
    ) -> dict[str, Any]:
        """The content of results.json, with `others`. `entries`: results of `evaluate` by role, or None without such a
        model.
        """
        data, split = self.data, self.data.selection_split
        parts = {role: entry["parts"] for role, entry in entries.items() if entry and "parts" in entry}
        for name in ("keys", "bytes"):  # only with a bottleneck
            if found := {role: entry[name] for role, entry in entries.items() if entry and name in entry}:
                others[name] = found
        models = {
            role: entry and {name: value for name, value in entry.items() if name not in ("parts", "keys", "bytes")}
            for role, entry in entries.items()
        }
        sizes = {s: len(data.splits[s]) if s in data.splits else None for s in ("train", "validation", "test")}
        return self.results(
            domain="image-classification",
            task=data.name,
            method=method,
            data=sizes | {"fingerprint": data.fingerprint},
            models=models,
            split=split,
            metric="accuracy",
            measurements=measurements,
            chance=constant_score(data.splits[split].labels.numpy(), len(data.label_names), "accuracy"),
            selection=self.args.selection,
            data_notes="; ".join(data.notes) or "none",
            parameters_of_parts={role: part["parameters"] for role, part in parts.items()},
            flops_of_parts={role: part["flops"] for role, part in parts.items()},
            **others,
        )

    def write_results(
        self, folder: Path, results: dict[str, Any], student: ImageClassifier | None, history: dict[str, Any]
    ) -> None:
        """Writes the report, and the student with its model card, into a folder (in the main process)."""
        if PartialState().is_main_process:
            if student is not None:
                card = card_of(self, student, results.get("labels_only", False))
                save_student(folder / "student", student, results, card, image_processor(self.data))
            write_report(folder, results, history)


def validate_training(training: ImageTrainingArguments, data: ImageData) -> None:
    """Raises UserError for workers, views and batch sizes that do not fit the data."""
    if training.dataloader_num_workers and best_device().type == "cuda" and not isinstance(data, LargeImageData):
        raise UserError(
            "small images are on the GPU, which worker processes cannot use: pass --dataloader_num_workers 0"
        )
    if training.strong_augmentation:
        data.views("train", torch.device("cpu"), augment=True, strong=True)  # raises UserError if unsupported
    batch, images = training.per_device_train_batch_size * PartialState().num_processes, len(data.splits["train"])
    if training.dataloader_drop_last and images < batch:
        raise UserError(
            f"{images} training images do not fill a batch of {batch}: pass a smaller "
            "--per_device_train_batch_size, or --dataloader_drop_last false"
        )
    last = batch if training.dataloader_drop_last else images % batch or batch
    if last * training.views == 1:  # batch norms of pooled features need two samples
        raise UserError(
            f"{images} training images leave a last batch of one image, too small for batch norms: pass another "
            "--per_device_train_batch_size, or --dataloader_drop_last true"
        )


def validate_teacher_views(folder: Path, data: ImageData, training: ImageTrainingArguments) -> None:
    """Raises UserError if the folder of --teacher_views is not writable, or the views are not numbered."""
    check_writable(folder, "--teacher_views")
    if isinstance(data, LargeImageData) or training.strong_augmentation:
        raise UserError(
            "--teacher_views does not support large images and --strong_augmentation, whose views are not numbered: "
            "leave it out"
        )
