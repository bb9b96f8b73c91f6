"""Metrics, cost and warnings of the models of `distill`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.distillation.adapters import NamedOutputs
from kd.common.distillation.task import Task, on_device
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import (
    agreement,
    calibration_metrics,
    classification_metrics,
    classifier_warning,
    constant_score,
    regression_metrics,
    regressor_warning,
)
from kd.common.metrics.verdict import Measurement, measure_classes, measure_regression
from kd.common.training.inference import run_inference


class Evaluation:
    """Evaluates models on the validation split, or on the training data if there is none.

    Attributes:
        split, metric: The headline figure.
        entries: The models' entries in results.json by role, the teacher's first.
        measurements: The headline figure by role, for the verdict; empty without labels.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.split = "validation" if "validation" in task.data else "train"
        self.labels = task.data[self.split].labels
        self.metric = "agreement" if self.labels is None else "spearman" if task.regression else "accuracy"
        self.entries: dict[str, Any] = {}
        self.measurements: dict[str, Measurement] = {}
        self.teacher_logits = self._predict(task.teacher)
        self.add("teacher", task.teacher)

    def add(self, role: str, model: NamedOutputs) -> None:
        """Evaluates a model. `agreement` is with the teacher: the share of equal predictions, or for regression their
        rank correlation.
        """
        logits, regression = self._predict(model), self.task.regression
        metrics = {} if self.labels is None else self.metrics(logits, self.labels)
        if regression:
            metrics["agreement"] = regression_metrics(logits[:, 0], self.teacher_logits[:, 0])["spearman"]
        else:
            metrics["agreement"] = agreement(logits, self.teacher_logits)
        if self.labels is not None:
            measured = measure_regression(logits[:, 0], self.labels) if regression else None
            self.measurements[role] = measured or measure_classes(logits, self.labels)
        one = on_device({name: value[:1] for name, value in self.task.sample.items()})
        costs = cost(model, one)
        self.entries[role] = {"name": type(model.module).__name__, **costs, "metrics": {self.split: metrics}}

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if self.task.regression:
            return regression_metrics(logits[:, 0], labels)
        return classification_metrics(logits, labels) | calibration_metrics(logits, labels)

    @property
    def chance(self) -> float | None:
        """The accuracy of the best constant prediction."""
        if self.labels is None or self.task.regression:
            return None
        return constant_score(self.labels, self.task.classes, "accuracy")

    def _predict(self, model: NamedOutputs) -> np.ndarray:
        """Logits (rows, classes) in fp32."""

        def call(**batch: Tensor) -> dict[str, Tensor | None]:
            return {"logits": model(**batch).logits}

        outputs = run_inference(model, call, self.task.data[self.split], self.task.collate, batch_size=256)
        return torch.stack(outputs["logits"]).float().numpy()

    def warning(self) -> str | None:
        """Whether the teacher is no better than a constant prediction."""
        teacher, labels = self.entries["teacher"], self.labels
        name, metrics = teacher["name"], teacher["metrics"][self.split]
        if labels is None:
            return None
        if self.task.regression:
            return regressor_warning(name, metrics, labels, split=self.split)
        return classifier_warning(name, "accuracy", metrics["accuracy"], labels, self.task.classes, self.split)
