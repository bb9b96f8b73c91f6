"""The output of every model of this project, teacher or student, in any domain."""

from dataclasses import dataclass, field

from torch import Tensor
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
