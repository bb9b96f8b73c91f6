"""Evaluation of text classifiers and regressions: metrics per split, the same during training and afterwards."""

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
from kd.nlp.data.loading import TextData, Texts, load_text_data
from kd.nlp.student_model import bottleneck_classifier  # noqa: F401 - registers the architecture with AutoModel...
from kd.nlp.teacher_model.teacher import labels_of

Logits = dict[str, np.ndarray]  # (texts, classes) by split


def text_metrics(data: TextData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of the task, including those of out-of-scope texts if the data have that class."""
    if data.regression:
        return regression_metrics(logits.reshape(-1), labels)
    return classification_metrics(logits, labels) | scope_metrics(logits, labels, data.label_names)


def trainer_metrics(data: TextData) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a transformers Trainer."""
    return lambda prediction: text_metrics(data, np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def evaluate(
    name: str, model: PreTrainedModel, texts: Texts, teacher_logits: Logits | None = None
) -> tuple[dict[str, Any], Logits]:
    """A model's entry in results.json, and its logits. The entry has the agreement with `teacher_logits`."""
    logits = predict_splits(model, texts)
    metrics = metrics_by_split(texts, logits, teacher_logits)
    return {"name": name, **cost(model, median_text(texts, model.device)), "metrics": metrics}, logits


def predict_splits(model: Any, texts: Texts) -> Logits:
    """Logits of every split but train."""
    return {split: predict(model, rows, texts.collate) for split, rows in texts.splits.items() if split != "train"}


def predict(model: PreTrainedModel, rows: Dataset, collate: Collate) -> np.ndarray:
    """Logits (texts, classes) of each row. Always in fp32, as for a user who loads the model."""

    def call(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    return torch.stack(run_inference(model, call, rows, collate, description="evaluating")["logits"]).numpy()


def metrics_by_split(
    texts: Texts, logits: Logits, teacher_logits: Logits | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of the logits by split, including the agreement with `teacher_logits`.

    If the data have out-of-scope texts, this includes metrics with a confidence threshold. The first validation split
    chooses the threshold; without a validation split there is none.
    """
    data = texts.data
    labels = {split: np.asarray(texts.splits[split]["labels"]) for split in logits}
    chooses = next((split for split in logits if split.startswith("validation")), None)
    threshold = choose_threshold(logits[chooses], labels[chooses], data.label_names) if chooses else None
    metrics = {split: text_metrics(data, scores, labels[split]) for split, scores in logits.items()}
    for split, scores in logits.items():
        if threshold is not None:
            metrics[split] |= threshold_metrics(scores, labels[split], data.label_names, threshold)
        if teacher_logits is not None and not data.regression:
            metrics[split]["agreement"] = agreement(scores, teacher_logits[split])
    return metrics


def chance_warning(entry: dict[str, Any], texts: Texts) -> str | None:
    """A warning if a teacher, by its entry in results.json, is no better than chance on validation."""
    data, name, split = texts.data, entry["name"], validation_split(texts.splits)
    metric, metrics, labels = data.primary_metric, entry["metrics"][split], np.asarray(texts.splits[split]["labels"])
    if data.regression:
        return regressor_warning(name, metrics, labels, metric, split)
    return classifier_warning(name, metric, metrics[metric], labels, data.num_labels, split)


def validation_split(splits: Iterable[str]) -> str:
    """The first validation split: MNLI has two."""
    return next(name for name in splits if name.startswith("validation"))


def median_text(texts: Texts, device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs of a text of median length, for measuring latency and FLOPs. It comes from the first validation
    split, or from the last split if there is none.
    """
    splits = texts.splits
    rows = next((rows for split, rows in splits.items() if split.startswith("validation")), [*splits.values()][-1])
    middle = int(np.argsort(rows["length"], kind="stable")[len(rows) // 2])
    return {name: t.to(device) for name, t in texts.collate([rows[middle]]).items() if name not in NOT_INPUTS}


# ---- data for evaluating a saved classifier ----


def load_data_of(model: str, args: Namespace) -> TextData:
    """The data that the flags name, with the class ids of `model` (folder or Hub name). No train split is needed.
    Prints what was inferred. Raises UserError if the data have other labels.
    """
    kind, labels = labels_of(model)
    data = load_text_data(args.dataset, args.text_columns, args.label_column, kind, labels, needs_train=False)
    print_notes(data.name, data.notes)
    return data
