"""Observations with the teacher's outputs: the data of policy distillation, collected during training."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kd.common.outputs import Outputs

CHUNK = 4096  # rows of one teacher forward


class Observations:
    """A buffer of `capacity` rows that overwrites its oldest: observations and the teacher's outputs for them.

    Observations keep their dtype (uint8 for frames). The teacher runs once on each.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.observations = torch.empty(capacity, *shape, dtype=dtype)
        self.teacher_outputs: dict[str, Tensor] = {}
        self.capacity, self.place, self.seen = capacity, 0, 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def append(self, rows: Tensor, teacher: nn.Module) -> None:
        """Adds observations (rows, ...) and the teacher's outputs for them."""
        for chunk in rows.to(self.observations.dtype).split(min(CHUNK, self.capacity)):
            places = (self.place + torch.arange(len(chunk))) % self.capacity
            self.observations[places] = chunk
            for name, values in predict(teacher, chunk).items():
                if name not in self.teacher_outputs:
                    self.teacher_outputs[name] = torch.empty(self.capacity, *values.shape[1:])
                self.teacher_outputs[name][places] = values
            self.place, self.seen = (self.place + len(chunk)) % self.capacity, self.seen + len(chunk)

    def batches(
        self, batch_size: int, number: int, generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """`number` batches of (observations, teacher outputs) on a device, in passes over random orders."""
        order = torch.empty(0, dtype=torch.long)
        batch_size = min(batch_size, len(self))
        for _ in range(number):
            if len(order) < batch_size:
                order = torch.randperm(len(self), generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            teacher = {name: values[rows].to(device) for name, values in self.teacher_outputs.items()}
            yield self.observations[rows].to(device), to_outputs(teacher)

    def values(self) -> Tensor | None:
        """The teacher's values (rows,) of all rows, or None for a teacher without values."""
        return self.teacher_outputs["value"][: len(self)] if "value" in self.teacher_outputs else None


@torch.inference_mode()
def predict(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    """The outputs of a policy's network, as {name: (rows, ...)}, in float32 on the CPU."""
    outputs: Outputs = network(observations.to(next(network.parameters()).device))
    named = {} if outputs.logits is None else {"logits": outputs.logits}
    return {name: values.float().cpu() for name, values in (named | (outputs.features or {})).items()}


def to_outputs(named: dict[str, Tensor]) -> Outputs:
    """The inverse of `predict`'s dict."""
    return Outputs(logits=named.get("logits"), features={name: x for name, x in named.items() if name != "logits"})
