"""A discrete key-value bottleneck instead of the head of an image classifier."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd.common.bottleneck.training import Samples, train_bottleneck
from kd.common.methods import labels, labels_and_soft_targets
from kd.common.training.arguments import BottleneckArguments, CodebookSize, Keys
from kd.common.training.inference import identity_collate, run_inference
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.devices import best_device
from kd.common.utils.ranges import Positive
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.distillation import ImageRun, read_stage
from kd.image_classification.student_model.evaluation import image_processor, trainer_metrics
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig

VALUE_LEARNING_RATE = 3e-2
BATCH_SIZE = 250  # of the frozen networks


@dataclass
class ImageBottleneckArguments(BottleneckArguments):
    """Shape of the bottleneck, source of the student's keys, and training of the values."""

    codebook_size: CodebookSize = field(default=256, metadata={"help": "key-value pairs in a codebook"})
    value_epochs: Positive = field(default=20, metadata={"help": "epochs over the cached codes"})

    def value_settings(self, rate: float) -> dict[str, Any]:
        """Training arguments for the values: AdamW, whatever the convolutions are trained with."""
        return {
            "dataloader_drop_last": False,
            "optim": "adamw_torch",
            "optim_args": None,
            "weight_decay": 0.0,
            "lr_milestones": None,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
        } | super().value_settings(rate)


def with_bottleneck(encoder: ImageClassifier, shape: dict[str, Any]) -> ImageClassifier:
    """The same backbone and projector, copied, with an untrained bottleneck instead of the head."""
    config = ImageClassifierConfig(**{**encoder.config.to_dict(), "bottleneck": shape})
    model = ImageClassifier(config)
    weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def replace_head(
    run: ImageRun,
    data: ImageData,
    stage: str,
    encoder: ImageClassifier,
    arguments: ImageBottleneckArguments,
    keys: Keys,
    teacher: ImageClassifier | None = None,
) -> ImageClassifier:
    """A stage: a bottleneck instead of the head of a frozen classifier, trained, or loaded if the stage is finished.

    Keys are fitted without labels; then (unless they are `reused`) the values learn from labels, and from the soft
    targets of a `teacher`, whose bottleneck is the source of keys that are carried or reused.
    """
    args = run.args

    def train() -> ImageClassifier:
        method, outputs = labels(), None
        if teacher is not None and keys != "reused":
            method = labels_and_soft_targets(args.alpha, args.temperature)
            outputs = cached_logits(run, data, teacher)
        return train_bottleneck(
            run,
            stage,
            with_bottleneck(encoder, arguments.shape()),
            keys,
            None if teacher is None else teacher.bottleneck,
            arguments.value_settings(args.value_learning_rate or VALUE_LEARNING_RATE),
            _samples(data, "train"),
            _samples(data, "validation") if "validation" in data.splits else None,
            batch_size=BATCH_SIZE,
            objective=method.objective,
            teacher_outputs=outputs,
            compute_metrics=trainer_metrics,
        )

    return run.stage(stage, train, read_stage, image_processor(data))


def _samples(data: ImageData, split: str) -> Samples:
    labels = data.splits[split].labels
    return Samples(data.views(split, best_device()), identity_collate, labels, torch.arange(len(labels)))


def cached_logits(run: ImageRun, data: ImageData, teacher: ImageClassifier) -> TeacherOutputs:
    """The teacher's logits of the training images, without augmentation."""

    def logits(**batch: Tensor) -> dict[str, Tensor]:
        return {"logits": teacher(**batch).logits.float()}

    views = data.views("train", best_device())
    with run.timed("teacher_outputs"):
        outputs = run_inference(
            teacher, logits, views, identity_collate, run.args.precision, BATCH_SIZE, description="teacher"
        )
    return TeacherOutputs(torch.arange(len(views)), torch.stack(outputs["logits"]))
