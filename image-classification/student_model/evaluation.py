"""Measuring image classifiers, the same way in training, at its end and afterwards, and the report of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import BaseImageProcessor, CLIPImageProcessor, EvalPrediction, PreTrainedModel, ViTImageProcessor

from kd.common.metrics.cost import cost, flops, parameters
from kd.common.metrics.quality import agreement, classification_metrics, classifier_warning, top_k_accuracy
from kd.common.outputs import EnsembleTeacher
from kd.common.reporting.report import print_table, save_student, write_report
from kd.common.training.inference import identity_collate, run_inference
from kd.common.training.run import TrainerRun
from kd.image_classification.data.loading import ImageData, LargeImageData
from kd.image_classification.data.views import shorter_side
from kd.image_classification.teacher_model.classifier import ImageClassifier

USAGE = """from PIL import Image
from transformers import AutoImageProcessor
from kd.image_classification.teacher_model.classifier import ImageClassifier

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ImageClassifier.from_pretrained("{folder}").eval()
logits = model(**processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""

Logits = dict[str, np.ndarray]  # by split: (images, classes)


# ---- metrics ----


def image_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    metrics = classification_metrics(logits, labels)
    if logits.shape[1] > 10:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, 5)
    return metrics


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a transformers Trainer."""
    return image_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: PreTrainedModel | EnsembleTeacher, data: ImageData, split: str, workers: int = 0) -> np.ndarray:
    """Logits (images, classes) of a split in its order, always in fp32, as a user gets them who loads the model."""

    def logits(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    views, description = data.views(split, model.device), f"evaluating {split}"
    outputs = run_inference(
        model,  # type: ignore[arg-type]
        logits,
        views,
        identity_collate,
        batch_size=250,
        description=description,
        workers=workers,
    )
    return torch.stack(outputs["logits"]).numpy()


def evaluate(
    name: str,
    model: PreTrainedModel | EnsembleTeacher,
    data: ImageData,
    teacher_logits: Logits | None = None,
    workers: int = 0,
) -> tuple[dict[str, Any], Logits]:
    """A model's entry in results.json, and its logits, with which a student's agreement is measured.

    `workers`: processes that decode large images.
    """
    logits = {split: predict(model, data, split, workers) for split in data.splits if split != "train"}
    metrics = {}
    for split, found in logits.items():
        metrics[split] = image_metrics(found, data.splits[split].labels.numpy())
        if teacher_logits is not None:
            metrics[split]["agreement"] = agreement(found, teacher_logits[split])
    image = data.views(data.selection_split, model.device).__getitems__([0])["pixel_values"]
    entry = {"name": name, **cost(model, {"pixel_values": image}), "metrics": metrics}
    if not isinstance(model, ImageClassifier):
        return entry, logits
    entry["parts"] = parts(model, image)
    keys = getattr(model.config, "key_statistics", None)  # of a bottleneck
    return entry | ({"keys": keys} if keys else {}), logits


def evaluate_teacher(
    run: TrainerRun, name: str, teacher: ImageClassifier | EnsembleTeacher, data: ImageData
) -> tuple[dict[str, Any], Logits]:
    """`evaluate`, with a warning in the run where the teacher is no better than chance."""
    entry, logits = evaluate(name, teacher, data, workers=run.args.dataloader_num_workers)
    run.warn(chance_warning(entry, data))
    return entry, logits


def chance_warning(entry: dict[str, Any], data: ImageData) -> str | None:
    """The warning where a measured teacher (its `entry`) is no better than chance."""
    split = data.selection_split
    labels, accuracy = data.splits[split].labels.numpy(), entry["metrics"][split]["accuracy"]
    return classifier_warning(entry["name"], "accuracy", accuracy, labels, len(data.label_names), split)


def parts(model: ImageClassifier, image: torch.Tensor) -> dict[str, dict[str, int | None]]:
    """Parameters and FLOPs of backbone, projector and head, separately."""
    measured: dict[str, dict[str, int | None]] = {}
    with torch.no_grad():
        last = model.eval().backbone(image)
        inputs = {"backbone": image, "projector": last, "head": model(image).features["pooled"]}
    for name, value in inputs.items():
        part = getattr(model, name)
        if part is not None:
            measured[name] = {"parameters": parameters(part), "flops": flops(_Called(part), {"x": value})}
    return measured


class _Called(torch.nn.Module):
    """A module under keyword arguments, with which costs are measured."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs.values())


# ---- report ----


def report(
    run: TrainerRun,
    method: str,
    data: ImageData,
    models: Mapping[str, tuple[str, ImageClassifier | None]],
    teacher: tuple[dict[str, Any], Logits] | None = None,
    auxiliary_parameters: int = 0,
    labels_only: bool = False,
) -> None:
    """Evaluates models, writes report and student into the run's folder, and prints the table.

    Args:
        models: by role, their names and (unless there is none) they themselves.
        teacher: what `evaluate_teacher` returned.
        auxiliary_parameters: number of those that were trained with the student and do not ship.
        labels_only: the student had no teacher.
    """
    workers = run.args.dataloader_num_workers
    entries: dict[str, Any] = {} if teacher is None else {"teacher": teacher[0]}
    logits = None if teacher is None else teacher[1]
    for role, (name, model) in models.items():
        entries[role] = None if model is None else evaluate(name, model, data, logits, workers)[0]
    _, student = models.get("student", ("", None))
    results = image_results(run, method, data, entries)
    results |= {"auxiliary_parameters": auxiliary_parameters, "labels_only": labels_only}
    write_results(run.folder, results, data, student, run.history)
    if PartialState().is_main_process:
        print_table(results)
        print(f"report: {run.folder / 'report.md'}")


def image_results(run: TrainerRun, method: str, data: ImageData, entries: dict[str, Any]) -> dict[str, Any]:
    """The results.json of models that `evaluate` measured, by role."""
    measured = {role: entry for role, entry in entries.items() if entry}
    extra: dict[str, Any] = {}
    if keys := {role: entry["keys"] for role, entry in measured.items() if "keys" in entry}:
        extra["keys"] = keys
    split = data.selection_split
    sizes = {name: len(data.splits[name]) if name in data.splits else None for name in ("train", "validation", "test")}
    return run.results(
        domain="image-classification",
        task=data.name,
        method=method,
        data=sizes | {"fingerprint": data.fingerprint},
        models={role: entry and _without(entry, "parts", "keys") for role, entry in entries.items()},
        split=split,
        metric="accuracy",
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
        parameters_of_parts=_of_parts(measured, "parameters"),
        flops_of_parts=_of_parts(measured, "flops"),
        **extra,
    )


def write_results(
    folder: Path,
    results: dict[str, Any],
    data: ImageData,
    student: ImageClassifier | None,
    history: dict[str, Any],
) -> None:
    """In the main process: writes the report, and the student with its model card, into a folder."""
    if PartialState().is_main_process:
        if student is not None:
            place = folder / "student"
            save_student(place, student, results, USAGE.format(folder=place), image_processor(data))
        write_report(folder, results, history)


def _without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def _of_parts(entries: dict[str, Any], figure: str) -> dict[str, dict[str, int | None]]:
    return {
        role: {name: part[figure] for name, part in entry["parts"].items()}
        for role, entry in entries.items()
        if "parts" in entry
    }


def image_processor(data: ImageData) -> BaseImageProcessor:
    """Makes pictures into the inputs of a classifier of `data`: resized, cropped as in evaluation, normalized."""
    size: dict[str, Any] = {"height": data.size, "width": data.size}
    channels: dict[str, Any] = {"image_mean": (data.mean * 3)[:3], "image_std": (data.std * 3)[:3]}  # one where grey
    if isinstance(data, LargeImageData):
        shorter = {"shortest_edge": shorter_side(data.size)}
        return CLIPImageProcessor(size=shorter, crop_size=size, resample=Image.Resampling.BILINEAR, **channels)
    return ViTImageProcessor(size=size, resample=Image.Resampling.BILINEAR, **channels)
