"""The objective of policy distillation: losses between the actions and values of student and teacher."""

from functools import partial

import torch
from einops import rearrange
from gymnasium import spaces
from torch import Tensor

from kd.common import losses
from kd.common.methods import Method
from kd.common.objective import FeatureLoss, FeatureTerm, Term, logit_term
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.student_model.arguments import Loss
from kd.reinforcement_learning.teacher_model.networks import PADDING
from kd.reinforcement_learning.teacher_model.policies import greedy_actions


def policy_and_value(loss: Loss, value_weight: float, value_std: float, action_space: spaces.Space) -> Method:
    """A loss of the actions, plus the squared error of the values in units of the teacher's standard deviation
    (`value_std`). A `value_weight` of zero supports a teacher without values. The agreement of actions with logits is
    logged.
    """
    value = FeatureTerm("value", "value", losses.regression_mse)
    discrete = not isinstance(action_space, spaces.Box)
    policy = logit_term(partial(joint, loss)) if discrete else gaussian_term(loss)
    return Method(
        {"policy": (1.0, policy), "value": (value_weight / value_std**2, value)},
        watched={"agreement": _agreement} if discrete else {},
    )


def joint(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """A loss of logits (batch, actions), or (batch, components, categories) of independent components: kl and nll of
    the joint distribution, which are sums over the components; mse and huber averaged over all logits.
    """
    if student.dim() == 2:
        return LOSSES[loss](student, teacher)
    if loss in ("mse", "huber"):
        exists = student > PADDING / 2
        return LOSSES[loss](student[exists], teacher[exists])
    rows = "batch component category -> (batch component) category"
    return student.shape[1] * LOSSES[loss](rearrange(student, rows), rearrange(teacher, rows))


def same_actions(student: Tensor, teacher: Tensor) -> Tensor:
    """Which of the actions (batch,) or (batch, components) are equal in all components: (batch,) bool."""
    return rearrange(student == teacher, "batch ... -> batch (...)").all(1)


def gaussian_term(loss: Loss) -> Term:
    """A loss of continuous actions: KL(teacher || student), or a regression of the means and, if the teacher has them,
    of the logarithms of the standard deviations.
    """
    if loss == "kl":
        return FeatureTerm(("mean", "log_std"), ("mean", "log_std"), losses.gaussian_kl)
    terms = {name: FeatureTerm(name, name, LOSSES[loss]) for name in ("mean", "log_std")}

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None and teacher.features
        return torch.stack(
            [t(student, teacher, labels) for name, t in terms.items() if name in teacher.features]
        ).sum()

    return term


def check_loss(loss: Loss, action_space: spaces.Space, deterministic_teacher: bool = False) -> None:
    """Raises UserError if the actions or the teacher do not support the loss."""
    if loss == "nll" and isinstance(action_space, spaces.Box):
        raise UserError("--loss nll needs discrete actions: pass --loss kl, mse or huber for continuous actions")
    if loss == "kl" and deterministic_teacher:
        raise UserError(
            "a deterministic teacher has no distribution for --loss kl or --method ppd: pass --loss mse or huber"
        )


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.regression_huber(rearrange(student, "... -> (...)"), rearrange(teacher, "... -> (...)"))


def _agreement(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """Share of the batch with equal greedy actions."""
    assert teacher is not None
    return same_actions(greedy_actions(student), greedy_actions(teacher)).float().mean()


LOSSES: dict[Loss, FeatureLoss] = {  # the temperature of the teacher is in its logits already
    "kl": losses.soft_target_kl,
    "nll": losses.hard_targets,
    "mse": losses.feature_l2,
    "huber": _huber,
}
