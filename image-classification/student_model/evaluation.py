"""What an image classifier is worth: metrics per split, computed alike in training, at its end and afterwards."""

from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from kd.common.metrics.chance import classifier_warning
from kd.common.metrics.classification import agreement, classification_metrics, top_k_accuracy
from kd.common.metrics.cost import cost, flops, parameters
from kd.common.training.inference import identity_collate, run_inference
from kd.image_classification.data.loading import ImageData
from kd.image_classification.teacher_model.classifier import ImageClassifier


def image_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    metrics = classification_metrics(logits, labels)
    if logits.shape[1] > 10:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, 5)
    return metrics


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a transformers Trainer."""
    return image_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: ImageClassifier, data: ImageData, split: str, workers: int = 0) -> np.ndarray:
    """Logits (images, classes) of a split in its order. Always fp32: what a user gets who just loads the model."""

    def logits(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    views = data.views(split, model.device)
    said = run_inference(
        model, logits, views, identity_collate, batch_size=250, description=f"evaluating {split}", workers=workers
    )
    return torch.stack(said["logits"]).numpy()


def evaluate(
    name: str,
    model: ImageClassifier,
    data: ImageData,
    teacher_logits: dict[str, np.ndarray] | None = None,
    workers: int = 0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model's entry in results.json, and its logits by split, with which a student's agreement is measured.
    `workers`: processes that decode large images.
    """
    logits = {split: predict(model, data, split, workers) for split in data.splits if split != "train"}
    metrics = {}
    for split, said in logits.items():
        metrics[split] = image_metrics(said, data.splits[split].labels.numpy())
        if teacher_logits is not None:
            metrics[split]["agreement"] = agreement(said, teacher_logits[split])
    image = data.views(data.selection_split, model.device).__getitems__([0])["pixel_values"]
    entry = {"name": name, **cost(model, {"pixel_values": image}), "parts": parts(model, image), "metrics": metrics}
    return entry, logits


def guessing(entry: dict[str, Any], data: ImageData) -> str | None:
    """The warning where a measured teacher (its `entry`) is no better than guessing."""
    split = data.selection_split
    labels, accuracy = data.splits[split].labels.numpy(), entry["metrics"][split]["accuracy"]
    return classifier_warning(entry["name"], "accuracy", accuracy, labels, len(data.label_names), split)


def parts(model: ImageClassifier, image: torch.Tensor) -> dict[str, dict[str, int | None]]:
    """Parameters and FLOPs of backbone, projector and head, apart."""
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
    """A module under keyword arguments, which is how costs are measured."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs.values())
