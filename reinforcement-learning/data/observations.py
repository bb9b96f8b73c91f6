"""Observations and what the teacher said about each: the data of policy distillation, collected as it trains."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kd.common.outputs import Outputs

CHUNK = 4096  # observations that the teacher is asked about at once


class Observations:
    """A buffer of `capacity` rows that overwrites its oldest: observations and the teacher's outputs for them.

    Observations keep their own type (uint8 for frames). The teacher speaks once about each.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.observations = torch.empty(capacity, *shape, dtype=dtype)
        self.said: dict[str, Tensor] = {}
        self.capacity, self.place, self.seen = capacity, 0, 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def append(self, rows: Tensor, teacher: nn.Module) -> None:
        """Adds observations (rows, ...) and asks the teacher about them."""
        for chunk in rows.to(self.observations.dtype).split(min(CHUNK, self.capacity)):
            self._write(chunk, tell(teacher, chunk))

    def _write(self, rows: Tensor, said: dict[str, Tensor]) -> None:
        places = (self.place + torch.arange(len(rows))) % self.capacity
        self.observations[places] = rows
        for name, values in said.items():
            if name not in self.said:
                self.said[name] = torch.empty(self.capacity, *values.shape[1:])
            self.said[name][places] = values
        self.place, self.seen = (self.place + len(rows)) % self.capacity, self.seen + len(rows)

    def batches(
        self, batch_size: int, number: int, generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """`number` batches of (observations, teacher's outputs) on a device, in passes over random orders."""
        order = torch.empty(0, dtype=torch.long)
        batch_size = min(batch_size, len(self))
        for _ in range(number):
            if len(order) < batch_size:
                order = torch.randperm(len(self), generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            said = {name: values[rows].to(device) for name, values in self.said.items()}
            yield self.observations[rows].to(device), outputs_of(said)

    def values(self) -> Tensor | None:
        """The teacher's values (rows,) of all that is in the buffer, or None where it tells none."""
        return self.said["value"][: len(self)] if "value" in self.said else None


@torch.inference_mode()
def tell(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    """What a policy's network says, as {name: (rows, ...)}, on the CPU."""
    said: Outputs = network(observations.to(_device(network)))
    named = {} if said.logits is None else {"logits": said.logits}
    return {name: values.float().cpu() for name, values in (named | (said.features or {})).items()}


def outputs_of(said: dict[str, Tensor]) -> Outputs:
    return Outputs(logits=said.get("logits"), features={name: x for name, x in said.items() if name != "logits"})


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
