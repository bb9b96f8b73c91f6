"""What a text model is worth: metrics per split, computed the same way during training, at its end and afterwards."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel

from kd.common.data.sources import print_notes
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import (
    agreement,
    choose_threshold,
    classification_metrics,
    classifier_warning,
    regression_metrics,
    regressor_warning,
    scope_metrics,
    threshold_metrics,
)
from kd.common.training.inference import NOT_INPUTS, Collate, run_inference
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.student_model import bottleneck_classifier  # noqa: F401 - registers the architecture with AutoModel...
from kd.nlp.teacher_model.teacher import labels_of


def text_metrics(data: TextData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of the task, out-of-scope figures included where the task has that class."""
    if data.regression:
        return regression_metrics(logits.reshape(-1), labels)
    return classification_metrics(logits, labels) | scope_metrics(logits, labels, data.label_names)


def trainer_metrics(data: TextData) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a transformers Trainer."""
    return lambda prediction: text_metrics(data, np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: PreTrainedModel, texts: Dataset, collate: Collate) -> np.ndarray:
    """Logits (texts, classes) in the order of the dataset. Always fp32: what a user gets who just loads the model."""

    def logits(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    return torch.stack(run_inference(model, logits, texts, collate, description="evaluating")["logits"]).numpy()


def evaluate(
    name: str,
    model: PreTrainedModel,
    data: TextData,
    splits: dict[str, Dataset],
    collate: Collate,
    teacher_logits: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model's entry in results.json, and its logits by split, with which a student's agreement is measured."""
    logits = {split: predict(model, rows, collate) for split, rows in splits.items() if split != "train"}
    metrics = metrics_by_split(data, logits, splits, teacher_logits)
    return {"name": name, **cost(model, one_text(splits, collate, model.device)), "metrics": metrics}, logits


def guessing(entry: dict[str, Any], data: TextData, splits: dict[str, Dataset]) -> str | None:
    """The warning where a measured teacher (its `entry`) is no better than chance."""
    name, split, metric = entry["name"], validation_split(splits), data.primary_metric
    metrics, labels = entry["metrics"][split], np.asarray(splits[split]["labels"])
    if data.regression:
        return regressor_warning(name, metrics, labels, metric, split)
    return classifier_warning(name, metric, metrics[metric], labels, data.num_labels, split)


def validation_split(splits: Iterable[str]) -> str:
    """The first, where there are several."""
    return next(name for name in splits if name.startswith("validation"))


def metrics_by_split(
    data: TextData,
    logits: dict[str, np.ndarray],
    splits: dict[str, Dataset],
    teacher_logits: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of logits by split. Where there are out-of-scope texts, also those with a threshold on the
    confidence: the (first) validation split chooses it, and without one there is no threshold. With `teacher_logits`
    the agreement.
    """
    labels = {split: np.asarray(splits[split]["labels"]) for split in logits}
    chooses = next((split for split in logits if split.startswith("validation")), None)
    threshold = choose_threshold(logits[chooses], labels[chooses], data.label_names) if chooses else None
    metrics = {split: text_metrics(data, scores, labels[split]) for split, scores in logits.items()}
    for split, scores in logits.items():
        if threshold is not None:
            metrics[split] |= threshold_metrics(scores, labels[split], data.label_names, threshold)
        if teacher_logits is not None and not data.regression:
            metrics[split]["agreement"] = agreement(scores, teacher_logits[split])
    return metrics


def one_text(splits: dict[str, Dataset], collate: Collate, device: torch.device) -> dict[str, torch.Tensor]:
    """A text of median length of the validation split, or of the one split there is: what latency and FLOPs are
    measured on.
    """
    rows = next((rows for split, rows in splits.items() if split.startswith("validation")), [*splits.values()][-1])
    middle = int(np.argsort(rows["length"], kind="stable")[len(rows) // 2])
    return {name: value.to(device) for name, value in collate([rows[middle]]).items() if name not in NOT_INPUTS}


# ---- data on which a saved classifier is measured ----


def load_data_of(model: str, args: Namespace) -> TextData:
    """The data of the flags with the labels of `model`, a folder or Hub name; no train split is needed. Prints what
    was inferred. Raises UserError where the data have other labels.
    """
    kind, labels = labels_of(model)
    data = load_text_data(args.dataset, args.text_columns, args.label_column, kind, labels, needs_train=False)
    print_notes(data.name, data.notes)
    return data
