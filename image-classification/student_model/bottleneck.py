"""A discrete key-value bottleneck in place of a classifier's head: its keys, then its values, on cached codes."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from kd.common.bottleneck.codes import CodeDataset, Keys, set_keys
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import reject_unused
from kd.common.objective import Objective, labels_and_soft_targets, task_loss
from kd.common.training.inference import identity_collate, run_inference
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Positive, Range
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.distillation import ImageRun, read_stage
from kd.image_classification.student_model.evaluation import image_processor, trainer_metrics
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig


@dataclass
class BottleneckShape:
    """Arguments of the bottleneck."""

    codebooks: Count = 32
    pairs: Annotated[int, Range(1, 2**16)] = field(default=256, metadata={"help": "key-value pairs in a codebook"})
    split: Literal["segment", "projection"] = "segment"
    key_dim: Count | None = field(default=None, metadata={"help": "width of a key under the projection split"})
    decoder: Literal["linear", "mean"] = "linear"
    value_dim: Count = field(default=16, metadata={"help": "width of a value for the linear decoder"})

    def check_unused_flags(self) -> None:
        if self.split == "segment":
            reject_unused("a key of --split segment is as wide as a segment", self, "key_dim")
        if self.decoder == "mean":
            reject_unused("a value of --decoder mean is as wide as there are labels", self, "value_dim")

    def check(self, width: int) -> None:
        """Raises UserError for a shape that embeddings of that width cannot have."""
        try:
            with torch.device("meta"):
                DiscreteKeyValueBottleneck(width, 1, **asdict(self))
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass
class ValueArguments:
    """How values are trained."""

    value_epochs: Positive = field(default=20, metadata={"help": "epochs over the cached codes"})
    value_batch_size: Count = 256

    def settings(self, rate: float) -> dict[str, Any]:
        """The stage's training arguments: AdamW, whatever the convolutions were trained with."""
        return {
            "num_train_epochs": self.value_epochs,
            "per_device_train_batch_size": self.value_batch_size,
            "dataloader_drop_last": False,
            "optim": "adamw_torch",
            "optim_args": None,
            "weight_decay": 0.0,
            "lr_milestones": None,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "learning_rate": rate / 10,  # of the decoder, which every image moves; a value waits for its key
            "value_learning_rate": rate,
        }


VALUE_LEARNING_RATE = 3e-2


def with_bottleneck(encoder: ImageClassifier, shape: BottleneckShape) -> ImageClassifier:
    """The same backbone and projector, copied, with an empty bottleneck in place of the head."""
    config = ImageClassifierConfig(**{**encoder.config.to_dict(), "bottleneck": asdict(shape)})
    model = ImageClassifier(config)
    weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def fill(
    run: ImageRun,
    data: ImageData,
    name: str,
    encoder: ImageClassifier,
    shape: BottleneckShape,
    values: ValueArguments,
    keys: Keys,
    teacher: ImageClassifier | None = None,
) -> ImageClassifier:
    """A stage: the bottleneck after a frozen encoder, trained, or loaded where the stage is finished.

    Keys are fitted without labels, then (unless they are `reused`) values on labels, and on the soft targets of a
    teacher, whose bottleneck may give the keys.
    """

    def train() -> ImageClassifier:
        return _train_bottleneck(run, data, name, encoder, shape, values, keys, teacher)

    return run.stage(name, train, read_stage, image_processor(data))


def _train_bottleneck(
    run: ImageRun,
    data: ImageData,
    name: str,
    encoder: ImageClassifier,
    shape: BottleneckShape,
    values: ValueArguments,
    keys: Keys,
    teacher: ImageClassifier | None,
) -> ImageClassifier:
    args = run.args
    model = with_bottleneck(encoder, shape).to(best_device())  # type: ignore[arg-type]
    embeddings = {s: embed(model, data, s, args.precision) for s in ("train", "validation") if s in data.splits}
    head = model.head
    assert isinstance(head, DiscreteKeyValueBottleneck)
    before = teacher.head if teacher is not None else None
    assert before is None or isinstance(before, DiscreteKeyValueBottleneck)
    model.config.key_statistics = set_keys(head, keys, before, embeddings["train"], args.seed)
    if keys == "reused":
        return model
    codes = {
        split: CodeDataset(list(head.encode(rows).cpu()), data.splits[split].labels, torch.arange(len(rows)))
        for split, rows in embeddings.items()
    }
    objective = Objective(task=(1.0, task_loss()))
    if teacher is not None:
        objective = labels_and_soft_targets(args.alpha, args.temperature)
    return run.train(
        name,
        model,
        values.settings(args.value_learning_rate or VALUE_LEARNING_RATE),
        objective=objective,
        teacher_outputs=None if teacher is None else listen(teacher, run, data),
        train_dataset=codes["train"],
        eval_dataset=codes.get("validation"),
        data_collator=identity_collate,
        compute_metrics=trainer_metrics,
    )


def embed(model: ImageClassifier, data: ImageData, split: str, precision: str) -> Tensor:
    """What the head sees of each image of a split (images, width), on the device."""

    def pooled(**batch: Tensor) -> dict[str, Tensor]:
        return {"pooled": model.last_map(**batch).mean((2, 3)).float()}

    views = data.views(split, best_device())
    said = run_inference(
        model, pooled, views, identity_collate, precision, batch_size=250, description=f"embedding {split}"
    )
    return torch.stack(said["pooled"]).to(best_device())


def listen(teacher: ImageClassifier, run: ImageRun, data: ImageData) -> TeacherOutputs:
    """The teacher's logits of the training images as they are."""

    def logits(**batch: Tensor) -> dict[str, Tensor]:
        return {"logits": teacher(**batch).logits.float()}

    views, precision = data.views("train", best_device()), run.args.precision
    with run.timed("teacher_outputs"):
        said = run_inference(
            teacher, logits, views, identity_collate, precision, batch_size=250, description="teacher"
        )
    return TeacherOutputs(torch.arange(len(views)), torch.stack(said["logits"]))
