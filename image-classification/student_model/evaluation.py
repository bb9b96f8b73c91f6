"""Evaluation of image classifiers, with the same metrics during and after training."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, CLIPImageProcessor, EvalPrediction, PreTrainedModel, ViTImageProcessor

from kd.common.bottleneck.sizes import sizes
from kd.common.metrics.cost import cost, flops, parameters
from kd.common.metrics.quality import agreement, calibration_metrics, classification_metrics, top_k_accuracy
from kd.common.metrics.verdict import Measurement, measure_classes
from kd.common.outputs import EnsembleTeacher
from kd.common.reporting.saved_models import class_predictions
from kd.common.training.inference import identity_collate, run_inference
from kd.common.training.teacher_columns import has_output
from kd.image_classification.data.image_data import ImageData, LargeImageData
from kd.image_classification.teacher_model.classifier import ImageClassifier

Logits = dict[str, np.ndarray]  # {split: (images, classes)}


def image_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    metrics = classification_metrics(logits, labels)
    if logits.shape[1] > 10:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, 5)
    return metrics


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a transformers Trainer."""
    return image_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: PreTrainedModel | EnsembleTeacher, data: ImageData, split: str, workers: int = 0) -> np.ndarray:
    """Logits (images, classes) of a split in fp32, in its order. `workers`: processes that decode large images."""

    def forward(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    outputs = run_inference(
        model,
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
    """Returns the entry of a model in results.json, with its agreement with `teacher_logits`, and its logits."""
    logits = {split: predict(model, data, split, workers) for split in data.splits if split != "train"}
    metrics = {}
    for split, predictions in logits.items():
        labels = data.splits[split].labels.numpy()
        metrics[split] = image_metrics(predictions, labels) | calibration_metrics(predictions, labels)
        if teacher_logits is not None:
            metrics[split]["agreement"] = agreement(predictions, teacher_logits[split])
    image = data.views(data.selection_split, model.device).__getitems__([0])["pixel_values"]
    entry = {"name": name, **cost(model, {"pixel_values": image}), "metrics": metrics}
    if isinstance(model, ImageClassifier):
        entry["parts"] = cost_of_parts(model, image)
        if keys := getattr(model.config, "key_statistics", None):  # only with a bottleneck
            entry |= {"keys": keys, "bytes": sizes(model)}
    return entry, logits


def prediction_columns(data: ImageData, logits: Logits) -> dict[str, dict[str, list[Any]]]:
    """The columns of `write_predictions` by split. `row` is the row of the split, or that of train if the split was
    set aside from it.
    """
    return {
        split: data.places[split] | class_predictions(scores, data.splits[split].labels.numpy(), data.label_names)
        for split, scores in logits.items()
    }


def measure(data: ImageData, logits: Logits) -> Measurement:
    """The accuracy on the selection split, as a Measurement for bootstrap intervals."""
    split = data.selection_split
    return measure_classes(logits[split], data.splits[split].labels.numpy())


def measure_columns(data: ImageData) -> dict[str, Measurement]:
    """The measurement of the teacher in the columns of the data, if all images of the split have an output."""
    logits = data.teacher.logits.get(data.selection_split) if data.teacher else None
    if logits is None or not has_output(logits).all():
        return {}
    return {"teacher": measure(data, {data.selection_split: logits})}


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


def image_processor(data: ImageData) -> BaseImageProcessor:
    """Resizes, crops and normalizes images as the evaluation of a classifier of `data` does."""
    size: dict[str, Any] = {"height": data.size, "width": data.size}
    channels: dict[str, Any] = {"image_mean": (data.mean * 3)[:3], "image_std": (data.std * 3)[:3]}  # grey: one value
    if isinstance(data, LargeImageData):
        from kd.image_classification.data.large_views import shorter_side

        shorter = {"shortest_edge": shorter_side(data.size)}
        return CLIPImageProcessor(size=shorter, crop_size=size, resample=Image.Resampling.BILINEAR, **channels)
    return ViTImageProcessor(size=size, resample=Image.Resampling.BILINEAR, **channels)
