"""One run on images: who is trained on what, as stages that can be resumed, and the report at the end."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, CLIPImageProcessor, ViTImageProcessor

from kd.common.methods import Method
from kd.common.objective import Objective, task_loss
from kd.common.pretrained import stage_loader
from kd.common.reporting.model_card import save_student
from kd.common.reporting.results import print_table, write_report
from kd.common.training.inference import as_it_is
from kd.common.training.run import TrainerRun
from kd.common.training.side_by_side import SideBySideObjective
from kd.common.training.teacher_outputs import outputs_key
from kd.common.training.teacher_views import TeacherViews
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.files import check_writable
from kd.image_classification.data.loading import ImageData, LargeImageData
from kd.image_classification.data.views import ImageViews, Views, shorter_side
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.evaluation import evaluate, guessing, trainer_metrics
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.folding import frozen
from kd.image_classification.teacher_model.teacher import given_teacher

Model = TypeVar("Model", bound=nn.Module)
read_stage = stage_loader(ImageClassifier)

USAGE = """from PIL import Image
from transformers import AutoImageProcessor
from kd.image_classification.teacher_model.classifier import ImageClassifier

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ImageClassifier.from_pretrained("{folder}").eval()
logits = model(**processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


class Experiment:
    """The stages of one run of `method` on `data`; `instances` are the script's other arguments, for the recipe."""

    def __init__(self, method: str, training: ImageTrainingArguments, data: ImageData, *instances: Any) -> None:
        if training.dataloader_num_workers and best_device().type == "cuda" and not isinstance(data, LargeImageData):
            raise UserError("small images lie on the GPU, out of reach of workers: pass --dataloader_num_workers 0")
        if training.strong_views:
            data.views("train", torch.device("cpu"), augment=True, strong=True)  # refuses what is not there
        batch, images = training.per_device_train_batch_size * PartialState().num_processes, len(data.splits["train"])
        if training.dataloader_drop_last and images < batch:
            raise UserError(
                f"{images} training images do not fill a batch of {batch}: pass a smaller "
                "--per_device_train_batch_size, or --dataloader_drop_last false"
            )
        last = batch if training.dataloader_drop_last else images % batch or batch
        if last * training.views == 1:  # those on pooled features would raise, those on maps see one image alone
            raise UserError(
                f"{images} training images leave a batch of a single one, too few for batch norms: pass another "
                "--per_device_train_batch_size, or --dataloader_drop_last true"
            )
        name = re.sub(r"[^\w-]+", "_", method)  # a method's settings have colons
        training.output_dir = training.output_dir or f"runs/image-classification/{name}"
        self.method, self.args, self.data = method, training, data
        self.measured: dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}  # by the teacher's id
        self.run = TrainerRun(training, *instances)
        self.run.check_inputs(data.fingerprint)

    def stage(
        self,
        name: str,
        build: Callable[[], Model],
        load: Callable[[str], Any] = read_stage,
    ) -> Model:
        """The model of a stage: loaded if the stage is finished, else built and saved."""
        return self.run.stage(name, build, load, image_processor(self.data))

    def fit(
        self,
        name: str,
        model: Model,
        objective: Objective | SideBySideObjective,
        epochs: float | None = None,
        watch: bool = True,
        **trainer: Any,
    ) -> Model:
        """Trains a stage's model on augmented views. `watch`: its accuracy on the validation images after each epoch
        goes into the curves; `trainer`: further arguments of KDTrainer.
        """
        device = best_device()
        return self.run.train(
            name,
            model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            {} if epochs is None else {"num_train_epochs": epochs},
            objective=objective,
            train_dataset=self._training_views(device),
            eval_dataset=self.data.views("validation", device) if watch and "validation" in self.data.splits else None,
            data_collator=as_it_is,
            compute_metrics=trainer_metrics,
            **trainer,
        )

    def _training_views(self, device: torch.device) -> ImageViews:
        return self.data.views("train", device, augment=True, seed=self.args.seed, strong=self.args.strong_views)

    def labels_only(
        self, name: str, build: Callable[[], ImageClassifier], epochs: float | None = None
    ) -> ImageClassifier:
        """A stage without a teacher: a teacher to be, or a control."""
        return self.stage(name, lambda: self.fit(name, build(), Objective(task=(1.0, task_loss())), epochs))

    def distill(
        self,
        teacher: ImageClassifier,
        build: Callable[[], ImageClassifier],
        method: Callable[[ImageClassifier], Method],
        views_folder: Path | None = None,
        stage: str = "student",
    ) -> ImageClassifier:
        """A stage with a teacher: what `build` makes, trained by the method made for it. `views_folder`: where a table
        of the teacher's logits per view is kept, for methods that need no more of it.
        """

        def build_and_fit() -> ImageClassifier:
            student = build()
            how = method(student)
            return self.fit(
                stage,
                student,
                how.objective,
                features=how.features,
                teacher=frozen(teacher, self.args.precision),
                teacher_views=views_folder and self.teacher_views(teacher, views_folder),
                teacher_features=how.teacher_features,
            )

        return self.stage(stage, build_and_fit)

    def teacher_views(self, teacher: ImageClassifier, folder: Path) -> TeacherViews:
        """The table of what a teacher says about each view of training images that `check_teacher_views` let pass."""
        views = self._training_views(torch.device("cpu"))
        assert isinstance(views, Views), "images whose views can be counted have these"
        key = outputs_key(teacher, self.data.fingerprint, self.data.config, views.number_of_views, self.args.precision)
        return TeacherViews(folder, key, len(views), views.number_of_views, len(self.data.label_names))

    def teacher(self, name: str, epochs: float | None, stage: str = "teacher") -> ImageClassifier:
        """A teacher that is given, in whose normalization the data are seen from here on, or a network of that
        architecture, trained on the labels.
        """
        given = given_teacher(name, self.data)
        if given is None:
            return self.labels_only(stage, lambda: new_classifier(name, self.data.config), epochs)
        teacher, self.data = given
        self.run.check_inputs(self.data.fingerprint, teacher=teacher)
        return teacher

    def measure(self, name: str, teacher: ImageClassifier) -> None:
        """Measures a teacher before it teaches, for the report, and warns where it is no better than guessing."""
        self.measured[id(teacher)] = evaluate(name, teacher, self.data, workers=self.args.dataloader_num_workers)
        self.run.warn(guessing(self.measured[id(teacher)][0], self.data))

    def report(
        self, parameters_beside: int = 0, labels_only: bool = False, **models: tuple[str, ImageClassifier] | None
    ) -> None:
        """Measures `teacher`, `control` and `student` (name, model), writes report and student, prints the table.
        `labels_only`: nobody taught the student.
        """
        entries: dict[str, Any] = {}
        said = None
        for role, given in models.items():
            if given is not None and id(given[1]) in self.measured:
                entries[role], said = self.measured[id(given[1])]
            elif given is not None:
                entries[role], logits = evaluate(*given, self.data, said, self.args.dataloader_num_workers)
                said = logits if role == "teacher" else said
        student = models.get("student")
        keys = {role: getattr(given[1].config, "key_statistics", None) for role, given in models.items() if given}
        extra = {"keys": {role: found for role, found in keys.items() if found}} if any(keys.values()) else {}
        results = self.write(
            self.run.folder,
            self.method,
            entries,
            student and student[1],
            self.run.history,
            parameters_trained_beside=parameters_beside,
            labels_only=labels_only,
            **extra,
        )
        if PartialState().is_main_process:
            print_table(results)
            print(f"report: {self.run.folder / 'report.md'}")

    def write(
        self,
        folder: Path,
        method: str,
        entries: dict[str, Any],
        student: ImageClassifier | None,
        history: dict[str, Any],
        **extra: Any,
    ) -> dict[str, Any]:
        """Writes the report of measured models (`entries`, by role) and the student into a folder."""
        results = self._results(method, entries) | extra
        if PartialState().is_main_process:
            if student is not None:
                place, processor = folder / "student", image_processor(self.data)
                save_student(place, student, results, USAGE.format(folder=place), processor)
            write_report(folder, results, history)
        return results

    def _results(self, method: str, entries: dict[str, Any]) -> dict[str, Any]:
        split = self.data.selection_split
        sizes = {name: len(images) for name, images in self.data.splits.items()}
        return self.run.results(
            domain="image-classification",
            task=self.data.name,
            method=method,
            data={name: sizes.get(name) for name in ("train", "validation", "test")}
            | {"fingerprint": self.data.fingerprint},
            models={role: entry and _without_parts(entry) for role, entry in entries.items()},
            split=split,
            metric="accuracy",
            selection=self.args.selection,
            data_notes="; ".join(self.data.notes) or "none",
            parameters_of_parts=_of_parts(entries, "parameters"),
            flops_of_parts=_of_parts(entries, "flops"),
        )


def check_teacher_views(folder: Path, data: ImageData, training: ImageTrainingArguments) -> None:
    """Raises UserError where the folder of --teacher_views cannot be written, and where views cannot be counted, so
    that a teacher's logits of them are no table.
    """
    check_writable(folder, "--teacher_views")
    if isinstance(data, LargeImageData) or training.strong_views:
        raise UserError(
            "views of large images and those of --strong_views cannot be counted, so there is no table of them: leave "
            "out --teacher_views"
        )


def _without_parts(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "parts"}


def _of_parts(entries: dict[str, Any], figure: str) -> dict[str, dict[str, int | None]]:
    return {
        role: {name: part[figure] for name, part in entry["parts"].items()}
        for role, entry in entries.items()
        if entry and "parts" in entry
    }


def image_processor(data: ImageData) -> BaseImageProcessor:
    """Makes pictures into what a classifier of `data` takes: resized, cut out where evaluation does, normalized."""
    size: dict[str, Any] = {"height": data.size, "width": data.size}
    channels: dict[str, Any] = {"image_mean": (data.mean * 3)[:3], "image_std": (data.std * 3)[:3]}  # one where grey
    if isinstance(data, LargeImageData):
        shorter = {"shortest_edge": shorter_side(data.size)}
        return CLIPImageProcessor(size=shorter, crop_size=size, resample=Image.Resampling.BILINEAR, **channels)
    return ViTImageProcessor(size=size, resample=Image.Resampling.BILINEAR, **channels)
