"""Methods for classifiers of any domain: some match logits, the others the relations between the samples of a batch.

The default arguments are those of the papers for CIFAR-100; if they differ by teacher-student pair, those of
ResNet32x4 -> ResNet8x4. The weights of relation losses are for a cross-entropy of weight 1, as in the common
toolboxes. Warm-ups, curricula and decays are shares of the training and change with every step; in the authors' code
they change with every epoch.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.methods.method import Method, TaskSpec, labels, labels_and_soft_targets, match
from kd.common.objective import Scheduled, Term, cosine_decay, logit_term, warm_up
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, Share, ShareAbove0

MORE_TEMPERATURES = (2.0, 3.0, 5.0, 6.0)  # of multi-level distillation, in addition to its argument `temperature`
LARGEST_RISE = 20.0  # a trained temperature is between 1 and 1 + LARGEST_RISE


# ---- logits ----


def kd(spec: TaskSpec, *, alpha: Share = 0.1, temperature: Positive = 4.0) -> Method:
    """Soft targets (Hinton et al., arXiv:1503.02531): alpha * labels + (1 - alpha) * T^2 * KL(teacher || student)."""
    return labels_and_soft_targets(alpha, temperature)


def dkd(
    spec: TaskSpec, *, alpha: float = 1.0, beta: float = 8.0, temperature: Positive = 4.0, warmup: Share = 20 / 240
) -> Method:
    """Decoupled KD (Zhao et al., arXiv:2203.08679), plus the labels' cross-entropy. alpha is the weight of the label's
    probability, beta of the distribution over the other classes (8, 6 or 2 in the paper, depending on the pair). Both
    weights rise linearly from 0 over the share `warmup` of the training; in the authors' code they start at 1/20 in
    the first epoch.
    """
    _needs_classes(spec, "dkd", 3)
    loss = partial(losses.decoupled_kd, alpha=alpha, beta=beta, temperature=temperature)
    return labels() + Method({"decoupled": (warm_up(1.0, warmup), logit_term(loss, labels=True))})


def dist(
    spec: TaskSpec, *, weight: float = 2.0, beta: float = 1.0, gamma: float = 1.0, temperature: Positive = 4.0
) -> Method:
    """Correlations instead of a divergence (DIST, Huang et al., arXiv:2205.10536), plus the labels. beta is the weight
    of the correlations over the classes of a sample, gamma of those over the samples of a batch.
    """
    loss = partial(losses.correlation_loss, beta=beta, gamma=gamma, temperature=temperature)
    return labels() + Method({"correlations": (weight, logit_term(loss))})


def lskd(spec: TaskSpec, *, alpha: float = 0.1, weight: float = 9.0, temperature: Positive = 2.0) -> Method:
    """Soft targets of standardized logits (Sun et al., arXiv:2403.01427), plus alpha * labels. In the authors' runs
    weight and temperature differ by pair.
    """
    _needs_classes(spec, "lskd", 2)
    loss = partial(losses.soft_target_kl, temperature=temperature)
    return labels(alpha) + Method({"soft_targets": (weight, logit_term(loss, standardize=True))})


def dkd_ls(
    spec: TaskSpec, *, alpha: float = 9.0, beta: float = 72.0, temperature: Positive = 2.0, warmup: Share = 20 / 240
) -> Method:
    """`dkd` of standardized logits (Sun et al., arXiv:2403.01427). The authors multiply DKD's alpha (1) and beta (8,
    or 2 for other pairs) by a weight, here 9.
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
    relations of samples. The last three are summed over `temperature` and MORE_TEMPERATURES.

    The published figures use two views of each image (`--strong_augmentation`). As in the authors' code, the labels'
    loss and the soft targets are then summed over the views, and the relations use the first, weak views.

    Two bugs of that code are not reproduced. At two of the five temperatures, it computes the soft targets of strong
    views from the weak views' logits. It also multiplies losses that are already averaged by the mean of a confidence
    mask, which halves the relations and the weak views' soft targets. There are no masks here.

    `class_relations` and `sample_relations` are factors of these losses. For confident predictions, the former loss
    grows with (batch / classes)^2 and the latter with batch / classes, which is 64 / 100 in the paper. For 10 classes
    and batches of 128, factors of 0.0025 and 0.05 keep the losses as large as in the paper.
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
    """`mlkd` with standardized logits in the soft targets, but not in the relations (Sun et al., arXiv:2403.01427).

    The authors' weight is 6 for some pairs.
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
    """Soft targets at a temperature that is trained adversarially (CTKD, Li et al., arXiv:2211.16231), plus
    alpha * labels. This is the authors' global temperature. `curriculum` is the share of the training over which the
    strength of the adversary rises.
    """
    return labels(alpha) + Method({"soft_targets": (1 - alpha, AdversarialTemperature(curriculum))})


def wkd(
    spec: TaskSpec, *, weight: float = 600.0, temperature: Positive = 8.0, decay_from: Share = 150 / 240
) -> Method:
    """Optimal transport between logits (WKD-L, Lv et al., arXiv:2412.08139), plus the labels' cross-entropy. The
    loss has the label's probability, and the cost of transporting probability between the other classes, whose weight
    decays along a cosine from the progress `decay_from`. The cost between two classes is 1 - exp(-(1 - similarity)).

    The similarity differs from that of the authors' generator. Both are linear CKA of the teacher's pooled features.
    The generator pairs the n-th training image of one class with the n-th of the other, over all images.
    `losses.class_similarity` compares the covariances of the features, which needs no pairs, over the first PER_CLASS
    images of each class.
    """
    _needs_classes(spec, "wkd", 3)
    return labels() + Method(
        {
            "label": (1.0, logit_term(losses.label_probability, labels=True)),
            "transport": (cosine_decay(weight, decay_from), transport_term(spec, temperature)),
        }
    )


def transport_term(spec: TaskSpec, temperature: float) -> Term:
    """A term of `losses.transport`. The first step computes the cost from the teacher's features."""

    @cache
    def cost() -> Tensor:
        similarity = losses.class_similarity(*spec.teacher_samples(), spec.classes)
        return 1 - (similarity - 1).exp()

    def loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        on_device = cost().to(student_logits.device)
        return losses.transport(student_logits, teacher_logits, labels, on_device, temperature)

    return logit_term(loss, labels=True)


def rld(
    spec: TaskSpec, *, alpha: float = 1.0, beta: float = 8.0, temperature: Positive = 4.0, warmup: Share = 20 / 240
) -> Method:
    """Refined logits (RLD, Sun et al., ICCV 2025, arXiv:2408.07703), plus the labels' cross-entropy. alpha is the
    weight of the teacher's confidence, beta of the distribution over the classes that it ranks below the label. Both
    weights warm up as in `dkd`. The arguments are those of the command in the authors' README.
    """
    _needs_classes(spec, "rld", 2)
    loss = partial(losses.refined_kd, alpha=alpha, beta=beta, temperature=temperature)
    return labels() + Method({"refined": (warm_up(1.0, warmup), logit_term(loss, labels=True))})


def abkd(
    spec: TaskSpec, *, alpha: float = 0.8, beta: float = 0.3, weight: float = 2.0, temperature: Positive = 4.0
) -> Method:
    """Alpha-beta divergence (ABKD, Wang et al., ICML 2025, arXiv:2505.04560): labels + weight * T^2 * D(teacher ||
    student). Less alpha emphasizes classes with large errors, more beta those of which the student is confident.
    (1, 0) is the forward KL of `kd`, (0, 1) the reverse KL.

    alpha, beta and weight are those of the authors' README for ResNet56 -> ResNet20, whose weight of 32 is for D
    without T^2. It lists no temperature; 4 is that of `kd`.
    """
    if alpha == beta == 0:
        raise UserError("method abkd needs alpha or beta above 0: raise one")
    loss = partial(losses.alpha_beta, temperature=temperature, alpha=alpha, beta=beta)
    return labels() + Method({"divergence": (weight, logit_term(loss))})


def vrm(spec: TaskSpec, *, sample_weight: float = 4.0, class_weight: float = 4.0, keep: ShareAbove0 = 0.5) -> Method:
    """Virtual relations (VRM, Zhang et al., ICCV 2025, arXiv:2502.20760): directions of the differences between
    samples and between classes, plus the labels' cross-entropy of all views.

    Samples are related across two views of each image (`--strong_augmentation`), as in the paper, and with one view
    among themselves. `keep` is the share of these relations that is not pruned: those with the smallest joint entropy.

    This is the core of the method: it was not compared with the authors' code, the weights and `keep` are not theirs,
    and their logit adapter is left out.
    """
    _needs_classes(spec, "vrm", 2)
    samples = partial(losses.sample_directions, views=spec.views, keep=keep)
    return labels() + Method(
        {
            "samples": (sample_weight, logit_term(samples)),
            "classes": (class_weight, logit_term(losses.class_directions)),
        }
    )


class AdversarialTemperature(Scheduled):
    """Soft targets at T = 1 + 20 * sigmoid(parameter). The parameter maximizes the loss that the student minimizes.

    Its gradient is reversed and scaled by a strength that rises along a cosine from 0 to 1 over the share `curriculum`
    of the training (arXiv:2211.16231).
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
    """A term that sums a loss over `temperature` and MORE_TEMPERATURES, for the first of `views` views."""

    def summed(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        first_views = [logits[: len(logits) // views] for logits in (student_logits, teacher_logits)]
        return torch.stack([loss(*first_views, temperature=t) for t in (temperature, *MORE_TEMPERATURES)]).sum()

    return logit_term(summed, standardize=standardize)


def _needs_classes(spec: TaskSpec, name: str, least: int) -> None:
    if spec.classes < least:
        raise UserError(
            f"method {name} needs at least {least} classes, and the data have {spec.classes}: choose another method"
        )


# ---- relations between samples ----


def rkd(spec: TaskSpec, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Method:
    """Relative distances and angles of pooled features (Park et al., arXiv:1904.05068), plus the labels."""
    distances = spec.match_pooled("distances", distance_weight, losses.rkd_distance)
    return labels() + distances + spec.match_pooled("angles", angle_weight, losses.rkd_angle)


def sp(spec: TaskSpec, *, weight: float = 3000.0) -> Method:
    """Similarities of the last features before pooling (SP, arXiv:1907.09682), plus the labels."""
    last, teacher_last = spec.student_features.last, spec.teacher_features.last
    loss = losses.similarity_preserving
    return labels() + match("similarities", weight, last, teacher_last, loss, transform=spec.flatten)


def pkt(spec: TaskSpec, *, weight: float = 30000.0) -> Method:
    """Probabilities of neighbours by the cosine of pooled features (PKT, Passalis and Tefas, arXiv:1803.10837), plus
    the labels.
    """
    return labels() + spec.match_pooled("neighbours", weight, losses.pkt)


def cc(spec: TaskSpec, *, weight: float = 0.02, width: int = 128) -> Method:
    """Correlation congruence of embedded features (Peng et al., arXiv:1904.01802), plus the labels.

    The embedding of the student's features is trained, that of the teacher's is random and fixed. The toolbox of CRD
    trains both, so that shrinking both to zero minimizes its loss for any student.
    """
    widths = spec.student_features.head.width, spec.teacher_features.head.width
    return labels() + spec.match_pooled("congruence", weight, EmbeddedCongruence(*widths, width))


class EmbeddedCongruence(nn.Module):
    """`correlation_congruence` of linear embeddings (batch, width) of pooled features. The student's embedding is
    trained, the teacher's is random and fixed.
    """

    teacher_embedding: Tensor

    def __init__(self, student_width: int, teacher_width: int, width: int) -> None:
        super().__init__()
        self.student_embedding = nn.Linear(student_width, width)
        fixed = nn.Linear(teacher_width, width, bias=False)
        self.register_buffer("teacher_embedding", fixed.weight.detach())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return losses.correlation_congruence(
            self.student_embedding(student), F.linear(teacher, self.teacher_embedding)
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
    "rld": rld,
    "abkd": abkd,
    "vrm": vrm,
}
RELATION_METHODS: dict[str, Callable[..., Method]] = {"rkd": rkd, "sp": sp, "pkt": pkt, "cc": cc}
METHODS = LOGIT_METHODS | RELATION_METHODS
