"""Matching feature maps of a student to those of its teacher: which with which, through what, under which loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.features import FeatureHooks
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import ImageData
from kd.image_classification.teacher_model.backbones.base import PreActivation
from kd.image_classification.teacher_model.classifier import ImageClassifier

First = TypeVar("First")
Second = TypeVar("Second")
FEATURE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "l2": losses.feature_l2,
    "kl-channel": losses.channel_kl,
    "kl-spatial": losses.spatial_kl,
    "cosine": partial(losses.feature_cosine, dim=1),
}


class FeatureMatch(nn.Module):
    """A term of an objective: the loss between the student's feature `name` and the teacher's `teacher_name`.

    Of two maps of different size the larger is averaged down to the smaller.

    Args:
        projector: what the student's map goes through; it trains with the student and never ships.
        only_where_right: the mean is over those samples alone for which the teacher is right.
        projector_resizes: the projector takes the student's map in its size and changes that itself; what it returns
            and the teacher's map are then averaged down. Otherwise it takes what was averaged down.
    """

    def __init__(
        self,
        name: str,
        teacher_name: str,
        loss: Callable[..., Tensor],
        projector: nn.Module | None = None,
        only_where_right: bool = False,
        projector_resizes: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.teacher_name, self.loss = name, teacher_name, loss
        self.projector = projector
        self.only_where_right = only_where_right
        self.projector_resizes = projector_resizes

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "feature matching needs a teacher's features"
        own, target = student.features[self.name], teacher.features[self.teacher_name]
        if self.projector is not None and self.projector_resizes:
            own = self.projector(own)
        size = min(own.shape[-1], target.shape[-1])
        own, target = (x if x.shape[-1] == size else F.adaptive_avg_pool2d(x, size) for x in (own, target))
        if self.projector is not None and not self.projector_resizes:
            own = self.projector(own)
        return self.loss(own, target, teacher_is_right(teacher, labels) if self.only_where_right else None)


def teacher_is_right(teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """Mask (batch,) of the samples whose label the teacher finds by itself."""
    assert teacher is not None and teacher.logits is not None and labels is not None
    return teacher.logits.argmax(1) == labels


def share_masked(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """The share of samples left out where only those count for which the teacher is right."""
    return 1 - teacher_is_right(teacher, labels).float().mean()


# ---- which layers there are, and what their maps look like ----


def stage_paths(model: ImageClassifier) -> list[str]:
    return [f"backbone.{path}" for path in model.backbone.stages]


def last_stage(model: ImageClassifier) -> str:
    """The feature that the distillation toolboxes call the last map: that of the last stage.

    It is before the last 1x1 convolution of MobileNetV2 and ShuffleNetV2 and before the last batch norm and ReLU of
    wide ResNets; in the other families of these toolboxes it is `map`, which the head averages. For a network of
    timm's it is the last feature that timm names, or `map` where it names none.
    """
    paths = stage_paths(model)
    return paths[-1] if paths else "map"


def hooked(model: ImageClassifier, *features: str) -> dict[str, str]:
    """{feature: path} of stages, and of `map`, the last map, which the head averages."""
    return {name: last_map_path(model) if name == "map" else name for name in features}


def last_map_path(model: ImageClassifier) -> str:
    return "backbone" if model.projector is None else "projector"


def pre_activations(model: ImageClassifier) -> list[PreActivation]:
    """Of each stage. Raises UserError for a family whose stages do not show what their last ReLU sees."""
    found = model.backbone.pre_activations
    if not found:
        raise UserError(
            f"{model.config.architecture} shows no maps before the last ReLU of its stages, as this "
            "method needs of a teacher: choose a resnet, wrn or vgg"
        )
    return [PreActivation(f"backbone.{path}", f"backbone.{norm}") for path, norm in found]


def maps_before_relu(model: ImageClassifier) -> list[str]:
    """The paths of each stage's map before its last ReLU, or of the stage in families that do not show that."""
    return [path for path, _ in pre_activations(model)] if model.backbone.pre_activations else stage_paths(model)


def deepest_pairs(own: Sequence[First], target: Sequence[Second]) -> list[tuple[First, Second]]:
    """The last with the last, and so on as far as both reach."""
    number = min(len(own), len(target))
    return list(zip(own[-number:], target[-number:], strict=True))


def block_paths(model: ImageClassifier) -> list[str]:
    """The blocks of all stages in order; a stage that is not made of blocks counts as one."""
    paths = []
    for path in stage_paths(model):
        stage = model.get_submodule(path)
        paths += (
            [f"{path}.{name}" for name, _ in stage.named_children()] if isinstance(stage, nn.Sequential) else [path]
        )
    return paths


def proportional_map(student_blocks: int, teacher_blocks: int) -> list[int]:
    """For each block of the student that of the teacher at the same relative depth; the last belongs to the last."""
    return [-(-(i + 1) * teacher_blocks // student_blocks) - 1 for i in range(student_blocks)]


def some_images(data: ImageData) -> Tensor:
    """A small batch to probe models with."""
    views = data.views(data.selection_split, torch.device("cpu"))
    return views.__getitems__(list(range(min(8, len(views)))))["pixel_values"]


@dataclass(frozen=True)
class MapShape:
    """channels, size in pixels, and whether all values are at least zero, as after a ReLU."""

    channels: int
    size: int
    positive: bool


@torch.no_grad()
def probe(model: ImageClassifier, paths: list[str], images: Tensor) -> dict[str, MapShape]:
    """The shapes of the maps that submodules yield, and of the one before the head (`map`), by looking at them.

    Raises UserError for images that are too small and for features that are no square maps.
    """
    was_training = model.training
    hooks = FeatureHooks(model, {path: path for path in paths if path != "map"})
    try:
        output = model.eval()(images.to(model.device))
    except RuntimeError as error:
        size = images.shape[-1]
        raise UserError(f"{model.config.architecture} cannot see images of {size} pixels: {error}") from error
    maps = {"map": output.features["map"], **hooks.take()}
    hooks.remove()
    model.train(was_training)
    for path, found in maps.items():
        if found.dim() != 4 or found.shape[2] != found.shape[3]:
            raise UserError(
                f"{model.config.architecture} yields features of shape {tuple(found.shape[1:])} at {path}, not square "
                "maps (channels, size, size): choose a convolutional network"
            )
    return {path: MapShape(m.shape[1], m.shape[2], bool(m.min() >= 0)) for path, m in maps.items()}
