"""Methods that need only the teacher's logits, for classifiers of any domain.

The defaults are the papers' for CIFAR-100, those of ResNet32x4 -> ResNet8x4 where they differ. Warm-ups, curricula and
decays are shares of the training, and change with every step; in the authors' code they change with every epoch.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods.method import Method, TaskSpec, labels, labels_and_soft_targets
from kd.common.objective import Scheduled, Term, cosine_decay, logit_term, warm_up
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, Share, ShareAbove0

MORE_TEMPERATURES = (2.0, 3.0, 5.0, 6.0)  # of multi-level distillation
LARGEST_RISE = 20.0  # of a trained temperature, above 1


def kd(spec: TaskSpec, *, alpha: Share = 0.1, temperature: Positive = 4.0) -> Method:
    """Soft targets (Hinton et al., arXiv:1503.02531): alpha * labels + (1 - alpha) * T^2 * KL(teacher || student)."""
    return labels_and_soft_targets(alpha, temperature)


def dkd(
    spec: TaskSpec, *, alpha: float = 1.0, beta: float = 8.0, temperature: Positive = 4.0, warmup: Share = 20 / 240
) -> Method:
    """Decoupled KD (Zhao et al., arXiv:2203.08679), plus the labels' cross-entropy: the label's probability, of weight
    alpha, and the distribution over the other classes, of weight beta (published: 8, 6 or 2 by pair). The weights rise
    linearly from 0 over the share `warmup` of the training; in the authors' code from 1/20 in the first epoch.
    """
    _needs_classes(spec, "dkd", 3)
    loss = partial(losses.decoupled_kd, alpha=alpha, beta=beta, temperature=temperature)
    return labels() + Method({"decoupled": (warm_up(1.0, warmup), logit_term(loss, labels=True))})


def dist(
    spec: TaskSpec, *, weight: float = 2.0, beta: float = 1.0, gamma: float = 1.0, temperature: Positive = 4.0
) -> Method:
    """Correlations instead of a divergence (DIST, Huang et al., arXiv:2205.10536) plus the labels: over the classes
    of a sample (beta), and over the samples of a batch (gamma).
    """
    loss = partial(losses.correlation_loss, beta=beta, gamma=gamma, temperature=temperature)
    return labels() + Method({"correlations": (weight, logit_term(loss))})


def lskd(spec: TaskSpec, *, alpha: float = 0.1, weight: float = 9.0, temperature: Positive = 2.0) -> Method:
    """Soft targets of standardized logits (Sun et al., arXiv:2403.01427), and alpha * labels. Weight and temperature
    differ by pair in the authors' runs.
    """
    _needs_classes(spec, "lskd", 2)
    loss = partial(losses.soft_target_kl, temperature=temperature)
    return labels(alpha) + Method({"soft_targets": (weight, logit_term(loss, standardize=True))})


def dkd_ls(
    spec: TaskSpec, *, alpha: float = 9.0, beta: float = 72.0, temperature: Positive = 2.0, warmup: Share = 20 / 240
) -> Method:
    """`dkd` of standardized logits (Sun et al., arXiv:2403.01427). The authors give a weight, here 9, and multiply
    DKD's alpha (1) and beta (8, for other pairs 2) by it.
    """
    _needs_classes(spec, "dkd_ls", 3)
    loss = partial(losses.decoupled_kd, alpha=alpha, beta=beta, temperature=temperature)
    term = logit_term(loss, labels=True, standardize=True)
    return labels() + Method({"decoupled": (warm_up(1.0, warmup), term)})


def mlkd(
    spec: TaskSpec,
    *,
    alpha: float = 0.1,
    weight: float = 0.9,
    temperature: Positive = 4.0,
    class_relations: float = 1.0,
    sample_relations: float = 1.0,
) -> Method:
    """Multi-level logit distillation (Jin et al., CVPR 2023): alpha * labels, soft targets, relations of classes and
    relations of samples, each of the last three summed over the temperature and MORE_TEMPERATURES.

    The published figures are those of two views of each image, `--strong_augmentation`. As in the authors' code, the
    labels' loss and the soft targets are then sums over the views. The relations are those of the first, weak views.

    Two slips of that code are not reproduced. At two of the five temperatures its soft targets of strong views are
    computed from the weak views' logits. And what should leave out the samples and classes that the teacher is most
    confident in multiplies losses, which are averaged already, by the mean of a mask: about a half of the relations
    and of the weak views' soft targets. There are no masks here.

    `class_relations` and `sample_relations` are factors. Between confident predictions the former loss grows with
    (batch / classes)^2 and the latter with batch / classes, and the paper has 64 / 100: for 10 classes in batches of
    128, factors of 0.0025 and 0.05 keep them as large as they are there.
    """
    return _multi_level(spec.views, alpha, weight, temperature, class_relations, sample_relations, standardize=False)


def mlkd_ls(
    spec: TaskSpec,
    *,
    alpha: float = 0.1,
    weight: float = 9.0,
    temperature: Positive = 2.0,
    class_relations: float = 1.0,
    sample_relations: float = 1.0,
) -> Method:
    """`mlkd` with standardized logits in its soft targets, but not in its relations (Sun et al., arXiv:2403.01427).

    For some pairs the authors' weight is 6.
    """
    _needs_classes(spec, "mlkd_ls", 2)
    return _multi_level(spec.views, alpha, weight, temperature, class_relations, sample_relations, standardize=True)


def _multi_level(
    views: int,
    alpha: float,
    weight: float,
    temperature: float,
    class_relations: float,
    sample_relations: float,
    standardize: bool,
) -> Method:
    soft_targets = _at_all(losses.soft_target_kl, temperature, standardize=standardize)
    return labels(views * alpha) + Method(
        {  # means over a batch of several views, times their number: sums over the views
            "soft_targets": (views * weight, soft_targets),
            "class_relations": (weight * class_relations, _at_all(losses.class_relations, temperature, views)),
            "sample_relations": (weight * sample_relations, _at_all(losses.sample_relations, temperature, views)),
        }
    )


def ctkd(spec: TaskSpec, *, alpha: Share = 0.1, curriculum: ShareAbove0 = 10 / 240) -> Method:
    """Soft targets at a temperature that is trained against the student (Li et al., arXiv:2211.16231), and
    alpha * labels: the authors' global temperature. `curriculum`: the share of the training over which the adversary
    gains its strength.
    """
    return labels(alpha) + Method({"soft_targets": (1 - alpha, AdversarialTemperature(curriculum))})


def wkd(
    spec: TaskSpec, *, weight: float = 600.0, temperature: Positive = 8.0, decay_from: Share = 150 / 240
) -> Method:
    """Transport between logits (WKD-L, Lv et al., arXiv:2412.08139), plus the labels' cross-entropy: the label's
    probability, and the cost of moving that of the other classes, whose weight falls with a cosine from `decay_from`
    of the training on. Moving costs 1 - exp(-(1 - similarity)) between two classes.

    The similarity is not that of the authors' generator. Both are linear CKA of the teacher's pooled features, but
    the generator pairs the n-th training image of one class with the n-th of the other, over all images;
    `losses.class_similarity` compares the covariances of their features, which needs no pairs, over the first
    PER_CLASS images of each class.
    """
    _needs_classes(spec, "wkd", 3)
    return labels() + Method(
        {
            "label": (1.0, logit_term(losses.label_probability, labels=True)),
            "transport": (cosine_decay(weight, decay_from), transport_term(spec, temperature)),
        }
    )


def transport_term(spec: TaskSpec, temperature: float) -> Term:
    """`losses.transport`; its cost is computed from the teacher's features in the first step."""

    @cache
    def cost() -> Tensor:
        similarity = losses.class_similarity(*spec.teacher_samples(), spec.classes)
        return 1 - (similarity - 1).exp()

    def loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        on_device = cost().to(student_logits.device)
        return losses.transport(student_logits, teacher_logits, labels, on_device, temperature)

    return logit_term(loss, labels=True)


class AdversarialTemperature(Scheduled):
    """Soft targets at T = 1 + 20 * sigmoid(parameter); the parameter climbs the loss that the student descends.

    Its gradient is reversed and scaled by a strength that rises with a cosine from 0 to 1 over `curriculum` of the
    training (arXiv:2211.16231).
    """

    def __init__(self, curriculum: float) -> None:
        super().__init__()
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


def _at_all(loss: Callable[..., Tensor], temperature: float, views: int = 1, standardize: bool = False) -> Term:
    """A term of the sum of a loss over the temperature and MORE_TEMPERATURES, for the first of `views`."""

    def summed(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        first_views = [logits[: len(logits) // views] for logits in (student_logits, teacher_logits)]
        return torch.stack([loss(*first_views, temperature=t) for t in (temperature, *MORE_TEMPERATURES)]).sum()

    return logit_term(summed, standardize=standardize)


def _needs_classes(spec: TaskSpec, name: str, least: int) -> None:
    if spec.classes < least:
        raise UserError(
            f"method {name} needs at least {least} classes, and there are {spec.classes}: choose another method"
        )


LOGIT_METHODS: dict[str, Callable[..., Method]] = {
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
