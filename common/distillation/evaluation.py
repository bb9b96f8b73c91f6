"""Metrics, cost and warnings of the models of `distill`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.distillation.adapters import NamedOutputs
from kd.common.distillation.task import Task, on_device
from kd.common.metrics.cost import cost
from kd.common.metrics.tasks import task_metrics
from kd.common.metrics.verdict import Measurement
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
        self.scores = task_metrics(task.type, list(map(str, range(task.classes))))
        self.metric = "agreement" if self.labels is None else self.scores.primary
        self.entries: dict[str, Any] = {}
        self.measurements: dict[str, Measurement] = {}
        self.teacher_logits = self._predict(task.teacher)
        self.add("teacher", task.teacher)

    def add(self, role: str, model: NamedOutputs) -> None:
        """Evaluates a model. `agreement` is with the teacher."""
        logits = self._predict(model)
        metrics = {} if self.labels is None else self.metrics(logits, self.labels)
        metrics["agreement"] = self.scores.agreement(logits, self.teacher_logits)
        if self.labels is not None:
            self.measurements[role] = self.scores.measure(logits, self.labels, self.metric)
        one = on_device({name: value[:1] for name, value in self.task.sample.items()})
        costs = cost(model, one)
        self.entries[role] = {"name": type(model.module).__name__, **costs, "metrics": {self.split: metrics}}

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return self.scores.metrics(logits, labels) | self.scores.calibration(logits, labels)

    @property
    def chance(self) -> float | None:
        """The score of the best constant prediction."""
        return None if self.labels is None else self.scores.chance(self.labels, self.metric)

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
        return self.scores.warning(name, metrics, labels, self.metric, self.split)
