"""Trains the student of a pair with KDTrainer for a few steps, as the scripts do."""

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
    **kwargs: Any,
) -> KDTrainer:
    """Trains `student` (default: the pair's student) by a method. `kwargs`: training arguments."""
    defaults = {"train_sampling_strategy": "random", "dataloader_drop_last": True, "optim_args": "momentum=0.9"}
    trainer = KDTrainer(
        model=student or pair.student,
        args=arguments(folder, **(defaults | kwargs)),
        objective=method.objective,
        teacher=frozen(pair.teacher, "fp32"),
        features=method.features,
        teacher_features=method.teacher_features,
        train_dataset=pair.data.views("train", torch.device("cpu"), augment=True),
        data_collator=identity_collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
