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
    classification_metrics,
    classifier_warning,
    regression_metrics,
    regressor_warning,
)
from kd.common.training.inference import run_inference


class Evaluation:
    """Evaluates models on the validation split, or on the training data if there is none.

    Attributes:
        split, metric: The headline figure.
        teacher: The teacher's entry in results.json.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.split = "validation" if "validation" in task.data else "train"
        self.labels = task.data[self.split].labels
        self.metric = "agreement" if self.labels is None else "spearman" if task.regression else "accuracy"
        self.teacher_logits = self._predict(task.teacher)
        self.teacher = self.entry(task.teacher)

    def entry(self, model: NamedOutputs) -> dict[str, Any]:
        """A model's entry in results.json. `agreement` is with the teacher: the share of equal predictions, or for
        regression their rank correlation.
        """
        logits = self._predict(model)
        metrics = {} if self.labels is None else self.metrics(logits, self.labels)
        if self.task.regression:
            metrics["agreement"] = regression_metrics(logits[:, 0], self.teacher_logits[:, 0])["spearman"]
        else:
            metrics["agreement"] = agreement(logits, self.teacher_logits)
        one = on_device({name: value[:1] for name, value in self.task.sample.items()})
        return {"name": type(model.module).__name__, **cost(model, one), "metrics": {self.split: metrics}}

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if self.task.regression:
            return regression_metrics(logits[:, 0], labels)
        return classification_metrics(logits, labels)

    def _predict(self, model: NamedOutputs) -> np.ndarray:
        """Logits (rows, classes) in fp32."""

        def call(**batch: Tensor) -> dict[str, Tensor | None]:
            return {"logits": model(**batch).logits}

        outputs = run_inference(model, call, self.task.data[self.split], self.task.collate, batch_size=256)
        return torch.stack(outputs["logits"]).float().numpy()

    def warning(self) -> str | None:
        """Whether the teacher is no better than a constant prediction."""
        name, metrics, labels = self.teacher["name"], self.teacher["metrics"][self.split], self.labels
        if labels is None:
            return None
        if self.task.regression:
            return regressor_warning(name, metrics, labels, split=self.split)
        return classifier_warning(name, "accuracy", metrics["accuracy"], labels, self.task.classes, self.split)
