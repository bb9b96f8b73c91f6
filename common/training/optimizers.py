"""An optimizer, a schedule and the parameter groups of KDTrainer."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.common.training.arguments import LABELS


class DistillationOrientedSGD(torch.optim.SGD):
    """SGD with separate momentums of labels and distillation (DOT, Zhao et al., ICCV 2023, arXiv:2307.08436).

        v_labels  = (momentum - delta) * v_labels  + gradient of the labels' loss + weight_decay * p
        v_teacher = (momentum + delta) * v_teacher + gradient of all other losses
        p         = p - lr * (v_labels + v_teacher)

    Call backward on the result of `separated`. A parameter with only one of the two gradients has the momentum of SGD,
    as in the published code. With Nesterov's momentum, each v in the last line is replaced by its gradient + its
    momentum * v. delta = 0 is SGD. Dampening is not supported.

    Args:
        delta: Half the difference of the two momentums; 0.075 in the paper.
        others: Arguments of torch.optim.SGD.
    """

    def __init__(self, params: Any, delta: float, **others: Any) -> None:
        super().__init__(params, **others)
        self.delta = delta
        self._gradients: dict[Tensor, Tensor] = {}  # of the distillation, in this step

    def separated(self, parts: Mapping[str, Tensor], share: float = 1.0) -> Tensor:
        """The sum of the parts of a loss, named PART or STUDENT/PART, times `share`.

        Its gradient is that of the labels' parts, called `task`. The gradient of the others is added to that of this
        step. If all parts are of one kind, the gradient is that of the sum.
        """
        labels = [part for name, part in parts.items() if name.split("/")[-1] == LABELS]
        others = [part for name, part in parts.items() if name.split("/")[-1] != LABELS]
        if not labels or not others:
            return share * torch.stack([*labels, *others]).nansum()
        loss = share * torch.stack(others).nansum()  # without the NaN of students that have diverged
        self._add_gradient(loss)
        return share * torch.stack(labels).nansum() + loss.detach()

    def _add_gradient(self, loss: Tensor) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                before = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if before is None else before + gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The step of all parameters; those without a gradient of the distillation make that of SGD."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self._gradients.pop(parameter, None)
                if gradient is not None:
                    self._step(parameter, gradient, group)
                    parameter.grad = None
        return super().step(closure)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        momentum, decay = group["momentum"], group["weight_decay"]
        if parameter.grad is None:
            steps = [("momentum_buffer", momentum, gradient.add(parameter, alpha=decay))]
        else:
            steps = [
                ("momentum_buffer", momentum - self.delta, parameter.grad.add(parameter, alpha=decay)),
                ("teacher_momentum_buffer", momentum + self.delta, gradient),
            ]
        state = self.state[parameter]
        for name, factor, direction in steps:
            if name in state:
                state[name].mul_(factor).add_(direction)
            else:
                state[name] = direction.clone()
            direction = direction.add(state[name], alpha=factor) if group["nesterov"] else state[name]
            parameter.add_(direction, alpha=-group["lr"])


def milestone_schedule(
    optimizer: torch.optim.Optimizer, epochs: Sequence[float], steps_per_epoch: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the learning rate after each of the `epochs`."""
    milestones = [round(epoch * steps_per_epoch) for epoch in epochs]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= m for m in milestones))


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameter groups that submodules define by a method `parameter_groups() -> {name: parameters}`.

    If --NAME_learning_rate is set, the group NAME trains with that learning rate and without weight decay.
    """
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for module in model.modules():
        named: dict[str, list[nn.Parameter]] = getattr(module, "parameter_groups", dict)()
        for name, parameters in named.items():
            groups[name] += parameters
    return groups
