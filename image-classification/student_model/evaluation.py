"""Evaluation of image classifiers, the same during training and afterwards, and the report of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import BaseImageProcessor, CLIPImageProcessor, EvalPrediction, PreTrainedModel, ViTImageProcessor

from kd.common.metrics.cost import cost, flops, parameters
from kd.common.metrics.quality import (
    agreement,
    classification_metrics,
    classifier_warning,
    constant_score,
    top_k_accuracy,
)
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

Logits = dict[str, np.ndarray]  # split: (images, classes)


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
    """Logits (images, classes) of a split, in its order and always in fp32. `workers` decode large images."""

    def forward(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    outputs = run_inference(
        model,  # type: ignore[arg-type]
        forward,
        data.views(split, model.device),
        identity_collate,
        batch_size=250,
        description=f"evaluating {split}",
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
    """A model's entry in results.json, with its agreement with `teacher_logits`; and its logits."""
    logits = {split: predict(model, data, split, workers) for split in data.splits if split != "train"}
    metrics = {}
    for split, predictions in logits.items():
        metrics[split] = image_metrics(predictions, data.splits[split].labels.numpy())
        if teacher_logits is not None:
            metrics[split]["agreement"] = agreement(predictions, teacher_logits[split])
    image = data.views(data.selection_split, model.device).__getitems__([0])["pixel_values"]
    entry = {"name": name, **cost(model, {"pixel_values": image}), "metrics": metrics}
    if isinstance(model, ImageClassifier):
        entry["parts"] = cost_of_parts(model, image)
        if keys := getattr(model.config, "key_statistics", None):  # of a bottleneck
            entry["keys"] = keys
    return entry, logits


def cost_of_parts(model: ImageClassifier, image: torch.Tensor) -> dict[str, dict[str, int | None]]:
    """{"parameters": {part: number}, "flops": {part: number}} of backbone, projector and head."""
    with torch.no_grad():
        last, pooled = model.eval().backbone(image), model(image).features["pooled"]
    head_input = "embeddings" if model.config.bottleneck else "input"
    inputs = {"backbone": {"x": image}, "projector": {"x": last}, "head": {head_input: pooled}}
    parts = {name: part for name in inputs if (part := getattr(model, name)) is not None}
    return {
        "parameters": {name: parameters(part) for name, part in parts.items()},
        "flops": {name: flops(part, inputs[name]) for name, part in parts.items()},
    }


def evaluate_teacher(
    run: TrainerRun, name: str, teacher: ImageClassifier | EnsembleTeacher, data: ImageData
) -> tuple[dict[str, Any], Logits]:
    """`evaluate`, with a warning in the run if the teacher is no better than chance."""
    entry, logits = evaluate(name, teacher, data, workers=run.args.dataloader_num_workers)
    split = data.selection_split
    labels, accuracy = data.splits[split].labels.numpy(), entry["metrics"][split]["accuracy"]
    run.warn(classifier_warning(name, "accuracy", accuracy, labels, len(data.label_names), split))
    return entry, logits


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
    """Evaluates the models, writes the report and the student into the run's folder, and prints the table.

    Args:
        models: {role: (name, model)}; the model is None if the run has none.
        teacher: result of `evaluate_teacher`.
        auxiliary_parameters: number of parameters that were trained with the student and are not exported.
        labels_only: the student was trained without a teacher.
    """
    entries: dict[str, Any] = {} if teacher is None else {"teacher": teacher[0]}
    logits = None if teacher is None else teacher[1]
    for role, (name, model) in models.items():
        workers = run.args.dataloader_num_workers
        entries[role] = None if model is None else evaluate(name, model, data, logits, workers)[0]
    results = image_results(run, method, data, entries)
    results |= {"auxiliary_parameters": auxiliary_parameters, "labels_only": labels_only}
    write_results(run.folder, results, data, models.get("student", ("", None))[1], run.history)
    if PartialState().is_main_process:
        print_table(results)
        print(f"report: {run.folder / 'report.md'}")


def image_results(run: TrainerRun, method: str, data: ImageData, entries: dict[str, Any]) -> dict[str, Any]:
    """results.json of entries that `evaluate` returned, by role. An entry is None if the run has no such model."""
    parts = {role: entry["parts"] for role, entry in entries.items() if entry and "parts" in entry}
    keys = {role: entry["keys"] for role, entry in entries.items() if entry and "keys" in entry}
    extra: dict[str, Any] = {"keys": keys} if keys else {}
    models = {
        role: entry and {name: value for name, value in entry.items() if name not in ("parts", "keys")}
        for role, entry in entries.items()
    }
    splits = ("train", "validation", "test")
    sizes = {split: len(data.splits[split]) if split in data.splits else None for split in splits}
    return run.results(
        domain="image-classification",
        task=data.name,
        method=method,
        data=sizes | {"fingerprint": data.fingerprint},
        models=models,
        split=data.selection_split,
        metric="accuracy",
        chance=constant_score(data.splits[data.selection_split].labels.numpy(), len(data.label_names), "accuracy"),
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
        parameters_of_parts={role: part["parameters"] for role, part in parts.items()},
        flops_of_parts={role: part["flops"] for role, part in parts.items()},
        **extra,
    )


def write_results(
    folder: Path,
    results: dict[str, Any],
    data: ImageData,
    student: ImageClassifier | None,
    history: dict[str, Any],
) -> None:
    """Writes the report, and the student with its model card, into a folder (in the main process)."""
    if PartialState().is_main_process:
        if student is not None:
            place = folder / "student"
            save_student(place, student, results, USAGE.format(folder=place), image_processor(data))
        write_report(folder, results, history)


def image_processor(data: ImageData) -> BaseImageProcessor:
    """Resizes, crops and normalizes images as the evaluation of a classifier of `data` does."""
    size: dict[str, Any] = {"height": data.size, "width": data.size}
    channels: dict[str, Any] = {"image_mean": (data.mean * 3)[:3], "image_std": (data.std * 3)[:3]}  # grey: one value
    if isinstance(data, LargeImageData):
        shorter = {"shortest_edge": shorter_side(data.size)}
        return CLIPImageProcessor(size=shorter, crop_size=size, resample=Image.Resampling.BILINEAR, **channels)
    return ViTImageProcessor(size=size, resample=Image.Resampling.BILINEAR, **channels)
