"""Classes that arrive one after another, never to be seen again, and how heads on a frozen encoder learn them.

The protocol of Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240): the keys are fitted to
images without labels and frozen; then values alone are trained, by SGD and softmax cross-entropy over all classes,
without task ids or masks. An image updates only the values that it fetches, so later classes leave most of what was
learned unchanged. A linear probe, whose every weight every image updates, is the contrast.
"""

import copy
import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.training import embed_samples
from kd.common.pretrained import stage_loader
from kd.common.training.arguments import CodebookSize
from kd.common.training.inference import identity_collate
from kd.common.training.run import Run
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Positive, Seed
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.bottleneck_probe import PIXELS, BottleneckProbe
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.teacher_model.classifier import ImageClassifier

Tasks = list[list[int]]  # the class ids of each task, in the order of arrival
History = list[dict[str, Any]]
read_stage = stage_loader(BottleneckProbe)


@dataclass
class IncrementalArguments:
    """The frozen encoder, the bottleneck after it, and the training of the heads.

    The defaults were chosen on MNIST's validation split. The learning rate of the values looks large because their
    gradients are divided by the batch and by the codebooks. A much larger one fits the classes of the moment better
    and forgets more; a tiny one leaves all probabilities alike, so that values merely count and the order no longer
    matters, not even to a linear probe.
    """

    encoder: str = field(default=PIXELS, metadata={"help": "pixels, or the folder of a trained image classifier"})
    codebooks: Count = field(default=64, metadata={"help": "how many heads look up a key each"})
    codebook_size: CodebookSize = field(default=256, metadata={"help": "key-value pairs per codebook"})
    key_dim: Count = field(default=32, metadata={"help": "width of a key, and of the random projection before it"})
    classes_per_task: Count = field(default=1, metadata={"help": "classes that arrive together"})
    order_seed: Seed | None = field(default=None, metadata={"help": "of the order of the classes; default: --seed"})
    value_learning_rate: Positive = field(default=50.0, metadata={"help": "SGD on the values"})
    probe_learning_rate: Positive = field(default=0.03, metadata={"help": "SGD on the linear probe"})
    epochs_per_task: Count = field(default=5, metadata={"help": "passes over a task's images before the next task"})
    batch_size: Count = 64

    @property
    def bottleneck(self) -> dict[str, int]:
        return {"codebooks": self.codebooks, "codebook_size": self.codebook_size, "key_dim": self.key_dim}


@dataclass(frozen=True)
class HeadInputs:
    """By split: the cached inputs of a head (`BottleneckProbe.cache`; a row per image) and labels (images,).

    Accuracy is measured on `selection` during training, and reported on `report`.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    selection: str
    report: str

    @classmethod
    def of(cls, model: BottleneckProbe, embeddings: dict[str, Tensor], data: ImageData) -> "HeadInputs":
        return cls(
            {split: model.cache(embedded) for split, embedded in embeddings.items()},
            {split: images.labels for split, images in data.splits.items()},
            data.selection_split,
            "test" if "test" in data.splits else data.selection_split,
        )


@dataclass(frozen=True)
class HeadTraining:
    """An untrained head (and its name in the report), and what it learns in which order."""

    name: str
    untrained: BottleneckProbe
    samples: HeadInputs
    tasks: Tasks  # a single one of all classes: i.i.d.
    learning_rate: float


def arrival(data: ImageData, classes_per_task: int, seed: int) -> Tasks:
    """The classes in random order, split into tasks; the last has the remainder. Raises UserError for too many classes
    per task, and where a split has no image of a class.
    """
    names = data.label_names
    if classes_per_task > len(names):
        raise UserError(
            f"--classes_per_task must be at most the {len(names)} classes of {data.name}, got {classes_per_task}"
        )
    for split, images in data.splits.items():
        missing = sorted(set(range(len(names))) - set(images.labels.tolist()))
        if missing:
            raise UserError(f"the {split} split has no image of class {names[missing[0]]!r}: every class needs one")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [task.tolist() for task in order.split(classes_per_task)]


def embed_images(model: BottleneckProbe, data: ImageData) -> dict[str, Tensor]:
    """Embeddings (images, width) of every split, on the CPU."""
    views = {split: data.views(split, best_device()) for split in data.splits}
    return {split: torch.stack(embed_samples(model, v, identity_collate, "fp32", 250)) for split, v in views.items()}


def fit_keys(model: BottleneckProbe, embeddings: Tensor, seed: int) -> BottleneckProbe:
    """Fits the keys of a bottleneck to embeddings (images, width), without labels, and freezes them."""
    head = model.bottleneck.to(best_device())
    title = f"fitting {head.codebooks} x {head.codebook_size} keys to {len(embeddings):,} images"
    with tqdm(total=1, desc=title, leave=False):
        head.fit_keys(embeddings.to(best_device()), seed=seed)
    return model


# ---- stages ----


def fitted_bottleneck(
    run: Run, encoder: ImageClassifier | None, data: ImageData, args: IncrementalArguments, embeddings: Tensor
) -> BottleneckProbe:
    """The stage `keys`: a bottleneck with keys fitted to embeddings (images, width), and values of zero."""

    def fit() -> BottleneckProbe:
        return fit_keys(BottleneckProbe.around(encoder, data, args.bottleneck), embeddings, run.args.seed)

    return run.stage("keys", fit, read_stage, image_processor(data))


def trained_head(
    run: Run, data: ImageData, stage: str, head: HeadTraining, args: IncrementalArguments
) -> BottleneckProbe:
    """A stage: a head trained on its tasks; its history is kept in the run."""

    def train() -> BottleneckProbe:
        model, run.history[stage] = train_head(head, args.epochs_per_task, args.batch_size, run.args.seed)
        return model

    return run.stage(stage, train, read_stage, image_processor(data))


def train_head(head: HeadTraining, epochs: int, batch_size: int, seed: int) -> tuple[BottleneckProbe, History]:
    """Trains a copy of `head.untrained` on one task after the other, `epochs` passes over the images of each.

    SGD without momentum or weight decay, which would move values that no image of the task fetches. The history has an
    entry per pass over a task, its `epoch` counted in passes over all training images: the training loss, accuracy on
    the selection split and, after the last pass, accuracy on the report split, of the classes seen so far and of all.
    """
    model, samples, labels = copy.deepcopy(head.untrained), head.samples, head.samples.labels["train"]
    model.to(best_device())  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=head.learning_rate)
    generator, samples_seen = torch.Generator().manual_seed(seed), 0
    history: History = []
    progress = tqdm(total=len(head.tasks) * epochs, desc=f"training {head.name}", leave=False)
    for task, classes_seen in zip(head.tasks, accumulate(head.tasks), strict=True):
        of_task = torch.isin(labels, torch.tensor(task)).nonzero().flatten()
        for _ in range(epochs):
            rows = of_task[torch.randperm(len(of_task), generator=generator)]
            loss = _train_epoch(model, samples, rows.split(batch_size), optimizer)
            if not math.isfinite(loss):
                raise UserError(f"the loss of {head.name} is {loss} in pass {len(history) + 1}: lower its rate")
            samples_seen += len(rows)
            entry = {"epoch": samples_seen / len(labels), "loss": loss, "classes_seen": len(classes_seen)}
            history.append(entry | {"eval_accuracy": accuracy(model, samples, samples.selection)})
            progress.update()
        for name, classes in (("classes seen", classes_seen), ("all classes", None)):
            history[-1][name] = accuracy(model, samples, samples.report, classes)
    progress.close()
    return model, history


def _train_epoch(
    model: BottleneckProbe, samples: HeadInputs, batches: tuple[Tensor, ...], optimizer: torch.optim.Optimizer
) -> float:
    """A step per batch of rows; returns the mean loss of an image."""
    total = torch.zeros((), device=model.device)
    for rows in batches:
        labels = samples.labels["train"][rows].to(model.device)
        loss = F.cross_entropy(model.classify(samples.inputs["train"][rows]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return total.item() / sum(map(len, batches))


@torch.no_grad()
def accuracy(model: BottleneckProbe, samples: HeadInputs, split: str, classes: list[int] | None = None) -> float:
    """Accuracy on a split's images (of those `classes`), predicted among all classes."""
    inputs, labels = samples.inputs[split], samples.labels[split]
    if classes is not None:
        rows = torch.isin(labels, torch.tensor(classes))
        inputs, labels = inputs[rows], labels[rows]
    predictions = torch.cat([model.classify(part).argmax(1).cpu() for part in inputs.split(8192)])
    return (predictions == labels).double().mean().item()
