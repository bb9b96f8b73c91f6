"""Minimal models, data and stage results: a two-layer classifier, rows, a number."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.common.objective import Objective, soft_targets, task_loss
from kd.common.outputs import Outputs
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.trainer import KDTrainer
from kd.common.utils.files import read_json, write_json

# Sizes of a narrow tiny-bert, for `kd.nlp.teacher_model.teacher.TINY_SIZES`.
NARROW_BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


class TinyClassifier(nn.Module):
    """x (batch, 6) -> logits (batch, 3). The hidden layer is a named feature; dropout reveals a missing eval mode."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.dropout, self.head = nn.Linear(6, width), nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Outputs:
        hidden = self.dropout(self.hidden(x).relu())
        return Outputs(logits=self.head(hidden), features={"hidden": hidden})


class Rows(torch.utils.data.Dataset):
    """`n` samples whose class is the argmax of their first three features."""

    def __init__(self, n: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(n, 6, generator=generator)
        self.labels = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "labels": self.labels[i], "sample_id": torch.tensor(i)}


def model(seed: int = 0, **kwargs: Any) -> TinyClassifier:
    torch.manual_seed(seed)
    return TinyClassifier(**kwargs)


def arguments(folder: str | Path, **kwargs: Any) -> KDTrainingArguments:
    kind: type[KDTrainingArguments] = kwargs.pop("kind", KDTrainingArguments)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "precision": "fp32",
        "use_cpu": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return kind(**(defaults | kwargs))


def kd(alpha: float = 0.5) -> Objective:
    return Objective(task=(alpha, task_loss()), soft_targets=(1 - alpha, soft_targets(2.0)))


class Number:
    """A minimal result of a stage."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save_pretrained(self, folder: str | Path) -> None:
        write_json(Path(folder, "number.json"), self.value)

    @classmethod
    def load(cls, folder: str) -> "Number":
        return cls(read_json(Path(folder, "number.json")))


def break_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the second update of every SGD set the weights to NaN, after a finite loss."""
    create = KDTrainer.create_optimizer

    def with_broken_momentum(self: KDTrainer, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = create(self, model)
        for group in optimizer.param_groups:
            group["momentum"] = math.nan  # the first update does not use momentum
        return optimizer

    monkeypatch.setattr(KDTrainer, "create_optimizer", with_broken_momentum)
