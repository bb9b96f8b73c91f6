"""SimKD: a student that learns to speak to its teacher's classifier (Chen et al., CVPR 2022, arXiv:2203.14001).

The student's last map goes through a projector into the space of the teacher's, and from there on the teacher's own,
frozen head decides. Training matches the maps; labels are not needed. Projector and head belong to the student: they
are trained, evaluated, saved and deployed with it.
"""

from dataclasses import dataclass, field
from typing import Literal

from kd.common.cli import reject_unused
from kd.common.methods import Method
from kd.common.objective import Terms, soft_targets, task_loss
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, NotNegative, ShareAbove0
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.matching import (
    FEATURE_LOSSES,
    FeatureMatch,
    MapShape,
    block_paths,
    hooked,
    probe,
    proportional_map,
    share_masked,
    some_images,
    stage_paths,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.projector import Projector

Variant = Literal["single", "multi", "all-layer"]
FeatureLossName = Literal["l2", "kl-channel", "kl-spatial", "cosine"]


@dataclass
class SimKDWeights:
    """What all variants of SimKD share."""

    projector_factor: Count = field(default=2, metadata={"help": "reduction inside the projector: 1, 2, 4 or 8"})
    projector_ratio: ShareAbove0 = field(default=2 / 3, metadata={"help": "weight of the last map under multi"})
    use_labels: bool = field(default=False, metadata={"help": "match features only where the teacher is right"})
    feature_weight: NotNegative = 1.0
    cls_weight: NotNegative = field(default=0.0, metadata={"help": "weight of the labels' cross-entropy"})
    kl_weight: NotNegative = field(default=0.0, metadata={"help": "weight of the teacher's soft targets"})

    def __post_init__(self) -> None:
        if not (self.feature_weight or self.cls_weight or self.kl_weight):
            raise ValueError("--feature_weight, --cls_weight and --kl_weight must not all be zero")


@dataclass
class SimKDArguments(SimKDWeights):
    """One variant of SimKD."""

    projector: Variant = field(
        default="single", metadata={"help": "match the last map, also the stage before, or every pair of blocks"}
    )
    feature_loss: FeatureLossName = "l2"

    def check_unused_flags(self) -> None:
        if self.projector != "multi":
            reject_unused("--projector is not multi", self, "projector_ratio")


def simkd_student(
    architecture: str, teacher: ImageClassifier, data: ImageData, factor: int, reuse_head: bool = True
) -> ImageClassifier:
    """Backbone, projector and the teacher's head, frozen; with `reuse_head=False` a new head: its control."""
    images = some_images(data)
    target = probe(teacher, [], images)["map"]
    own = probe(new_classifier(architecture, data.config), [], images)["map"]
    shape = _projector_shape(own, target, factor)
    bottleneck = teacher.config.bottleneck
    student = new_classifier(architecture, data.config, projector=shape, bottleneck=bottleneck)
    if reuse_head:
        student.head.load_state_dict(teacher.head.state_dict())
        student.head.requires_grad_(False)
    return student


def simkd(
    student: ImageClassifier, teacher: ImageClassifier, data: ImageData, args: SimKDArguments, temperature: float
) -> Method:
    """The objective of a student from `simkd_student`, for one of the projector variants."""
    pairs = _pairs(student, teacher, args)
    images = some_images(data)
    own_paths = [path for path, _, _ in pairs if path != "map"]
    teacher_paths = [path for _, path, _ in pairs if path != "map"]
    own, target = probe(student, own_paths, images), probe(teacher, teacher_paths, images)
    loss = FEATURE_LOSSES[args.feature_loss]
    terms: Terms = {
        "task": (args.cls_weight, task_loss()),
        "soft_targets": (args.kl_weight, soft_targets(temperature)),
    }
    for number, (path, teacher_path, weight) in enumerate(pairs):
        projector = None
        if path != "map":  # the student's own projector leads to the last map already
            shape = _projector_shape(own[path], target[teacher_path], args.projector_factor)
            projector = Projector(own[path].channels, **shape)
        match = FeatureMatch(path, teacher_path, loss, projector, args.use_labels)
        terms[f"feature_{number}"] = (args.feature_weight * weight, match)
    return Method(
        terms,
        hooked(student, *own_paths, "map"),
        hooked(teacher, *teacher_paths, "map"),
        {"masked_share": share_masked} if args.use_labels else {},
    )


def _pairs(student: ImageClassifier, teacher: ImageClassifier, args: SimKDArguments) -> list[tuple[str, str, float]]:
    """(the student's feature, the teacher's, weight), the last maps being called `map`."""
    if args.projector == "single":
        return [("map", "map", 1.0)]
    if args.projector == "multi":
        own, target = stage_paths(student), stage_paths(teacher)
        if min(len(own), len(target)) < 2:
            raise UserError("--projector multi needs networks of at least two stages: pass --projector single")
        return [("map", "map", args.projector_ratio), (own[-2], target[-2], 1 - args.projector_ratio)]
    own, target = block_paths(student), block_paths(teacher)
    depth = proportional_map(len(own), len(target))
    inner = [(own[i], target[depth[i]], 1 / len(own)) for i in range(len(own) - 1)]
    return [*inner, ("map", "map", 1 / len(own))]


def _projector_shape(own: MapShape, target: MapShape, factor: int) -> dict:
    if target.channels % factor:
        raise UserError(f"--projector_factor {factor} does not divide the teacher's {target.channels} channels")
    return {
        "out_channels": target.channels,
        "factor": factor,
        "relu": target.positive,
        "max_size": target.size if own.size > target.size else None,
    }
