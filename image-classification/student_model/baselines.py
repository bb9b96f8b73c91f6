"""What SimKD is measured against: no teacher at all, soft targets, hints, attention maps.

Each is a function (student, teacher, data, alpha, temperature) -> Method.
"""

from collections.abc import Callable

from torch import nn

from common.losses import attention_transfer, feature_l2
from common.objective import Objective, Term, labels_and_soft_targets, task_loss
from common.utils.errors import UserError
from image_classification.data.loading import ImageData
from image_classification.student_model.matching import FeatureMatch, Method, probe, some_images, stage_paths
from image_classification.teacher_model.backbones.base import initialize
from image_classification.teacher_model.classifier import ImageClassifier

HINT_WEIGHT, ATTENTION_WEIGHT = 100.0, 1000.0  # of the papers' CIFAR settings, beside a cross-entropy of weight 1


def kd(
    student: ImageClassifier, teacher: ImageClassifier, data: ImageData, alpha: float, temperature: float
) -> Method:
    """Soft targets (Hinton et al., arXiv:1503.02531): alpha * labels + (1 - alpha) * T^2 * KL."""
    return Method(labels_and_soft_targets(alpha, temperature), logits_only=True)


def fitnet(
    student: ImageClassifier, teacher: ImageClassifier, data: ImageData, alpha: float, temperature: float
) -> Method:
    """A hint at the middle stage, through a regressor (Romero et al., arXiv:1412.6550), beside the labels."""
    own, target = _middle(stage_paths(student)), _middle(stage_paths(teacher))
    images = some_images(data)
    channels, wanted = probe(student, [own], images)[own].channels, probe(teacher, [target], images)[target]
    regressor = nn.Sequential(
        nn.Conv2d(channels, wanted.channels, 1, bias=False),
        nn.BatchNorm2d(wanted.channels),
        nn.ReLU() if wanted.positive else nn.Identity(),
    )
    initialize(regressor)
    hint = FeatureMatch(own, target, feature_l2, regressor)
    return Method(Objective(task=(1.0, task_loss()), hint=(HINT_WEIGHT, hint)), {own: own}, {target: target})


def attention(
    student: ImageClassifier, teacher: ImageClassifier, data: ImageData, alpha: float, temperature: float
) -> Method:
    """Attention maps of every stage (Zagoruyko and Komodakis, arXiv:1612.03928), beside the labels."""
    own, target = stage_paths(student), stage_paths(teacher)
    if len(own) != len(target):
        raise UserError(
            f"--method attention pairs stages one by one, but {student.config.architecture} has {len(own)} and "
            f"{teacher.config.architecture} {len(target)}: choose networks with as many stages"
        )
    terms: dict[str, tuple[float, Term]] = {
        f"attention_{number}": (ATTENTION_WEIGHT, FeatureMatch(a, b, attention_transfer))
        for number, (a, b) in enumerate(zip(own, target, strict=True))
    }
    return Method(Objective(task=(1.0, task_loss()), **terms), {path: path for path in own}, {p: p for p in target})


METHODS: dict[str, Callable[..., Method]] = {"kd": kd, "fitnet": fitnet, "attention": attention}


def _middle(stages: list[str]) -> str:
    return stages[(len(stages) - 1) // 2]
