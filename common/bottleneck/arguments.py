"""Arguments of the discrete key-value bottleneck that all domains share; a domain subclasses them for its defaults."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from kd.common.bottleneck.module import Decoder, DiscreteKeyValueBottleneck, Split
from kd.common.cli import reject_unused
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Positive, Range

Keys = Literal["carried", "new", "random", "reused"]
CodebookSize = Annotated[int, Range(1, 2**16)]
SHAPE = ("codebooks", "codebook_size", "split", "key_dim", "decoder", "value_dim")


@dataclass
class BottleneckArguments:
    """Shape of the bottleneck, source of the student's keys, and training of the values."""

    keys: Keys = field(default="carried", metadata={"help": "where the student's keys come from"})
    codebooks: Count = 32
    codebook_size: CodebookSize = field(
        default=512, metadata={"help": "Number of keys, and of values, in each codebook."}
    )
    split: Split = "segment"
    key_dim: Count | None = field(default=None, metadata={"help": "width of a key under the projection split"})
    decoder: Decoder = "linear"
    value_dim: Count = field(default=16, metadata={"help": "width of a value for the linear decoder"})
    value_epochs: Positive = field(default=10, metadata={"help": "epochs over the cached codes"})
    value_batch_size: Count = 256

    def check_unused_flags(self) -> None:
        if self.split == "segment":
            reject_unused("a key of --split segment is as wide as a segment", self, "key_dim")
        if self.decoder == "mean":
            reject_unused("a value of --decoder mean is as wide as there are labels", self, "value_dim")

    def shape(self) -> dict[str, Any]:
        """The arguments of DiscreteKeyValueBottleneck other than its widths."""
        return {name: getattr(self, name) for name in SHAPE}

    def without_weights(self, width: int, num_outputs: int = 1) -> DiscreteKeyValueBottleneck:
        """A bottleneck of this shape on the meta device. Raises UserError for a width that it cannot split."""
        try:
            with torch.device("meta"):
                return DiscreteKeyValueBottleneck(width, num_outputs, **self.shape())
        except ValueError as error:
            raise UserError(str(error)) from error

    def value_settings(self, rate: float) -> dict[str, Any]:
        """Training arguments for the values: `rate` for them, a tenth of it for the decoder, which learns from every
        sample, whereas a value learns only from those that choose its key.
        """
        return {
            "num_train_epochs": self.value_epochs,
            "per_device_train_batch_size": self.value_batch_size,
            "learning_rate": rate / 10,
            "value_learning_rate": rate,
        }
