"""Detects losses and weights that are not finite.

A non-finite loss stops a run. It is detected without reading the loss of every step, which would stall a GPU. When
several students train side by side and one diverges, the others continue, because they share no weights. Weights are
checked before they are saved, evaluated or returned, because the last step can make them non-finite after a finite
loss.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd.common.utils.errors import UserError

logger = logging.getLogger(__name__)
CHECK_EVERY = 100  # steps, on a GPU; on a CPU a check is free


def check_finite_weights(*modules: nn.Module, when: str) -> None:
    """Raises UserError, which names the tensor and `when` (such as `after step 12`), unless all weights are finite."""
    if (name := non_finite_tensor(*modules)) is not None:
        raise UserError(_divergence(name, when))


def non_finite_tensor(*modules: nn.Module) -> str | None:
    """The name of the first parameter or saved buffer that is not finite, or None.

    Buffers may contain minus infinity, as attention masks do. Of sharded weights, only this process's shards count.
    """
    names, finite = [], []
    for module in modules:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                ok = local.isfinite() if isinstance(tensor, nn.Parameter) else local < math.inf  # false for NaN
                names.append(name)
                finite.append(ok.all())
    if not finite or bool(torch.stack([value.to(finite[0].device) for value in finite]).all()):  # one GPU sync
        return None
    return next(name for name, value in zip(names, finite, strict=True) if not value)


def _divergence(tensor: str, when: str) -> str:
    remedy = "try a lower learning rate, other optimizer arguments or fp32"
    return f"training diverged: {tensor} is not finite {when}; {remedy}"


class DivergenceMonitor:
    """Stores, on the device, the first step whose loss is not finite.

    Args:
        students: Names of several students that train side by side; the parts of their losses are called NAME/PART.
    """

    def __init__(self, students: Sequence[str] = ()) -> None:
        self._prefixes = [f"{name}/" for name in students] or [""]
        self._single = not students
        self._first: dict[str, dict[str, Tensor]] = {}  # by prefix: step and parts of that loss; step 0 for none
        self._reported: set[str] = set()

    def drop_diverged(self, step: int, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an optimizer step (counted from 1), which is the sum of its named parts (scalars), and the
        parts. They are NaN for a diverged student, which is excluded from the sum.

        The gradient of a diverged student is NaN, and so are its weights: it stays diverged, also in a resumed run.
        """
        kept: dict[str, Tensor] = {}
        for prefix in self._prefixes:
            student_parts = {name: part for name, part in parts.items() if name.startswith(prefix)}
            loss = torch.stack(list(student_parts.values())).sum()
            finite = torch.isfinite(loss.detach())
            now = {name: part.detach().float() for name, part in student_parts.items()}
            now["step"] = torch.full_like(loss, step, dtype=torch.float32)
            before, zero = self._first.get(prefix, {}), torch.zeros_like(now["step"])
            is_first = ~finite & (before.get("step", zero) == 0)
            self._first[prefix] = {  # not all batches have the same parts
                name: torch.where(is_first, now.get(name, zero), before.get(name, zero)) for name in before | now
            }
            if self._single:
                return loss, student_parts
            # A factor, not a mask: for some losses the gradient through a mask is 0 times infinity, for others 0.
            factor = torch.where(finite, 1.0, math.nan)
            kept |= {name: part * factor for name, part in student_parts.items()}
        return torch.stack(list(kept.values())).nansum(), kept

    def check_losses(self, last_checkpoint: Callable[[], str | None]) -> bool:
        """Returns whether any student has not diverged. Reports the step and the parts of a non-finite loss: for a
        single student as a UserError that names the last checkpoint, for one of several as a warning.
        """
        for prefix, first in self._first.items():
            if step := int(first["step"].item()):
                loss = f"loss is not finite at step {step} ({_non_finite_parts(first)})"
                if self._single:
                    raise UserError(
                        f"the {loss}; try a lower learning rate or --precision fp32; "
                        f"last good checkpoint: {last_checkpoint() or 'none yet'}"
                    )
                self._report(prefix, f"its {loss}")
        return len(self._reported) < len(self._prefixes)

    def check_weights(self, step: int, modules: Mapping[str, Sequence[nn.Module]]) -> bool:
        """Like `check_losses`, for the weights after a step in all processes. `modules` are listed by student; the
        name of a single student is not used.
        """
        here = [{name: non_finite_tensor(*student_modules) for name, student_modules in modules.items()}]
        found = {name: tensor for process in gather_object(here) for name, tensor in process.items() if tensor}
        if found and self._single:
            raise UserError(_divergence(next(iter(found.values())), f"after step {step}"))
        for name, tensor in found.items():
            self._report(f"{name}/", f"{tensor} is not finite after step {step}")
        return len(self._reported) < len(self._prefixes)

    def _report(self, prefix: str, reason: str) -> None:
        if prefix not in self._reported and PartialState().is_main_process:
            logger.warning("%s diverged: %s", prefix.removesuffix("/"), reason)
        self._reported.add(prefix)


def _non_finite_parts(first: dict[str, Tensor]) -> str:
    """The non-finite parts of a recorded loss, or all parts if only their sum is not finite."""
    values = {name: value.item() for name, value in first.items() if name != "step"}
    shown = {name: value for name, value in values.items() if not math.isfinite(value)} or values
    return ", ".join(f"{name} = {value:g}" for name, value in shown.items())
