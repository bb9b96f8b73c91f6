"""Class-incremental learning on a frozen encoder: tasks of a few classes each, one after another.

The protocol of Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240): the keys are fitted to
images without labels and frozen. Then only the values are trained, by SGD with the cross-entropy over all classes,
without task ids or masks. An image updates only the values that it fetches, so later tasks change few values of
earlier classes. The control is a linear probe, in which every image updates every weight. Counted values are not
trained: each task adds its labels to the counts, so that the order of the classes has no effect at all.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.training import embed_samples
from kd.common.pretrained import stage_loader
from kd.common.reporting.plots import OTHER_STYLES, PAPER, STYLES, save_figure
from kd.common.training.inference import identity_collate
from kd.common.training.run import Run
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.arguments import IncrementalArguments
from kd.image_classification.student_model.bottleneck import BottleneckProbe
from kd.image_classification.student_model.cards import card_of_probe
from kd.image_classification.student_model.evaluation import evaluate, image_processor, measure
from kd.image_classification.teacher_model.classifier import ImageClassifier

Tasks = list[list[int]]  # the class ids of each task, in training order
History = list[dict[str, Any]]
Scores = dict[str, float]  # number of classes seen (a string, the key of a JSON object) -> accuracy
read_stage = stage_loader(BottleneckProbe)


@dataclass(frozen=True)
class HeadInputs:
    """The cached inputs of a head (`BottleneckProbe.cache`, a row per image) and the labels (images,) by split.

    Accuracy is computed on the split `selection` during training, and on the split `report` after each task.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    selection: str
    report: str

    @classmethod
    def from_embeddings(cls, model: BottleneckProbe, embeddings: dict[str, Tensor], data: ImageData) -> "HeadInputs":
        return cls(
            {split: model.cache(embedded) for split, embedded in embeddings.items()},
            {split: images.labels for split, images in data.splits.items()},
            data.selection_split,
            "test" if "test" in data.splits else data.selection_split,
        )


@dataclass(frozen=True)
class HeadTraining:
    """An untrained head, its name in the report, its data, tasks and learning rate (unless it counts)."""

    name: str
    untrained: BottleneckProbe
    samples: HeadInputs
    tasks: Tasks  # a single task of all classes for i.i.d. training
    learning_rate: float


def split_tasks(data: ImageData, classes_per_task: int, seed: int) -> Tasks:
    """Shuffles the classes and splits them into tasks; the last task may be smaller. Raises UserError for too many
    classes per task, and for a class without images in a split.
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
    """Computes embeddings (images, width) of every split, on the CPU."""
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
    """Runs the stage `keys`: fits the keys of a new bottleneck to embeddings (images, width); its values are zero."""

    def fit() -> BottleneckProbe:
        return fit_keys(BottleneckProbe.from_encoder(encoder, data, args.bottleneck), embeddings, run.args.seed)

    return run.stage("keys", fit, read_stage, image_processor(data))


def trained_head(
    run: Run, data: ImageData, stage: str, head: HeadTraining, args: IncrementalArguments
) -> BottleneckProbe:
    """Trains a head on its tasks, or counts their labels, and adds its history to that of the run. Loads the stage if
    it is finished.
    """

    def train() -> BottleneckProbe:
        if head.untrained.is_counted:
            model, run.history[stage] = count_head(head)
        else:
            model, run.history[stage] = train_head(head, args.epochs_per_task, args.batch_size, run.args.seed)
        return model

    return run.stage(stage, train, read_stage, image_processor(data))


def train_head(head: HeadTraining, epochs: int, batch_size: int, seed: int) -> tuple[BottleneckProbe, History]:
    """Trains a copy of `head.untrained` on one task after another, for `epochs` epochs on the images of each.

    Uses SGD without momentum and weight decay, which would change values that no image of the task fetches. The
    history has an entry for each epoch of a task: the training loss, the accuracy on the selection split and, after
    the last epoch, the accuracy on the report split for the classes seen so far and for all classes. `epoch` in an
    entry counts in passes over all training images.
    """
    model, samples, labels = copy.deepcopy(head.untrained), head.samples, head.samples.labels["train"]
    model.to(best_device())  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=head.learning_rate)
    generator, samples_seen = torch.Generator().manual_seed(seed), 0
    history: History = []
    progress = tqdm(total=len(head.tasks) * epochs, desc=f"training {head.name}", leave=False)
    for of_task, classes_seen in _rows_of_tasks(head):
        for _ in range(epochs):
            rows = of_task[torch.randperm(len(of_task), generator=generator)]
            loss = _train_epoch(model, samples, rows.split(batch_size), optimizer)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {head.name} is {loss} in epoch {len(history) + 1}: lower its learning rate"
                )
            samples_seen += len(rows)
            entry = {"epoch": samples_seen / len(labels), "loss": loss, "classes_seen": len(classes_seen)}
            history.append(entry | {"eval_accuracy": accuracy(model, samples, samples.selection)})
            progress.update()
        history[-1] |= _accuracy_after_task(model, samples, classes_seen)
    progress.close()
    return model, history


def count_head(head: HeadTraining) -> tuple[BottleneckProbe, History]:
    """Counts the labels of one task after another in a copy of `head.untrained`. The history has an entry for each
    task, as that of `train_head` but without a loss.
    """
    model, samples, labels = copy.deepcopy(head.untrained), head.samples, head.samples.labels["train"]
    model.to(best_device())  # type: ignore[arg-type]
    history: History = []
    counted = 0
    for rows, classes_seen in _rows_of_tasks(head):
        model.bottleneck.add(samples.inputs["train"][rows].to(model.device), labels[rows].to(model.device))
        counted += len(rows)
        entry = {"epoch": counted / len(labels), "classes_seen": len(classes_seen)}
        entry["eval_accuracy"] = accuracy(model, samples, samples.selection)
        history.append(entry | _accuracy_after_task(model, samples, classes_seen))
    return model, history


def _rows_of_tasks(head: HeadTraining) -> Iterator[tuple[Tensor, list[int]]]:
    """The training rows of each task, and the classes seen with it."""
    for task, classes_seen in zip(head.tasks, accumulate(head.tasks), strict=True):
        yield torch.isin(head.samples.labels["train"], torch.tensor(task)).nonzero().flatten(), classes_seen


def _accuracy_after_task(model: BottleneckProbe, samples: HeadInputs, classes_seen: list[int]) -> dict[str, float]:
    classes = {"classes seen": classes_seen, "all classes": None}
    return {name: accuracy(model, samples, samples.report, chosen) for name, chosen in classes.items()}


def _train_epoch(
    model: BottleneckProbe, samples: HeadInputs, batches: tuple[Tensor, ...], optimizer: torch.optim.Optimizer
) -> float:
    """Takes an optimizer step for each batch of rows. Returns the mean loss over the images."""
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
    """Accuracy on the images of a split, or only on those of `classes`. Predictions are over all classes."""
    inputs, labels = samples.inputs[split], samples.labels[split]
    if classes is not None:
        rows = torch.isin(labels, torch.tensor(classes))
        inputs, labels = inputs[rows], labels[rows]
    predictions = torch.cat([model.classify(part).argmax(1).cpu() for part in inputs.split(8192)])
    return (predictions == labels).double().mean().item()


# ---- report ----


def report(
    run: Run, method: str, data: ImageData, heads: dict[str, HeadTraining], models: dict[str, BottleneckProbe]
) -> None:
    """Writes the student, results, curves and the plot of a run, and prints the results."""
    results = incremental_results(run, method, data, heads, models)
    plot_forgetting(run.folder / "forgetting.png", results)
    for name, scores in results["accuracy"].items():
        print(f"{name}: {', '.join(f'{split} accuracy {score:.4f}' for split, score in scores.items())}")
    run.finish(results, models["student"], card_of_probe(run), image_processor(data))
    print(f"plot:    {run.folder / 'forgetting.png'}")


def incremental_results(
    run: Run, method: str, data: ImageData, heads: dict[str, HeadTraining], models: dict[str, BottleneckProbe]
) -> dict[str, Any]:
    """The content of results.json for trained heads: `student`, `teacher`, `control` and others.

    In addition to the common schema, it contains the accuracy of all heads after each task, on the classes seen so far
    and on all classes. Heads trained i.i.d. are evaluated on the same classes.
    """
    student, vectors = heads["student"], heads["control"].samples.inputs["train"]
    keys = student.untrained.bottleneck.key_statistics(vectors.to(student.untrained.device))
    evaluations = {stage: evaluate(heads[stage].name, model, data) for stage, model in models.items()}  # on images
    entries = {stage: entry for stage, (entry, _) in evaluations.items()}
    sizes = {name: len(images) for name, images in data.splits.items()}
    one_by_one = {stage: head for stage, head in heads.items() if head.tasks == student.tasks}
    seen = {head.name: _after_each_task(run.history[stage], "classes seen") for stage, head in one_by_one.items()}
    seen |= {
        head.name: _on_the_same_classes(models[stage], head, student)
        for stage, head in heads.items()
        if stage not in one_by_one
    }
    return run.results(
        domain="image-classification",
        task=data.name,
        method=method,
        data={name: sizes.get(name) for name in ("train", "validation", "test")} | {"fingerprint": data.fingerprint},
        models={role: entries[role] for role in ("teacher", "control", "student")},
        split=data.selection_split,
        metric="accuracy",
        measurements={role: measure(data, evaluations[role][1]) for role in ("teacher", "control", "student")},
        selection="last epoch; no split chose anything",
        data_notes="; ".join(data.notes) or "none",
        order_of_classes=", ".join(data.label_names[c] for task in student.tasks for c in task),
        split_measured_after_each_task=student.samples.report,
        accuracy={e["name"]: {split: m["accuracy"] for split, m in e["metrics"].items()} for e in entries.values()},
        accuracy_of_classes_seen={head.name: seen[head.name] for head in heads.values()},
        accuracy_of_all_classes={
            head.name: _after_each_task(run.history[stage], "all classes") for stage, head in one_by_one.items()
        },
        keys={"fitted_to_unlabelled_images": len(vectors), **keys},
        seconds_of_stages=dict(run.seconds),
    )


def _after_each_task(history: History, name: str) -> Scores:
    return {str(entry["classes_seen"]): entry[name] for entry in history if name in entry}


def _on_the_same_classes(model: BottleneckProbe, head: HeadTraining, student: HeadTraining) -> Scores:
    split = head.samples.report
    return {str(len(seen)): accuracy(model, head.samples, split, seen) for seen in accumulate(student.tasks)}


def plot_forgetting(path: Path, results: dict[str, Any]) -> None:
    """Plots the accuracy on the classes seen so far against their number, a line for each head."""
    styles = [*(STYLES[role] for role in ("student", "teacher", "control")), *OTHER_STYLES]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(5.2, 3.4), dpi=200, layout="constrained")
        axes = figure.subplots()
        for (name, scores), style in zip(results["accuracy_of_classes_seen"].items(), styles, strict=False):
            colour, line, marker = style
            classes = [int(number) for number in scores]
            axes.plot(classes, list(scores.values()), line, color=colour, marker=marker, ms=4, lw=1.4, label=name)
        axes.set_xlabel(f"Classes of {results['task']} seen so far")
        axes.set_ylabel(f"{results['split_measured_after_each_task'].capitalize()} accuracy of these classes")
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False)
        save_figure(figure, path)
