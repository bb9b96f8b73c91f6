"""Methods that listen to a teacher's logits alone, for classifiers of any domain.

Each is a function (task, *, settings) -> terms of an objective; the defaults are its paper's for CIFAR-100, where it
has them. Warm-ups are shares of the training.
"""

from collections.abc import Callable

from common.methods import Task
from common.objective import Terms, soft_targets, task_loss


def kd(task: Task, *, alpha: float = 0.1, temperature: float = 4.0) -> Terms:
    """Soft targets (Hinton et al., arXiv:1503.02531): alpha * labels + (1 - alpha) * T^2 * KL(teacher || student)."""
    return {"task": (alpha, task_loss()), "soft_targets": (1 - alpha, soft_targets(temperature))}


LOGIT_METHODS: dict[str, Callable[..., Terms]] = {"kd": kd}
