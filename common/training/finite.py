"""The watch over losses and weights that are not finite.

A loss that is not finite stops a run; it is noticed without a look at every step's loss, which would hold up a GPU. Of
several students side by side, which share no weights, one diverges, and the others go on. Weights are checked before
they are saved, measured or returned: the last step can break them after a loss that was finite.
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
LOOK_EVERY = 100  # steps, on a GPU; on a CPU looking costs nothing
REMEDY = "try a lower learning rate, other optimizer settings or fp32"


def check_finite_weights(*modules: nn.Module, when: str) -> None:
    """Raises UserError, which names the tensor and `when` (such as `after step 12`), unless all weights are finite."""
    if (name := non_finite_tensor(*modules)) is not None:
        raise UserError(_diverged(name, when))


def non_finite_tensor(*modules: nn.Module) -> str | None:
    """The name of the first parameter or saved buffer that is not finite, or None.

    A buffer may hold minus infinity, as attention masks do. Of sharded weights only the shards of this process count.
    """
    names, finite = [], []
    for module in modules:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                ok = local.isfinite() if isinstance(tensor, nn.Parameter) else local < math.inf  # false for nan
                names.append(name)
                finite.append(ok.all())
    if not finite or bool(torch.stack([value.to(finite[0].device) for value in finite]).all()):  # one wait for a GPU
        return None
    return next(name for name, value in zip(names, finite, strict=True) if not value)


class NonFiniteLoss:
    """Remembers, on the device, the first step whose loss is not finite.

    `students`: the names of several side by side; the parts of their losses are called NAME/PART.
    """

    def __init__(self, students: Sequence[str] = ()) -> None:
        self._prefixes = [f"{name}/" for name in students] or [""]
        self._alone = not students
        self._first: dict[str, dict[str, Tensor]] = {}  # by prefix: the parts of that loss, and its step or 0 for none
        self._told: set[str] = set()

    def without_lost(self, step: int, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an optimizer step (from 1), which is the sum of its named parts (scalars), and these parts: nan
        where they are of a student that is lost, and left out of the sum.

        The gradient of a lost student is nan, hence its weights, and so it stays lost, also in a continued run.
        """
        kept: dict[str, Tensor] = {}
        for prefix in self._prefixes:
            own = {name: part for name, part in parts.items() if name.startswith(prefix)}
            loss = torch.stack(list(own.values())).sum()
            self._note(prefix, step, loss, own)
            if self._alone:
                return loss, own
            # A factor and no mask: the gradient through a mask is 0 times infinity for some losses, and 0 for others.
            factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
            kept |= {name: part * factor for name, part in own.items()}
        return torch.stack(list(kept.values())).nansum(), kept

    def _note(self, prefix: str, step: int, loss: Tensor, parts: dict[str, Tensor]) -> None:
        now = {name: part.detach().float() for name, part in parts.items()}
        now["step"] = torch.full_like(loss, step, dtype=torch.float32)
        before = self._first.get(prefix) or {name: torch.zeros_like(value) for name, value in now.items()}
        first = ~torch.isfinite(loss.detach()) & (before["step"] == 0)
        self._first[prefix] = {name: torch.where(first, value, before[name]) for name, value in now.items()}

    def is_time_to_look(self, step: int) -> bool:
        device = next(iter(self._first.values()))["step"].device.type
        return device == "cpu" or step % LOOK_EVERY == 0

    def look(self, last_checkpoint: Callable[[], str | None]) -> bool:
        """Whether there is anything left to train. Names the step and the parts of a loss that was not finite: of a
        student among others once, in a warning; alone it is a UserError.
        """
        lost = {prefix: told for prefix, first in self._first.items() if (told := _told(first))}
        if lost and self._alone:
            raise UserError(
                f"the loss is not finite at {lost['']}; try a lower learning rate or --precision fp32; last good "
                f"checkpoint: {last_checkpoint() or 'none yet'}"
            )
        for prefix, told in lost.items():
            self._tell(prefix, f"its loss is not finite at {told}")
        return len(self._told) < len(self._prefixes)

    def look_at_weights(self, step: int, modules: Mapping[str, Sequence[nn.Module]]) -> bool:
        """The same of the weights after a step, in all processes at once: `modules` by student, or those of one alone
        under any name.
        """
        mine = [{name: non_finite_tensor(*own) for name, own in modules.items()}]
        found = {name: tensor for of_process in gather_object(mine) for name, tensor in of_process.items() if tensor}
        if found and self._alone:
            raise UserError(_diverged(next(iter(found.values())), f"after step {step}"))
        for name, tensor in found.items():
            self._tell(f"{name}/", f"{tensor} is not finite after step {step}")
        return len(self._told) < len(self._prefixes)

    def _tell(self, prefix: str, what: str) -> None:
        if prefix not in self._told and PartialState().is_main_process:
            logger.warning("%s diverged: %s", prefix.removesuffix("/"), what)
        self._told.add(prefix)


def _diverged(tensor: str, when: str) -> str:
    return f"training diverged: {tensor} is not finite {when}; {REMEDY}"


def _told(first: dict[str, Tensor]) -> str | None:
    """What is remembered of a loss that was not finite, in words, or None."""
    step = int(first["step"].item())
    if not step:
        return None
    values = {name: value.item() for name, value in first.items() if name != "step"}
    # All of them where each is finite and only their sum is not.
    culprits = {name: value for name, value in values.items() if not math.isfinite(value)} or values
    return f"step {step} ({', '.join(f'{n} = {v:g}' for n, v in culprits.items())})"
