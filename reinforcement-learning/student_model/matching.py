"""What a student's actions and values are trained for: compositions of common's losses."""

from typing import Literal

import torch
from gymnasium import spaces
from torch import Tensor

from kd.common import losses
from kd.common.objective import Objective, Term
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.teacher_model.policies import greedy_actions

Loss = Literal["kl", "nll", "mse", "huber"]


def policy_and_value(loss: Loss, value_weight: float, value_std: float, action_space: spaces.Space) -> Objective:
    """The policy's loss and, in units of the teacher's standard deviation, the value's squared error. Of discrete
    actions the agreement is watched.

    The value's weight is zero for a teacher without values.
    """
    objective = Objective(policy=(1.0, TERMS[loss]), value=(value_weight / value_std**2, _value))
    return objective.watching(agreement=_agreement) if isinstance(action_space, spaces.Discrete) else objective


def check_loss(loss: Loss, action_space: spaces.Space, deterministic_teacher: bool = False) -> None:
    """Raises UserError for a loss that these actions or this teacher do not have."""
    if loss == "nll" and not isinstance(action_space, spaces.Discrete):
        raise UserError("--loss nll needs discrete actions: pass --loss kl, mse or huber for these continuous ones")
    if loss == "kl" and deterministic_teacher:
        raise UserError(
            "a deterministic teacher has no distribution for --loss kl or --method ppd: pass --loss mse or huber"
        )


def _kl(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """KL(teacher || student) of the action distributions; the teacher's temperature is in its logits already."""
    assert teacher is not None
    if student.logits is not None:
        assert teacher.logits is not None
        return losses.soft_target_kl(student.logits, teacher.logits)
    own, target = student.features or {}, teacher.features or {}
    return losses.gaussian_kl(own["mean"], own["log_std"], target["mean"], target["log_std"])


def _nll(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    assert teacher is not None and student.logits is not None and teacher.logits is not None
    return losses.hard_targets(student.logits, teacher.logits)


def _mse(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    return torch.stack([losses.feature_l2(own, target) for own, target in _parameters(student, teacher)]).sum()


def _huber(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    pairs = _parameters(student, teacher)
    return torch.stack([losses.regression_huber(own.flatten(), target.flatten()) for own, target in pairs]).sum()


def _value(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    assert teacher is not None
    return losses.regression_mse((student.features or {})["value"], (teacher.features or {})["value"])


def _agreement(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """Share of the batch on which the greedy actions are the same."""
    assert teacher is not None
    return (greedy_actions(student) == greedy_actions(teacher)).float().mean()


def _parameters(student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
    """What a regression matches: logits, or means and, of a teacher that has them, standard deviations (their log)."""
    assert teacher is not None
    if student.logits is not None:
        assert teacher.logits is not None
        return [(student.logits, teacher.logits)]
    own, target = student.features or {}, teacher.features or {}
    return [(own[name], target[name]) for name in ("mean", "log_std") if name in target]


TERMS: dict[Loss, Term] = {"kl": _kl, "nll": _nll, "mse": _mse, "huber": _huber}
