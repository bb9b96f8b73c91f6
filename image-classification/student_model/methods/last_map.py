"""Methods that match the last map, or use the classifiers' linear heads on it.

A head is part of its network and not of the objective: the teacher's is frozen and not saved with what trains, the
student's is trained and ships.
"""

from dataclasses import replace

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kd.common.losses import feature_l2
from kd.common.losses.shared import product, unit
from kd.common.methods import Method, TaskSpec, hooked, labels, match
from kd.common.objective import Weight
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.matching import pooled
from kd.image_classification.student_model.methods.stages import regressor
from kd.image_classification.teacher_model.classifier import ImageClassifier

PHASES = ((10 / 240, 0.1), (20 / 240, 0.5), (180 / 240, 1.0), (210 / 240, 0.5), (1.0, 0.1))  # (until, share of weight)


def srrl(spec: TaskSpec, *, weight: float = 1.0) -> Method:
    """Pooled features, and the logits of the teacher's head for them (Yang et al., Knowledge distillation via softmax
    regression representation learning, ICLR 2021), plus the labels' cross-entropy. The teacher needs a linear head.

    This is the loss of the authors' code, which is for ImageNet. SimKD's toolbox, whose figure for CIFAR-100 is quoted
    in the README, adds soft targets of weight 1 at a temperature of 4. The regressor ends in a ReLU only where the
    teacher's map is after one, which it is in all of that toolbox's networks.
    """
    student, teacher = spec.student_features.head, spec.teacher_features.head
    term = SoftmaxRegression(student.path, teacher.path, regressor(student, teacher), linear_head(spec.teacher))
    return labels() + Method({"regression": (weight, term)}, hooked(student), hooked(teacher))


def catkd(spec: TaskSpec, *, weight: float = 15.0, size: int = 2, normalized: bool = False) -> Method:
    """Class activation maps, averaged down to `size` pixels (CAT-KD, Guo et al., arXiv:2304.12777), and the labels'
    cross-entropy. `normalized`: each class's map is scaled to length 1, as the authors do for some pairs.

    The defaults are those of ResNet32x4 -> ResNet8x4; the authors change all three by pair, as the loss grows with the
    networks' logits. Both networks need linear heads, which have a bias; the authors' have none.
    """
    loss = ClassActivations(linear_head(spec.student), linear_head(spec.teacher), size, normalized)
    return labels() + match("class_maps", weight, spec.student_features.head, spec.teacher_features.head, loss)


def norm(spec: TaskSpec, *, copies: int = 8, alpha: float = 0.1, weight: float = 1.0) -> Method:
    """N-to-one representations (NORM, Liu et al., arXiv:2305.13803): alpha * labels + weight * n_to_one, the weight in
    the phases of the authors' code.

    A linear layer, a 1x1 convolution with batch norm, expands the student's last map to `copies` times the teacher's
    channels, each of which is to be the teacher's map. In the paper a second one contracts its output, and the sum
    of the two maps goes to the student's head, into which both layers are folded in the end. That contraction is left
    out here: what is trained is what ships, so the labels train the plain student, and the expansion is a regressor.
    Nor are logits standardized under the labels' loss, as they are in the authors' code, and a teacher's map that is
    larger than the student's is averaged down where that code takes maxima. The published figures are the best of four
    values of alpha, 0.0625 to 0.5.

    The maps are those of the authors' networks: the teacher's is that of its last stage, and so is a student's, but
    MobileNetV2's and ShuffleNetV2's is the one after the last 1x1 convolution.
    """
    has_expansion = spec.student.backbone.last is not None
    student = spec.student_features.head if has_expansion else spec.student_features.last
    teacher = spec.teacher_features.last
    expanded = replace(teacher, width=copies * teacher.width, positive=False)
    return labels(alpha) + match(
        "representations", in_phases(weight), student, teacher, n_to_one, regressor(student, expanded)
    )


def linear_head(model: ImageClassifier) -> nn.Linear:
    """Raises UserError for a head that is not linear."""
    if not isinstance(model.head, nn.Linear):
        raise UserError(
            f"this method needs a linear head, but {model.config.architecture} has a {type(model.head).__name__}: "
            "choose another teacher"
        )
    return model.head


class SoftmaxRegression(nn.Module):
    """MSE(g(h_s), h_t) + MSE(teacher's head of g(h_s), teacher's logits), h being pooled features (batch, channels).

    Args:
        student, teacher: the features whose averages the heads see.
        regressor: g, from maps of the student's channels to maps of the teacher's.
        head: the teacher's, of which copies are kept that are neither trained nor saved.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, student: str, teacher: str, regressor: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.student, self.teacher, self.regressor = student, teacher, regressor
        self.register_buffer("weight", head.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", head.bias.detach().clone(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features and teacher.logits is not None
        features = rearrange(pooled(student.features[self.student]), "batch channels -> batch channels 1 1")
        mapped = rearrange(self.regressor(features), "batch channels 1 1 -> batch channels")
        logits = F.linear(mapped, self.weight, self.bias)
        return feature_l2(mapped, pooled(teacher.features[self.teacher])) + feature_l2(logits, teacher.logits)


class ClassActivations(nn.Module):
    """Mean squared difference of class activation maps: the contribution of each place of the last map to the logits.

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
        maps = class_maps(student, self.of_student[0].weight, size)
        teacher_maps = class_maps(teacher, self.teacher_weight, size)
        if self.normalized:
            maps, teacher_maps = unit(maps), unit(teacher_maps)
        return feature_l2(maps, teacher_maps, mask)


def class_maps(features: Tensor, weight: Tensor, size: int) -> Tensor:
    """Class activation maps (batch, classes, size * size) of last maps (batch, channels, height, width) under a head's
    weight (classes, channels). Their mean over all places is the logits without the head's bias.
    """
    places = F.adaptive_avg_pool2d(features.float(), size)
    return product(weight, rearrange(places, "batch channels height width -> batch channels (height width)"))


def n_to_one(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the N parts of the student's map (batch, N * channels, height, width), one after the other along the
    channels, of their mean squared differences from the teacher's (batch, channels, height, width).

    `mask` (batch,) restricts the means to the samples that it keeps.
    """
    copies = student.shape[1] // teacher.shape[1]
    teacher = repeat(teacher, "batch channels ... -> batch (copies channels) ...", copies=copies)
    return copies * feature_l2(student, teacher, mask)


def in_phases(weight: float) -> Weight:
    """A weight that is a share of itself in each of PHASES; zero stays zero."""
    if weight == 0:
        return 0.0
    return lambda progress: weight * next((share for until, share in PHASES if progress < until), PHASES[-1][1])
