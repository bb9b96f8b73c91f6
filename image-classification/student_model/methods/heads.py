"""Methods that use the classifiers' linear heads in what they match, each a function (pair, *, settings) -> Method.

A head is part of its network and not of the objective: the teacher's is frozen and not saved with what trains, the
student's is trained and ships as ever.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.losses import feature_l2
from kd.common.losses.shared import product, unit
from kd.common.methods import Method
from kd.common.objective import task_loss
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.matching import FeatureMatch, hooked
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.student_model.methods.stages import regressor
from kd.image_classification.teacher_model.classifier import ImageClassifier


def srrl(pair: Pair, *, weight: float = 1.0) -> Method:
    """Pooled features, and what the teacher's head makes of them (Yang et al., Knowledge distillation via softmax
    regression representation learning, ICLR 2021), and the labels' cross-entropy. The teacher needs a linear head.

    This is the loss of the authors' code, which is for ImageNet. SimKD's toolbox, whose figure for CIFAR-100 is quoted
    in the README, adds soft targets of weight 1 at a temperature of 4. The regressor ends in a ReLU only where the
    teacher's map is after one, which it is in all of that toolbox's networks.
    """
    own, target = pair.shapes([], [])
    term = SoftmaxRegression(regressor(own["map"].channels, target["map"]), linear_head(pair.teacher))
    return Method(
        {"task": (1.0, task_loss()), "regression": (weight, term)},
        hooked(pair.student, "map"),
        hooked(pair.teacher, "map"),
    )


def catkd(pair: Pair, *, weight: float = 15.0, size: int = 2, normalized: bool = False) -> Method:
    """Class activation maps, averaged down to `size` pixels (CAT-KD, Guo et al., arXiv:2304.12777), and the labels'
    cross-entropy. `normalized`: each class's map is scaled to length 1, as the authors do for some pairs.

    The defaults are those of ResNet32x4 -> ResNet8x4; the authors change all three by pair, as the loss grows with the
    networks' logits. Both networks need linear heads, which have a bias; the authors' have none.
    """
    maps = ClassActivations(linear_head(pair.student), linear_head(pair.teacher), size, normalized)
    return Method(
        {"task": (1.0, task_loss()), "class_maps": (weight, FeatureMatch("map", "map", maps))},
        hooked(pair.student, "map"),
        hooked(pair.teacher, "map"),
    )


def linear_head(model: ImageClassifier) -> nn.Linear:
    """Raises UserError for a head that is none."""
    if not isinstance(model.head, nn.Linear):
        raise UserError(
            f"this method needs a linear head, but {model.config.architecture} has a {type(model.head).__name__}: "
            "choose another teacher"
        )
    return model.head


class SoftmaxRegression(nn.Module):
    """MSE(g(h_s), h_t) + MSE(teacher's head of g(h_s), teacher's logits), h being pooled features (batch, channels).

    Args:
        regressor: g, from maps of the student's channels to maps of the teacher's.
        head: the teacher's, of which copies are kept that are neither trained nor saved.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, regressor: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.regressor = regressor
        self.register_buffer("weight", head.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", head.bias.detach().clone(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features and teacher.logits is not None
        mapped = self.regressor(student.features["pooled"][:, :, None, None]).flatten(1)  # (batch, teacher's channels)
        logits = F.linear(mapped, self.weight, self.bias)
        return feature_l2(mapped, teacher.features["pooled"]) + feature_l2(logits, teacher.logits)


class ClassActivations(nn.Module):
    """Mean squared difference of class activation maps: of each place of the last map, what it adds to the logits.

    Args:
        student_head: trained where it is, in the student; the loss reaches it.
        teacher_head: of whose weight a copy is kept that is neither trained nor saved.
        size: to which the maps are averaged down, where they are larger.
        normalized: scales each class's map to length 1 after that.
    """

    teacher_weight: Tensor
    reads_student = True  # its weights, which under --fsdp are another copy's

    def __init__(self, student_head: nn.Linear, teacher_head: nn.Linear, size: int, normalized: bool = False) -> None:
        super().__init__()
        self.of_student = (student_head,)  # in a tuple it is no submodule, so that it stays the student's alone
        self.register_buffer("teacher_weight", teacher_head.weight.detach().clone(), persistent=False)
        self.size, self.normalized = size, normalized

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        size = min(self.size, student.shape[-1])
        own = class_maps(student, self.of_student[0].weight, size)
        target = class_maps(teacher, self.teacher_weight, size)
        if self.normalized:
            own, target = unit(own), unit(target)
        return feature_l2(own, target, mask)


def class_maps(features: Tensor, weight: Tensor, size: int) -> Tensor:
    """Class activation maps (batch, classes, size * size) of last maps (batch, channels, height, width) under a head's
    weight (classes, channels). Their mean over all places is the logits without the head's bias.
    """
    places = F.adaptive_avg_pool2d(features.float(), size).flatten(2)  # (batch, channels, size * size)
    return product(weight, places)
