"""Random images, and forward passes of student and teacher as in the trainer."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from kd.common.methods import Method, TaskSpec
from kd.common.outputs import FeatureHooks, Outputs
from kd.image_classification.data.image_data import ImageData, Images, SmallImageData
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.teacher_model.classifier import ImageClassifier


def noise(size: int = 16, classes: int = 5) -> SmallImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, size, size, 3), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(40) % classes)
    return SmallImageData(
        name="noise",
        splits={"train": images, "validation": images},
        label_names=[f"class{i}" for i in range(classes)],
        mean=[0.5] * 3,
        std=[0.3] * 3,
        size=size,
        flip=True,
        fingerprint="noise",
        notes=[],
    )


@dataclass
class Pair:
    """Untrained student and teacher, and their data."""

    student: ImageClassifier
    teacher: ImageClassifier
    data: ImageData

    @property
    def spec(self) -> TaskSpec:
        return task_spec(self.student, self.teacher, self.data)

    @cached_property
    def images(self) -> Tensor:
        return some_images(self.data)


def copied(build: Callable[..., Pair]) -> Callable[..., Pair]:
    """Builds pairs from the seed 0, the last ones once, and returns copies: random weights of large networks take
    long.
    """

    @lru_cache(4)
    def built(*args: Any, **kwargs: Any) -> Pair:
        torch.manual_seed(0)
        return build(*args, **kwargs)

    @wraps(build)
    def copy(*args: Any, **kwargs: Any) -> Pair:
        pair = deepcopy(built(*args, **kwargs))
        torch.manual_seed(0)
        return pair

    return copy


def some_images(data: ImageData) -> Tensor:
    views = data.views("validation", torch.device("cpu"))
    return views.__getitems__(list(range(min(8, len(views)))))["pixel_values"]


def forward_with_features(model: nn.Module, paths: dict[str, str], images: Tensor) -> Outputs:
    """A forward pass with the named features of the model and of its hooked submodules."""
    hooks = FeatureHooks(model, paths)
    output = model(images)
    features = {**output.features, **hooks.take()}
    hooks.remove()
    return Outputs(logits=output.logits, features=features, sample_id=torch.arange(len(images)))


def forward_both(method: Method, pair: Pair, images: Tensor) -> tuple[Outputs, Outputs]:
    """Outputs of student (train mode, with gradients) and teacher (eval mode, without gradients) for images."""
    with torch.no_grad():
        teacher_outputs = forward_with_features(pair.teacher.eval(), method.teacher_features, images)
    return forward_with_features(pair.student.train(), method.features, images), teacher_outputs
