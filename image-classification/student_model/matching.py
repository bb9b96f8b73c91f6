"""The features of image classifiers that methods match: the output maps of stages and blocks, and their shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.data import Subset

from kd.common.methods import Feature, ModelFeatures, TaskSpec, depth_map, some_of_each_class
from kd.common.outputs import FeatureHooks
from kd.common.training.inference import identity_collate, run_inference
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.teacher_model.backbones.base import PreActivation
from kd.image_classification.teacher_model.classifier import ImageClassifier

_CACHE: dict[tuple[str, int, str, str], "ImageFeatures"] = {}


def task_spec(student: ImageClassifier, teacher: ImageClassifier, data: ImageData, views: int = 1) -> TaskSpec:
    """The TaskSpec of two classifiers and the images that both are trained on, with `views` views of each image.

    Stages of one size, the blocks of a ViT, are reduced to as many as the other network has, evenly spaced.
    """

    def features_of(model: ImageClassifier) -> ModelFeatures:
        features, other = image_features(model), image_features(teacher if model is student else student)
        number = len(other.stages)
        if not model.backbone.same_size or number >= len(features.stages):
            return features
        return replace(features, stages=[features.stages[j] for _, j in depth_map(number, len(features.stages))])

    return TaskSpec(
        classes=len(data.label_names),
        student=student,
        teacher=teacher,
        features_of=features_of,
        pool=pooled,
        flatten=flattened,
        labels=data.splits["train"].labels,
        teacher_samples=partial(teacher_samples, teacher, data),
        views=views,
    )


def pooled(maps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Averages maps to (batch, channels), as the head does."""
    return reduce(maps.float(), "batch channels height width -> batch channels", "mean")


def flattened(maps: Tensor, mask: Tensor | None = None) -> Tensor:
    return rearrange(maps, "batch ... -> batch (...)")


def teacher_samples(teacher: ImageClassifier, data: ImageData) -> tuple[Tensor, Tensor]:
    """Pooled features (samples, channels) of PER_CLASS training images without augmentation, and their labels."""
    labels = data.splits["train"].labels
    rows = some_of_each_class(labels, len(data.label_names))

    def forward(**batch: Tensor) -> dict[str, Tensor]:
        return {"pooled": pooled(teacher.last_map(**batch))}

    images = Subset(data.views("train", best_device()), rows.tolist())
    outputs = run_inference(teacher, forward, images, identity_collate, batch_size=250)
    return torch.stack(outputs["pooled"]), labels[rows]


# ---- the maps of a classifier ----


@dataclass(frozen=True)
class ImageFeatures(ModelFeatures):
    """blocks: the outputs of the blocks of all stages, in order; a stage without blocks counts as one block."""

    blocks: Sequence[Feature]


def image_features(model: ImageClassifier) -> ImageFeatures:
    """The maps of a classifier. Their shapes come from one forward pass per architecture and image size, and are
    cached.

    Raises UserError for images that are too small, and for features that are not square maps.
    """
    config, head = model.config, head_path(model)
    key = config.architecture, config.image_size, head, str((config.projector, config.network))
    if key not in _CACHE:
        stages, blocks = stage_paths(model), block_paths(model)
        shapes = _probe(model, {*stages, *blocks, head})
        # As in the distillation toolboxes, the last map is the output of the last stage: before the last 1x1
        # convolution of MobileNetV2 and ShuffleNetV2, before the last batch norm and ReLU of wide ResNets, and
        # otherwise the input of the head.
        _CACHE[key] = ImageFeatures(
            stages=[shapes[path] for path in stages],
            head=shapes[head],
            last=shapes[stages[-1] if stages else head],
            blocks=[shapes[path] for path in blocks],
        )
    return _CACHE[key]


@torch.no_grad()
def _probe(model: ImageClassifier, paths: set[str]) -> dict[str, Feature]:
    """The shapes of the output maps of submodules, from a forward pass on noise."""
    size, was_training = model.config.image_size, model.training
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    hooks = FeatureHooks(model, {path: path for path in paths})
    try:
        model.eval()(images.to(model.device))
        maps = hooks.take()
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{model.config.architecture} does not support images of {size} pixels: {error}") from error
    finally:
        hooks.remove()
        model.train(was_training)
    for path, features in maps.items():
        if features.dim() != 4 or features.shape[2] != features.shape[3]:
            raise UserError(
                f"{model.config.architecture} has features of shape {tuple(features.shape[1:])} at {path}, not square "
                "maps (channels, size, size): choose a convolutional network"
            )
    return {path: Feature(path, m.shape[1], m.shape[2], positive=bool(m.min() >= 0)) for path, m in maps.items()}


def head_path(model: ImageClassifier) -> str:
    """The submodule whose output map the head averages and classifies."""
    return "backbone" if model.projector is None else "projector"


def stage_paths(model: ImageClassifier) -> list[str]:
    return [f"backbone.{path}" for path in model.backbone.stages]


def block_paths(model: ImageClassifier) -> list[str]:
    paths = []
    for path in stage_paths(model):
        stage = model.get_submodule(path)
        paths += (
            [f"{path}.{name}" for name, _ in stage.named_children()] if isinstance(stage, nn.Sequential) else [path]
        )
    return paths


def pre_activations(model: ImageClassifier) -> list[PreActivation]:
    """The last pre-activation of each stage. Raises UserError for architectures that do not expose it."""
    if not model.backbone.pre_activations:
        raise UserError(
            f"{model.config.architecture} does not expose the maps before the last ReLU of its stages, which this "
            "method needs from a teacher: choose a resnet, wrn or vgg"
        )
    return [PreActivation(f"backbone.{path}", f"backbone.{norm}") for path, norm in model.backbone.pre_activations]


def maps_before_relu(model: ImageClassifier) -> Sequence[Feature]:
    """The map of each stage before its last ReLU, or the stage's output in architectures that do not expose it."""
    stages = image_features(model).stages
    if not model.backbone.pre_activations:
        return stages
    paths = [path for path, _ in pre_activations(model)]
    return [replace(stage, path=path, positive=False) for stage, path in zip(stages, paths, strict=True)]
