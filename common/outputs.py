"""The outputs of every model of this project, teacher or student, in any domain."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


@dataclass
class Outputs(ModelOutput):
    """logits (batch, classes), features {name: (batch, ...)}, mask (batch, positions) of the positions that are not
    padding, sample_id (batch,) of the training samples, for terms with a memory.

    A ModelOutput, because accelerate turns the bf16 tensors of an autocast forward back into fp32 only inside one.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] | None = field(default=None)
    mask: Tensor | None = None
    sample_id: Tensor | None = None


class AveragedTeacher(nn.Module):
    """Several teachers of the same inputs as one: the mean of their logits (batch, classes), the geometric mean of
    their distributions (arXiv:1503.02531). Its cached counterpart is `teacher_outputs.JoinedOutputs`.
    """

    def __init__(self, teachers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, *args: Any, **inputs: Any) -> Outputs:
        logits = [teacher(*args, **inputs).logits for teacher in self.teachers]
        return Outputs(logits=torch.stack(logits).mean(0))
