"""Random images, and forward passes of classifiers as the trainer does them."""

import torch
from torch import Tensor, nn

from kd.common.features import FeatureHooks
from kd.common.methods import Method
from kd.common.outputs import Outputs
from kd.image_classification.data.loading import Images, SmallImageData
from kd.image_classification.student_model.methods import Pair


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


def as_in_training(model: nn.Module, paths: dict[str, str], images: Tensor) -> Outputs:
    """Named features of the model, and of its hooked submodules."""
    hooks = FeatureHooks(model, paths)
    output = model(images)
    features = {**output.features, **hooks.take()}
    hooks.remove()
    return Outputs(logits=output.logits, features=features, sample_id=torch.arange(len(images)))


def both_say(method: Method, pair: Pair, images: Tensor) -> tuple[Outputs, Outputs]:
    """What student and teacher say of images: with gradients in training mode, and without in evaluation mode."""
    with torch.no_grad():
        said = as_in_training(pair.teacher.eval(), method.teacher_features, images)
    return as_in_training(pair.student.train(), method.features, images), said
