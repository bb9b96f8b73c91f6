"""Training of image classifiers in a run: on labels alone, or with a teacher."""

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn

from kd.common.data.fingerprints import outputs_key
from kd.common.methods import Method, labels
from kd.common.objective import Objective
from kd.common.pretrained import stage_loader
from kd.common.training.inference import identity_collate
from kd.common.training.run import TrainerRun
from kd.common.training.side_by_side import SideBySideObjective
from kd.common.training.teacher_outputs import TeacherViews
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.files import check_writable
from kd.image_classification.data.loading import ImageData, LargeImageData
from kd.image_classification.data.views import ImageViews, Views
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.evaluation import image_processor, trainer_metrics
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen

Model = TypeVar("Model", bound=nn.Module)
read_stage = stage_loader(ImageClassifier)


class ImageRun(TrainerRun):
    """A run on images."""

    args: ImageTrainingArguments


def open_run(
    name: str,
    training: ImageTrainingArguments,
    data: ImageData,
    *instances: Any,
    kind: type[ImageRun] = ImageRun,
    teacher: nn.Module | None = None,
    ensemble_teachers: nn.Module | None = None,
) -> ImageRun:
    """Opens the folder of a run on `data`, by default `runs/image-classification/NAME`.

    `instances` are the script's other arguments, for the recipe; `teacher` and `ensemble_teachers` are pretrained.
    Raises UserError where the arguments do not fit the data, or a continued run began with other data or models.
    """
    validate_training(training, data)
    folder = re.sub(r"[^\w-]+", "_", name)  # a method with arguments contains colons
    training.output_dir = training.output_dir or f"runs/image-classification/{folder}"
    run = kind(training, *instances)
    run.check_inputs(data.fingerprint, teacher=teacher, ensemble_teachers=ensemble_teachers)
    return run


def validate_training(training: ImageTrainingArguments, data: ImageData) -> None:
    """Raises UserError for workers, views and batch sizes that do not fit the data."""
    if training.dataloader_num_workers and best_device().type == "cuda" and not isinstance(data, LargeImageData):
        raise UserError("workers cannot load small images, which lie on the GPU: pass --dataloader_num_workers 0")
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
            f"{images} training images leave a batch of a single one, too few for batch norms: pass another "
            "--per_device_train_batch_size, or --dataloader_drop_last true"
        )


def validate_teacher_views(folder: Path, data: ImageData, training: ImageTrainingArguments) -> None:
    """Raises UserError if the folder of --teacher_views is not writable, or the views are not countable."""
    check_writable(folder, "--teacher_views")
    if isinstance(data, LargeImageData) or training.strong_augmentation:
        raise UserError(
            "views of large images and those of --strong_augmentation cannot be counted, so no table can hold "
            "them: leave out --teacher_views"
        )


def train_on_labels(
    run: ImageRun, data: ImageData, stage: str, model: ImageClassifier, epochs: float | None = None
) -> ImageClassifier:
    """A stage without a teacher: trains `model` on the labels alone, or loads it if the stage is finished."""
    settings = {} if epochs is None else {"num_train_epochs": epochs}

    def train() -> ImageClassifier:
        return fit(run, data, stage, model, labels().objective, settings)

    return run.stage(stage, train, read_stage, image_processor(data))


def distill(
    run: ImageRun,
    data: ImageData,
    stage: str,
    student: ImageClassifier,
    method: Method,
    teacher: nn.Module,
    teacher_views: Path | None = None,
) -> ImageClassifier:
    """A stage with a teacher: trains `student` with `method`, or loads it if the stage is finished.

    `teacher_views`: folder for a table of the teacher's logits of each view, for methods that need no features.
    """

    def train() -> ImageClassifier:
        return fit(
            run,
            data,
            stage,
            student,
            method.objective,
            features=method.features,
            teacher=frozen(teacher, run.args.precision),
            teacher_views=teacher_views and views_table(run, data, teacher, teacher_views),
            teacher_features=method.teacher_features,
        )

    return run.stage(stage, train, read_stage, image_processor(data))


def fit(
    run: ImageRun,
    data: ImageData,
    stage: str,
    model: Model,
    objective: Objective | SideBySideObjective,
    settings: dict[str, Any] | None = None,
    validate: bool = True,
    **trainer: Any,
) -> Model:
    """Trains the model of a stage on augmented images, starting from its last checkpoint.

    Args:
        settings: training arguments of this stage that differ from the run's.
        validate: log the accuracy on the validation images after each epoch.
        trainer: other arguments of KDTrainer.
    """
    device = best_device()
    return run.train(
        stage,
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        settings or {},
        objective=objective,
        train_dataset=training_views(run, data, device),
        eval_dataset=data.views("validation", device) if validate and "validation" in data.splits else None,
        data_collator=identity_collate,
        compute_metrics=trainer_metrics,
        **trainer,
    )


def training_views(run: ImageRun, data: ImageData, device: torch.device) -> ImageViews:
    """The augmented training images."""
    return data.views("train", device, augment=True, seed=run.args.seed, strong=run.args.strong_augmentation)


def views_table(run: ImageRun, data: ImageData, teacher: nn.Module, folder: Path) -> TeacherViews:
    """The table of the teacher's logits of each view. Call `validate_teacher_views` first."""
    views = training_views(run, data, torch.device("cpu"))
    assert isinstance(views, Views), "only these views are countable"
    key = outputs_key(teacher, data.fingerprint, data.config, views.number_of_views, run.args.precision)
    return TeacherViews(folder, key, len(views), views.number_of_views, len(data.label_names))
