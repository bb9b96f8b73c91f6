"""The outputs of every model of this project, teacher or student, in any domain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import reduce
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
    """Several teachers of the same inputs as one: the mean of their logits (`mean_logits`), and of those of the named
    `features` that all of them output. It outputs no other features.
    """

    def __init__(self, teachers: Iterable[nn.Module], features: Sequence[str] = ()) -> None:
        super().__init__()
        self.teachers, self.features = nn.ModuleList(teachers), tuple(features)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **inputs: Any) -> Outputs:
        outputs: list[Outputs] = [teacher(*args, **inputs) for teacher in self.teachers]
        averaged = {}
        for name in self.features:
            values = [one.features[name] for one in outputs if one.features and name in one.features]
            if len(values) == len(outputs):
                averaged[name] = _mean(values)
        return Outputs(logits=mean_logits(outputs), features=averaged)


def mean_logits(outputs: Sequence[Outputs]) -> Tensor | None:
    """The mean of the logits (batch, classes) of several teachers, whose softmax is the geometric mean of their
    distributions, normalized (Hinton et al., arXiv:1503.02531). None if no teacher outputs logits.

    It is the average of teachers in every domain: of live ones (`AveragedTeacher`), and of cached outputs
    (`JoinedOutputs`) where each teacher has its own tokenizer.
    """
    logits = [one.logits for one in outputs if one.logits is not None]
    return _mean(logits) if logits else None


def _mean(tensors: list[Tensor]) -> Tensor:
    return reduce([tensor.float() for tensor in tensors], "teacher ... -> ...", "mean")
