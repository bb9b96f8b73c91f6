"""Detects losses and weights that are not finite.

A non-finite loss stops a run; it is detected without reading the loss of every step, which would stall a GPU. When
several students train side by side and one diverges, the others go on: they share no weights. Weights are checked
before they are saved, evaluated or returned, because the last step can break them after a finite loss.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from kd.common.utils.errors import UserError
from kd.common.utils.finite import diverged, non_finite_tensor

logger = logging.getLogger(__name__)
CHECK_EVERY = 100  # steps, on a GPU; on a CPU a check costs nothing


class DivergenceMonitor:
    """Stores, on the device, the first step whose loss is not finite.

    `students`: the names of several students that train side by side; the parts of their losses are called NAME/PART.
    """

    def __init__(self, students: Sequence[str] = ()) -> None:
        self._prefixes = [f"{name}/" for name in students] or [""]
        self._single = not students
        self._first: dict[str, dict[str, Tensor]] = {}  # by prefix: the parts of that loss, and its step or 0 for none
        self._reported: set[str] = set()

    def drop_diverged(self, step: int, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an optimizer step (from 1), the sum of its named parts (scalars), and the parts: NaN for a
        diverged student, which is excluded from the sum.

        The gradient of a diverged student is NaN, and so are its weights: it stays diverged, also in a resumed run.
        """
        kept: dict[str, Tensor] = {}
        for prefix in self._prefixes:
            of_student = {name: part for name, part in parts.items() if name.startswith(prefix)}
            loss = torch.stack(list(of_student.values())).sum()
            self._record(prefix, step, loss, of_student)
            if self._single:
                return loss, of_student
            # A factor and no mask: the gradient through a mask is 0 times infinity for some losses, and 0 for others.
            factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
            kept |= {name: part * factor for name, part in of_student.items()}
        return torch.stack(list(kept.values())).nansum(), kept

    def _record(self, prefix: str, step: int, loss: Tensor, parts: dict[str, Tensor]) -> None:
        now = {name: part.detach().float() for name, part in parts.items()}
        now["step"] = torch.full_like(loss, step, dtype=torch.float32)
        before = self._first.get(prefix) or {name: torch.zeros_like(value) for name, value in now.items()}
        first = ~torch.isfinite(loss.detach()) & (before["step"] == 0)
        self._first[prefix] = {name: torch.where(first, value, before[name]) for name, value in now.items()}

    def is_due(self, step: int) -> bool:
        """Whether the recorded losses are to be checked after this step."""
        device = next(iter(self._first.values()))["step"].device.type
        return device == "cpu" or step % CHECK_EVERY == 0

    def check_losses(self, last_checkpoint: Callable[[], str | None]) -> bool:
        """Whether any student is left to train. Reports the step and the parts of a non-finite loss: a warning for one
        of several students, a UserError for a single one.
        """
        diverged_at = {prefix: text for prefix, first in self._first.items() if (text := _description(first))}
        if diverged_at and self._single:
            raise UserError(
                f"the loss is not finite at {diverged_at['']}; try a lower learning rate or --precision fp32; "
                f"last good checkpoint: {last_checkpoint() or 'none yet'}"
            )
        for prefix, text in diverged_at.items():
            self._report(prefix, f"its loss is not finite at {text}")
        return len(self._reported) < len(self._prefixes)

    def check_weights(self, step: int, modules: Mapping[str, Sequence[nn.Module]]) -> bool:
        """The same for the weights after a step, over all processes: `modules` by student, or of a single one under
        any name.
        """
        here = [{name: non_finite_tensor(*of_student) for name, of_student in modules.items()}]
        found = {name: tensor for process in gather_object(here) for name, tensor in process.items() if tensor}
        if found and self._single:
            raise UserError(diverged(next(iter(found.values())), f"after step {step}"))
        for name, tensor in found.items():
            self._report(f"{name}/", f"{tensor} is not finite after step {step}")
        return len(self._reported) < len(self._prefixes)

    def _report(self, prefix: str, what: str) -> None:
        if prefix not in self._reported and PartialState().is_main_process:
            logger.warning("%s diverged: %s", prefix.removesuffix("/"), what)
        self._reported.add(prefix)


def _description(first: dict[str, Tensor]) -> str | None:
    """The step and the non-finite parts of a recorded loss, or None where all losses were finite."""
    step = int(first["step"].item())
    if not step:
        return None
    values = {name: value.item() for name, value in first.items() if name != "step"}
    # All parts where each is finite and only their sum is not.
    culprits = {name: value for name, value in values.items() if not math.isfinite(value)} or values
    return f"step {step} ({', '.join(f'{n} = {v:g}' for n, v in culprits.items())})"
