"""Classes that arrive one after another, never to be seen again, and how heads on a frozen encoder learn them.

The protocol of Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240): the keys are fitted to
images without labels and frozen; then values alone are trained, by SGD and softmax cross-entropy over all classes,
without task ids or masks. An image moves only the values that it fetches, which is why later classes leave most of
what was learned alone. A linear probe, whose every weight every image moves, is the contrast.
"""

import copy
import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.training.inference import identity_collate, run_inference
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Positive, Range, Seed
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.bottleneck_probe import PIXELS, BottleneckProbe

Tasks = list[list[int]]  # the class ids of each task, in the order of arrival
History = list[dict[str, Any]]


@dataclass
class IncrementalArguments:
    """The frozen encoder, the bottleneck behind it, and how the heads are trained.

    The defaults were chosen on MNIST's validation split. The rate of the values looks large because their gradients
    are divided by the batch and by the codebooks. A much larger one fits the classes of the moment better and forgets
    more; a tiny one leaves all probabilities alike, so that values merely count and the order no longer matters, not
    even to a linear probe.
    """

    encoder: str = field(default=PIXELS, metadata={"help": "pixels, or the folder of a trained image classifier"})
    codebooks: Count = field(default=64, metadata={"help": "how many heads look up a key each"})
    pairs: Annotated[int, Range(1, 2**16)] = field(default=256, metadata={"help": "key-value pairs per codebook"})
    key_dim: Count = field(default=32, metadata={"help": "width of a key, and of the random projection before it"})
    classes_per_task: Count = field(default=1, metadata={"help": "classes that arrive together"})
    order_seed: Seed | None = field(default=None, metadata={"help": "of the order of the classes; default: --seed"})
    value_learning_rate: Positive = field(default=50.0, metadata={"help": "SGD on the values"})
    probe_learning_rate: Positive = field(default=0.03, metadata={"help": "SGD on the linear probe"})
    epochs_per_task: Count = field(default=5, metadata={"help": "passes over a task's images before the next task"})
    batch_size: Count = 64

    @property
    def bottleneck(self) -> dict[str, int]:
        return {"codebooks": self.codebooks, "pairs": self.pairs, "key_dim": self.key_dim}


@dataclass(frozen=True)
class Samples:
    """By split: what a head is trained on (`BottleneckProbe.cache`; a row per image) and labels (images,).

    Training is watched on `selection` and reported on `report`.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    selection: str
    report: str

    @classmethod
    def of(cls, model: BottleneckProbe, embeddings: dict[str, Tensor], data: ImageData) -> "Samples":
        return cls(
            {split: model.cache(embedded) for split, embedded in embeddings.items()},
            {split: images.labels for split, images in data.splits.items()},
            data.selection_split,
            "test" if "test" in data.splits else data.selection_split,
        )


def arrival(data: ImageData, classes_per_task: int, seed: int) -> Tasks:
    """The classes in random order, cut into tasks; the last has what is left."""
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

    def embed(**batch: Tensor) -> dict[str, Tensor]:
        return {"embedding": model.embed(**batch)}

    embeddings = {}
    for split in data.splits:
        views = data.views(split, best_device())
        said = run_inference(model, embed, views, identity_collate, batch_size=250, description=f"embedding {split}")
        embeddings[split] = torch.stack(said["embedding"])
    return embeddings


def fit_keys(model: BottleneckProbe, embeddings: Tensor, seed: int) -> BottleneckProbe:
    """Fits the keys of a bottleneck to embeddings (images, width) and freezes them. No labels."""
    assert isinstance(model.head, DiscreteKeyValueBottleneck)
    head, device = model.head.to(best_device()), best_device()
    with tqdm(
        total=1, desc=f"fitting {head.codebooks} x {head.pairs} keys to {len(embeddings):,} images", leave=False
    ):
        head.fit_keys(embeddings.to(device), seed=seed)
    return model


def key_statistics(model: BottleneckProbe, embeddings: Tensor) -> dict[str, float]:
    """How many images the keys of a bottleneck were fitted to, and how well they cover their embeddings."""
    assert isinstance(model.head, DiscreteKeyValueBottleneck)
    statistics = model.head.key_statistics(embeddings.to(model.device))
    return {"fitted_to_unlabelled_images": len(embeddings), **statistics}


@dataclass(frozen=True)
class HeadTraining:
    """A head that knows nothing yet (and, for a report, its name), and what it is to learn in which order."""

    name: str
    empty: BottleneckProbe
    samples: Samples
    tasks: Tasks  # a single one of all classes: i.i.d.
    learning_rate: float


def train_head(plan: HeadTraining, epochs: int, batch_size: int, seed: int) -> tuple[BottleneckProbe, History]:
    """Trains a copy of `plan.empty` on one task after the other, `epochs` passes over the images of each.

    SGD without momentum or weight decay, which would move values that no image of the task fetches. The history has an
    entry per pass over a task, its `epoch` counted in passes over all training images: the training loss, accuracy on
    the selection split and, after the last pass, accuracy on the report split, of the classes seen so far and of all.
    """
    model, samples, labels = copy.deepcopy(plan.empty), plan.samples, plan.samples.labels["train"]
    model.to(best_device())  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=plan.learning_rate)
    generator, shown = torch.Generator().manual_seed(seed), 0
    history: list[dict[str, Any]] = []
    progress = tqdm(total=len(plan.tasks) * epochs, desc=f"training {plan.name}", leave=False)
    for task, seen in zip(plan.tasks, accumulate(plan.tasks), strict=True):
        of_task = torch.isin(labels, torch.tensor(task)).nonzero().flatten()
        for _ in range(epochs):
            rows = of_task[torch.randperm(len(of_task), generator=generator)]
            loss = _one_pass(model, samples, rows.split(batch_size), optimizer)
            if not math.isfinite(loss):
                raise UserError(f"the loss of {plan.name} is {loss} in pass {len(history) + 1}: lower its rate")
            shown += len(rows)
            entry = {"epoch": shown / len(labels), "loss": loss, "classes_seen": len(seen)}
            history.append(entry | {"eval_accuracy": accuracy(model, samples, samples.selection)})
            progress.update()
        for of, classes in (("classes seen", seen), ("all classes", None)):
            history[-1][of] = accuracy(model, samples, samples.report, classes)
    progress.close()
    return model, history


def _one_pass(
    model: BottleneckProbe, samples: Samples, batches: tuple[Tensor, ...], optimizer: torch.optim.Optimizer
) -> float:
    """A step per batch of rows; the mean loss of an image."""
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
def accuracy(model: BottleneckProbe, samples: Samples, split: str, classes: list[int] | None = None) -> float:
    """Share of a split's images (of those classes) whose largest logit, among all classes, is that of their label."""
    inputs, labels = samples.inputs[split], samples.labels[split]
    if classes is not None:
        rows = torch.isin(labels, torch.tensor(classes))
        inputs, labels = inputs[rows], labels[rows]
    said = torch.cat([model.classify(part).argmax(1).cpu() for part in inputs.split(8192)])
    return (said == labels).double().mean().item()
