"""KDTrainer on the images of a pair, as the scripts run it, for a few steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kd.common.methods import Method
from kd.common.training.inference import identity_collate
from kd.common.training.trainer import KDTrainer
from kd.image_classification.teacher_model.classifier import frozen
from kd_testing.image_pairs import Pair
from kd_testing.tiny import arguments


def train(
    folder: Path,
    pair: Pair,
    method: Method | SimpleNamespace,
    student: nn.Module | None = None,
    resume: str | None = None,
    **settings: Any,
) -> KDTrainer:
    """Trains the pair's student, or what is given, by a method; `settings` are training arguments."""
    defaults = {"train_sampling_strategy": "random", "dataloader_drop_last": True, "optim_args": "momentum=0.9"}
    trainer = KDTrainer(
        model=student or pair.student,
        args=arguments(folder, **(defaults | settings)),
        objective=method.objective,
        teacher=frozen(pair.teacher, "fp32"),
        features=method.features,
        teacher_features=method.teacher_features,
        train_dataset=pair.data.views("train", torch.device("cpu"), augment=True),
        data_collator=identity_collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
