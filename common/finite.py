"""A loss that is not finite stops the run, without a look at every step's loss, which would hold up a GPU."""

import math

import torch
from torch import Tensor

from common.utils.errors import UserError

LOOK_EVERY = 100  # steps, on a GPU; on a CPU looking costs nothing


class NonFiniteLoss:
    """Remembers, on the device, the first step whose loss is not finite."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}  # the parts of that loss, and its step; step 0: none so far

    def note(self, step: int, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Takes the loss of an optimizer step (from 1) and its named parts, all scalars."""
        now = {name: part.detach().float() for name, part in parts.items()}
        now["step"] = torch.full_like(loss, step, dtype=torch.float32)
        if not self._first:
            self._first = {name: torch.zeros_like(value) for name, value in now.items()}
        first = ~torch.isfinite(loss.detach()) & (self._first["step"] == 0)
        self._first = {name: torch.where(first, value, self._first[name]) for name, value in now.items()}

    def is_time_to_look(self, step: int) -> bool:
        return bool(self._first) and (self._first["step"].device.type == "cpu" or step % LOOK_EVERY == 0)

    def refuse(self, last_checkpoint: str | None) -> None:
        """Raises UserError, naming the step and the parts that were not finite, if there was such a loss."""
        if not self._first or self._first["step"].item() == 0:
            return
        values = {name: value.item() for name, value in self._first.items()}
        step = int(values.pop("step"))
        # All of them where each is finite and only their sum is not.
        culprits = {name: value for name, value in values.items() if not math.isfinite(value)} or values
        raise UserError(
            f"the loss is not finite at step {step} ({', '.join(f'{n} = {v:g}' for n, v in culprits.items())}); try a "
            f"lower learning rate or --precision fp32; last good checkpoint: {last_checkpoint or 'none yet'}"
        )
