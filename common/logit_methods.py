"""Methods that listen to a teacher's logits alone, for classifiers of any domain.

Each is a function (task, *, settings) -> terms of an objective; the defaults are its paper's for CIFAR-100, those of
ResNet32x4 -> ResNet8x4 where they differ. Warm-ups and the like are shares of the training.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common import losses
from common.methods import Task
from common.objective import Scheduled, Term, Terms, Weight, soft_targets, task_loss, warm_up
from common.outputs import Outputs
from common.utils.errors import UserError

MORE_TEMPERATURES = (2.0, 3.0, 5.0, 6.0)  # of multi-level distillation
LARGEST_RISE = 20.0  # of a learnt temperature, above 1


def kd(task: Task, *, alpha: float = 0.1, temperature: float = 4.0) -> Terms:
    """Soft targets (Hinton et al., arXiv:1503.02531): alpha * labels + (1 - alpha) * T^2 * KL(teacher || student)."""
    _needs_a_share("kd", alpha)
    return {"task": (alpha, task_loss()), "soft_targets": (1 - alpha, soft_targets(temperature))}


def dkd(
    task: Task, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup: float = 20 / 240
) -> Terms:
    """Decoupled KD (Zhao et al., arXiv:2203.08679), beside the labels: the label's probability, of weight alpha, and
    the distribution over the other classes, of weight beta (the paper's: 8, 6 or 2 by pair).
    """
    _needs_three(task, "dkd")
    loss = partial(losses.decoupled_kd, alpha=alpha, beta=beta, temperature=temperature)
    return {"task": (1.0, task_loss()), "decoupled": (warm_up(1.0, warmup), logit_term(loss, labelled=True))}


def dist(task: Task, *, weight: float = 2.0, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0) -> Terms:
    """Correlations instead of a divergence (DIST, Huang et al., arXiv:2205.10536), beside the labels: over the classes
    of a sample (beta), and over the samples of a batch (gamma).
    """
    loss = partial(losses.correlation_loss, beta=beta, gamma=gamma, temperature=temperature)
    return {"task": (1.0, task_loss()), "correlations": (weight, logit_term(loss))}


def lskd(task: Task, *, alpha: float = 0.1, weight: float = 9.0, temperature: float = 2.0) -> Terms:
    """Soft targets of standardized logits (Sun et al., arXiv:2403.01427), beside alpha * labels."""
    loss = partial(losses.soft_target_kl, temperature=temperature)
    return {"task": (alpha, task_loss()), "soft_targets": (weight, logit_term(loss, standardize=True))}


def dkd_ls(
    task: Task, *, alpha: float = 9.0, beta: float = 72.0, temperature: float = 2.0, warmup: float = 20 / 240
) -> Terms:
    """Decoupled KD of standardized logits (Sun et al., arXiv:2403.01427), beside the labels."""
    _needs_three(task, "dkd_ls")
    loss = partial(losses.decoupled_kd, alpha=alpha, beta=beta, temperature=temperature)
    term = logit_term(loss, labelled=True, standardize=True)
    return {"task": (1.0, task_loss()), "decoupled": (warm_up(1.0, warmup), term)}


def mlkd(
    task: Task,
    *,
    alpha: float = 0.1,
    weight: float = 0.9,
    temperature: float = 4.0,
    class_relations: float = 1.0,
    sample_relations: float = 1.0,
) -> Terms:
    """Multi-level logit distillation (Jin et al., CVPR 2023), beside alpha * labels: soft targets, relations of
    classes and relations of samples, each summed over the temperature and MORE_TEMPERATURES.

    Of whatever views the batch holds: the paper's weak and strong ones are `--strong_views`. Its code means to leave
    out the half of samples and classes that the teacher is surest of, but multiplies whole sums by the means of these
    masks, which is a factor of about a half; there are no masks here. Its other losses are sums over the two views
    where these are means, which twice its learning rate makes up for, and its relations are those of weak views.

    The last two settings are factors of the relations. Between sure predictions those of classes go with
    (batch / classes)^2 and those of samples with batch / classes, and the paper's is 64 / 100: for 10 classes in
    batches of 128 factors of 0.0025 and 0.05 keep them as large as they are there.
    """
    return {
        "task": (alpha, task_loss()),
        "soft_targets": (weight, _at_all(losses.soft_target_kl, temperature)),
        "class_relations": (weight * class_relations, _at_all(losses.class_relations, temperature)),
        "sample_relations": (weight * sample_relations, _at_all(losses.sample_relations, temperature)),
    }


def mlkd_ls(
    task: Task,
    *,
    alpha: float = 0.1,
    weight: float = 9.0,
    temperature: float = 2.0,
    class_relations: float = 1.0,
    sample_relations: float = 1.0,
) -> Terms:
    """`mlkd` with standardized logits in its soft targets (Sun et al., arXiv:2403.01427); its relations stay."""
    terms = mlkd(
        task,
        alpha=alpha,
        weight=weight,
        temperature=temperature,
        class_relations=class_relations,
        sample_relations=sample_relations,
    )
    return terms | {"soft_targets": (weight, _at_all(losses.soft_target_kl, temperature, standardize=True))}


def ctkd(task: Task, *, alpha: float = 0.1, curriculum: float = 10 / 240) -> Terms:
    """Soft targets at a temperature that is learnt against the student (Li et al., arXiv:2211.16231), beside
    alpha * labels. `curriculum`: the share of the training over which the adversary gains its strength.
    """
    _needs_a_share("ctkd", alpha)
    return {"task": (alpha, task_loss()), "soft_targets": (1 - alpha, AdversarialTemperature(curriculum))}


def wkd(task: Task, *, weight: float = 600.0, temperature: float = 8.0, decay_from: float = 150 / 240) -> Terms:
    """Transport between logits (WKD-L, Lv et al., arXiv:2412.08139), beside the labels: the label's probability, and
    the cost of moving that of the other classes, whose weight falls with a cosine from `decay_from` of the training
    on. To move is as dear as the teacher's features of two classes are unlike: 1 - exp(-(1 - similarity)).
    """
    _needs_three(task, "wkd")
    return {
        "task": (1.0, task_loss()),
        "label": (1.0, logit_term(losses.label_probability, labelled=True)),
        "transport": (cosine_decay(weight, decay_from), transport_term(task, temperature)),
    }


def logit_term(loss: Callable[..., Tensor], labelled: bool = False, standardize: bool = False) -> Term:
    """A term of a loss of student's and teacher's logits (batch, classes), and of the labels (batch,)."""

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        own, target = student.logits, teacher.logits
        if standardize:
            own, target = losses.standardized(own), losses.standardized(target)
        return loss(own, target, labels) if labelled else loss(own, target)

    return term


def transport_term(task: Task, temperature: float) -> Term:
    """`losses.transport`, whose cost is made of the teacher's features when it is first needed."""
    known: list[Tensor] = []

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        if not known:
            similarity = losses.class_similarity(*task.teacher_features(), task.classes)
            known.append(1 - (similarity - 1).exp())
        cost = known[0].to(student.logits.device)
        return losses.transport(student.logits, teacher.logits, labels, cost, temperature)  # type: ignore[arg-type]

    return term


class AdversarialTemperature(Scheduled):
    """Soft targets at T = 1 + 20 * sigmoid(parameter); the parameter climbs the loss that the student descends.

    Its gradient is reversed and scaled by a strength that rises with a cosine from 0 to 1 over `curriculum` of the
    training (arXiv:2211.16231).
    """

    def __init__(self, curriculum: float) -> None:
        super().__init__()
        if not 0 < curriculum <= 1:
            raise UserError(f"ctkd:curriculum={curriculum}: it is a share of the training, above 0 and at most 1")
        self.curriculum = curriculum
        self.parameter = nn.Parameter(torch.tensor(1.0))

    @property
    def strength(self) -> float:
        return (1 - math.cos(math.pi * min(self.progress / self.curriculum, 1.0))) / 2

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        # The value of the parameter, with its gradient times -strength.
        reversed_parameter = (1 + self.strength) * self.parameter.detach() - self.strength * self.parameter
        temperature = 1 + LARGEST_RISE * reversed_parameter.sigmoid()
        return losses.soft_target_kl(student.logits, teacher.logits, temperature)


def cosine_decay(weight: float, start: float) -> Weight:
    """A weight that falls to 0 with a cosine over what is left of a training after the share `start`."""

    def falling(progress: float) -> float:
        done = max(0.0, progress - start) / max(1 - start, 1e-9)
        return weight * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return weight if weight == 0 else falling


def _at_all(loss: Callable[..., Tensor], temperature: float, standardize: bool = False) -> Term:
    """A term of the sum of a loss of logits over the temperature and MORE_TEMPERATURES."""

    def summed(own: Tensor, target: Tensor) -> Tensor:
        return torch.stack([loss(own, target, temperature=t) for t in (temperature, *MORE_TEMPERATURES)]).sum()

    return logit_term(summed, standardize=standardize)


def _needs_three(task: Task, name: str) -> None:
    if task.classes < 3:
        raise UserError(f"method {name} needs at least 3 classes, and there are {task.classes}: choose another method")


def _needs_a_share(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"method {name}: alpha={alpha:g} is no share, as 1 - alpha is the soft targets': 0 to 1")


LOGIT_METHODS: dict[str, Callable[..., Terms]] = {
    "kd": kd,
    "dkd": dkd,
    "dist": dist,
    "lskd": lskd,
    "dkd_ls": dkd_ls,
    "mlkd": mlkd,
    "mlkd_ls": mlkd_ls,
    "ctkd": ctkd,
    "wkd": wkd,
}
