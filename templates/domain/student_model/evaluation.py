"""Metrics of a classifier per split, computed alike during training, at its end and afterwards."""

from typing import Any

import datasets
import numpy as np
import torch
from transformers import EvalPrediction, default_data_collator

from kd.common.metrics.cost import cost
from kd.common.metrics.quality import agreement, classification_metrics, classifier_warning
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.example_domain.data.loading import LabelledData
from kd.example_domain.teacher_model.classifier import Classifier


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a transformers Trainer."""
    return classification_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: Classifier, rows: datasets.Dataset) -> np.ndarray:
    """Logits (samples, classes) in the order of the rows. Always fp32: what a user gets who just loads the model."""

    def logits(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits}

    return torch.stack(run_inference(model, logits, rows, default_data_collator, batch_size=256)["logits"]).numpy()


def evaluate(name: str, model: Classifier, data: LabelledData, teacher: Classifier | None = None) -> dict[str, Any]:
    """A model's entry in results.json: its cost, and its metrics on every split but train. With a `teacher`, also how
    often it decides as the teacher does.
    """
    metrics = {}
    for split, rows in data.splits.items():
        if split != "train":
            logits = predict(model, rows)
            metrics[split] = classification_metrics(logits, rows["labels"][:].numpy())
            if teacher is not None:
                metrics[split]["agreement"] = agreement(logits, predict(teacher, rows))
    sample = default_data_collator([data.splits["validation"][0]])
    inputs = {column: value.to(model.device) for column, value in sample.items() if column not in NOT_INPUTS}
    return {"name": name, **cost(model, inputs), "metrics": metrics}


def chance_warning(entry: dict[str, Any], data: LabelledData) -> str | None:
    """A warning where an evaluated model is no better than chance."""
    labels = data.splits["validation"]["labels"][:].numpy()
    accuracy = entry["metrics"]["validation"]["accuracy"]
    return classifier_warning(entry["name"], "accuracy", accuracy, labels, len(data.label_names))
