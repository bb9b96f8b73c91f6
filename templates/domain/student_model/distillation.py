"""The steps of a distillation: training a classifier as a stage of a run, evaluation, and the report."""

from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import EvalPrediction, default_data_collator

from kd.common.data.sources import hub_dataset
from kd.common.methods import Method
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import (
    agreement,
    calibration_metrics,
    classification_metrics,
    classifier_warning,
    constant_score,
)
from kd.common.metrics.verdict import Measurement, measure_classes
from kd.common.pretrained import stage_loader
from kd.common.reporting.model_card import Card
from kd.common.reporting.saved_models import class_predictions
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.common.training.trainer_run import TrainerRun
from kd.example_domain.data.loading import KNOWN, LabelledData
from kd.example_domain.teacher_model.classifier import Classifier, new_classifier

USAGE = """import torch
from kd.example_domain.teacher_model.classifier import Classifier

folder = "student"  # the path of this model
model = Classifier.from_pretrained(folder).eval()
logits = model(torch.zeros(1, {length})).logits  # signals (batch, length)
print(model.config.id2label[logits.argmax().item()])"""


def train(run: TrainerRun, stage: str, width: int, data: LabelledData, method: Method, **teacher: Any) -> Classifier:
    """Trains a classifier, or loads it if the stage is finished.

    Args:
        teacher: arguments of KDTrainer: `teacher_outputs=...`, or `teacher=...` for methods that need features.
    """

    def build() -> Classifier:
        return run.train(
            stage,
            new_classifier(data.label_names, width),
            {},
            objective=method.objective,
            train_dataset=data.splits["train"],
            eval_dataset=data.splits["validation"],
            data_collator=default_data_collator,
            compute_metrics=trainer_metrics,
            **teacher,
        )

    return run.stage(stage, build, stage_loader(Classifier))


def trainer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of an evaluation during training, as `compute_metrics` of a transformers Trainer."""
    return classification_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def predict(model: Classifier, rows: datasets.Dataset) -> np.ndarray:
    """Logits (samples, classes) of the rows, computed in fp32 like those of a loaded model."""

    def logits(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits}

    return torch.stack(run_inference(model, logits, rows, default_data_collator, batch_size=256)["logits"]).numpy()


class Evaluation(NamedTuple):
    """The model's entry in results.json, its accuracy on any of the selection samples, for the verdict, and its logits
    (samples, classes) by split.
    """

    entry: dict[str, Any]
    measurement: Measurement
    logits: dict[str, np.ndarray]


def evaluate(name: str, model: Classifier, data: LabelledData, teacher: Classifier | None = None) -> Evaluation:
    """Evaluates a model: its cost, and its metrics on every split except train. If `teacher` is passed, the metrics
    include the agreement with the teacher.
    """
    metrics, predicted = {}, {}
    for split, rows in data.splits.items():
        if split != "train":
            predicted[split], labels = predict(model, rows), rows["labels"][:].numpy()
            metrics[split] = classification_metrics(predicted[split], labels)
            metrics[split] |= calibration_metrics(predicted[split], labels)
            if teacher is not None:
                metrics[split]["agreement"] = agreement(predicted[split], predict(teacher, rows))
    split = data.selection_split
    signal = default_data_collator([data.splits[split][0]])
    inputs = {column: value.to(model.device) for column, value in signal.items() if column not in NOT_INPUTS}
    entry = {"name": name, **cost(model, inputs), "metrics": metrics}
    measurement = measure_classes(predicted[split], data.splits[split]["labels"][:].numpy())
    return Evaluation(entry, measurement, predicted)


def prediction_columns(data: LabelledData, logits: dict[str, np.ndarray]) -> dict[str, dict[str, list[Any]]]:
    """The columns of `write_predictions` by split."""
    columns = {}
    for split, scores in logits.items():
        rows, labels = (data.splits[split][column][:].numpy() for column in ("sample_id", "labels"))
        columns[split] = {"row": rows.tolist()} | class_predictions(scores, labels, data.label_names)
    return columns


def chance_warning(entry: dict[str, Any], data: LabelledData) -> str | None:
    """A warning if an evaluated model is no better than chance."""
    labels = data.splits["validation"]["labels"][:].numpy()
    accuracy = entry["metrics"]["validation"]["accuracy"]
    return classifier_warning(entry["name"], "accuracy", accuracy, labels, len(data.label_names))


def report(run: TrainerRun, data: LabelledData, student: Classifier, evaluations: dict[str, Evaluation]) -> None:
    """Saves the student, writes the report of the evaluated models by role, and prints the table."""
    sizes: dict[str, int | None] = {"test": None} | {split: len(rows) for split, rows in data.splits.items()}
    results = run.results(
        domain="example-domain",
        task=data.name,
        method="kd",
        data=sizes | {"fingerprint": data.fingerprint},
        models={role: evaluation.entry for role, evaluation in evaluations.items()},
        split="validation",
        metric="accuracy",
        measurements={role: evaluation.measurement for role, evaluation in evaluations.items()},
        chance=constant_score(data.splits["validation"]["labels"][:].numpy(), len(data.label_names), "accuracy"),
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
    )
    length = len(data.splits["train"][0]["values"])
    dataset = hub_dataset(run.argument("dataset"), KNOWN)
    origins = list(filter(None, [run.argument("teacher")]))
    run.finish(results, student, Card(USAGE.format(length=length), dataset=dataset, origins=origins))
