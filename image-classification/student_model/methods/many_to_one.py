"""NORM: many representations of the student's matched to one of the teacher's."""

from dataclasses import replace

from torch import Tensor

from kd.common.losses import feature_l2
from kd.common.methods import Method
from kd.common.objective import Weight, task_loss
from kd.image_classification.student_model.matching import FeatureMatch, hooked
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.student_model.methods.stages import regressor

PHASES = ((10 / 240, 0.1), (20 / 240, 0.5), (180 / 240, 1.0), (210 / 240, 0.5), (1.0, 0.1))  # (until, share of weight)


def norm(pair: Pair, *, copies: int = 8, alpha: float = 0.1, weight: float = 1.0) -> Method:
    """N-to-one representations (NORM, Liu et al., arXiv:2305.13803): alpha * labels + weight * n_to_one, the weight in
    the phases of the authors' code.

    A linear layer, a 1x1 convolution with batch norm, expands the student's last map to `copies` times the teacher's
    channels, each of which is to be the teacher's map. In the paper a second one contracts what came out, and the sum
    of the two maps goes to the student's head, into which both layers are folded in the end. That contraction is left
    out here: what is trained is what ships, so the labels train the plain student, and the expansion is a regressor.
    Nor are logits standardized under the labels' loss, as they are in the authors' code, and a teacher's map that is
    larger than the student's is averaged down where that code takes maxima. The published figures are the best of four
    values of alpha, 0.0625 to 0.5.

    The maps are those of the authors' networks: the teacher's is that of its last stage, and so is a student's, but
    MobileNetV2's and ShuffleNetV2's is the one after the last 1x1 convolution.
    """
    own, target = pair.last_stages
    own = own if pair.student.backbone.last is None else "map"
    own_shapes, shapes = pair.shapes([own], [target])
    expanded = replace(shapes[target], channels=copies * shapes[target].channels, positive=False)
    match = FeatureMatch(own, target, n_to_one, regressor(own_shapes[own].channels, expanded))
    return Method(
        {"task": (alpha, task_loss()), "representations": (in_phases(weight), match)},
        hooked(pair.student, own),
        hooked(pair.teacher, target),
    )


def n_to_one(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the N parts of the student's map (batch, N * channels, height, width), one after the other along the
    channels, of their mean squared differences from the teacher's (batch, channels, height, width).

    `mask` (batch,) restricts the means to the samples that it keeps.
    """
    copies = student.shape[1] // teacher.shape[1]
    return copies * feature_l2(student, teacher.repeat(1, copies, 1, 1), mask)


def in_phases(weight: float) -> Weight:
    """A weight that is a share of itself in each of PHASES; zero stays zero."""
    if weight == 0:
        return 0.0
    return lambda progress: weight * next((share for until, share in PHASES if progress < until), PHASES[-1][1])
