"""SimKD: a student that reuses its teacher's classifier (Chen et al., CVPR 2022, arXiv:2203.14001).

A projector maps the student's last map to the channels of the teacher's, and a frozen copy of the teacher's head
classifies it. Training matches the maps and needs no labels. Projector and head belong to the student: they are
evaluated, saved and deployed with it.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from kd.common import losses
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.methods import Feature, Method, depth_map, labels, match
from kd.common.objective import FeatureLoss, soft_targets, teacher_is_right
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.arguments import FeatureLossName, SimKDArguments
from kd.image_classification.student_model.matching import image_features
from kd.image_classification.teacher_model.classifier import ImageClassifier, Projector, new_classifier

FEATURE_LOSSES: dict[FeatureLossName, FeatureLoss] = {
    "l2": losses.feature_l2,
    "kl-channel": losses.channel_kl,
    "kl-spatial": losses.spatial_kl,
    "cosine": partial(losses.feature_cosine, dim=1),
}


def simkd_student(
    architecture: str, teacher: ImageClassifier, data: ImageData, factor: int, reuse_head: bool = True
) -> ImageClassifier:
    """Backbone, projector and a frozen copy of the teacher's head; or the control, whose head is new and trained."""
    projector = _projector_to(image_features(teacher).head, factor)
    if not isinstance(teacher.head, nn.Linear | DiscreteKeyValueBottleneck):
        raise UserError(
            f"SimKD reuses the teacher's linear classifier, which {teacher.config.architecture} does not end in: pass "
            "another --teacher, or a method on logits such as --method kd"
        )
    parts = {"projector": projector, "bottleneck": teacher.config.bottleneck, "pool": teacher.config.pool}
    student = new_classifier(architecture, data.config, **parts)
    if reuse_head:
        student.head.load_state_dict(teacher.head.state_dict())
        student.head.requires_grad_(False)
    return student


def simkd(student: ImageClassifier, teacher: ImageClassifier, args: SimKDArguments, temperature: float) -> Method:
    """The method for a student from `simkd_student`, in one of the projector variants.

    The student's projector outputs the input map of the teacher's head. Other matched maps have auxiliary projectors.
    """
    method = labels(args.cls_weight) + Method({"soft_targets": (args.kl_weight, soft_targets(temperature))})
    for number, (feature, teacher_feature, weight) in enumerate(_matched_maps(student, teacher, args)):
        projector = None
        if teacher_feature.path != image_features(teacher).head.path:
            projector = Projector(feature.width, **_projector_to(teacher_feature, args.projector_factor))
        method += match(
            f"feature_{number}",
            args.feature_weight * weight,
            feature,
            teacher_feature,
            FEATURE_LOSSES[args.feature_loss],
            projector,
            only_where_right=args.use_labels,
        )
    return method + Method({}, watched={"masked_share": share_masked} if args.use_labels else {})


def share_masked(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """The share of samples that --use_labels leaves out because the teacher misclassifies them."""
    return 1 - teacher_is_right(teacher, labels).float().mean()


def _matched_maps(
    student: ImageClassifier, teacher: ImageClassifier, args: SimKDArguments
) -> list[tuple[Feature, Feature, float]]:
    """(map of the student, map of the teacher, weight), among them the input maps of the heads."""
    features, teacher_features = image_features(student), image_features(teacher)
    heads = features.head, teacher_features.head
    if args.projector == "single":
        return [(*heads, 1.0)]
    if args.projector == "multi":
        if min(len(features.stages), len(teacher_features.stages)) < 2:
            raise UserError("--projector multi needs networks with at least two stages: pass --projector single")
        ratio = args.projector_ratio
        return [(*heads, ratio), (features.stages[-2], teacher_features.stages[-2], 1 - ratio)]
    blocks, teacher_blocks = features.blocks, teacher_features.blocks
    pairs = depth_map(len(blocks), len(teacher_blocks), "up")[:-1]
    inner = [(blocks[i], teacher_blocks[j], 1 / len(blocks)) for i, j in pairs]
    return [*inner, (*heads, 1 / len(blocks))]


def _projector_to(teacher: Feature, factor: int) -> dict[str, Any]:
    """Arguments of a `Projector` to a map of the teacher."""
    if teacher.width % factor:
        raise UserError(f"--projector_factor {factor} does not divide the teacher's {teacher.width} channels")
    return {"out_channels": teacher.width, "factor": factor, "relu": teacher.positive, "max_size": teacher.size}
