"""Teachers from timm: its pretrained networks with the classifier that they were trained with."""

import os
import textwrap
from collections import Counter
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from kd.common.data.sources import no_retries_when_unreachable
from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones import TIMM
from kd.image_classification.teacher_model.backbones.from_timm import known_weights
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier

TOLERANCE = 1e-4  # of logits, relative to the largest


def pretrained_classifier(
    name: str,
    checkpoint: str | None = None,
    label_names: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ImageClassifier:
    """timm's NAME (`resnet18`, `resnet18.a1_in1k`) with pretrained weights, in evaluation mode.

    Raises UserError for weights that cannot be had, and for a network that does not end in a map, global average
    pooling and one linear layer, as an ImageClassifier does: its logits have to be those of timm's network.

    Args:
        checkpoint: file of weights of timm's network (.safetensors, or torch.save's); otherwise those on the Hub.
        label_names: by class id; otherwise ImageNet's.
        image_size, mean, std: of the images that the weights were trained on; otherwise as timm says.
    """
    weights = known_weights(name)
    labels = label_names or _imagenet_labels(name, weights.num_classes)
    if checkpoint is None and len(labels) != weights.num_classes:
        raise UserError(f"timm's {name} knows {weights.num_classes} classes, not the {len(labels)} of label_names")
    size = image_size or weights.input_size[-1]
    data_config = {
        "image_size": size,
        "mean": mean or list(weights.mean),
        "std": std or list(weights.std),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    model = new_classifier(f"{TIMM}{name}", data_config).eval()
    original = _load(name, checkpoint, len(labels)).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator())
    with torch.no_grad():
        expected = original(images)
        _take_over(model, name, original)
        difference = (model(images).logits - expected).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(_other_head(name, f"the logits would differ by {difference:.2%}"))
    return model


def _take_over(model: ImageClassifier, name: str, original: Any) -> None:
    """Copies all weights of timm's network, which loses its classifier."""
    head = original.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(_other_head(name, f"its classifier is {textwrap.shorten(str(head), 200)}"))
    try:
        model.head.load_state_dict(head.state_dict())
        original.reset_classifier(0, "")
        buffers = dict(original.named_buffers())  # those that timm does not save, too
        model.backbone.get_submodule("model").load_state_dict({**original.state_dict(), **buffers})
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UserError(_other_head(name, textwrap.shorten(str(error), 200))) from error


def _load(name: str, checkpoint: str | None, classes: int) -> Any:
    """timm's own network with its classifier, and with weights from the file or else from the Hub."""
    if checkpoint is None:
        try:
            with no_retries_when_unreachable():
                return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 300).rstrip(".")
            raise UserError(
                f"cannot get timm's pretrained weights of {name} ({reason}): pass the local folder of a trained "
                "classifier instead of this name, or with it a checkpoint, the file of these weights"
            ) from error
    if not os.path.isfile(checkpoint):
        raise UserError(f"there is no file {checkpoint}: pass one with weights of timm's {name}")
    # As many classes are promised as are asked for, or timm would leave the classifier out without a word.
    overlay = {"file": checkpoint, "num_classes": classes, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except Exception as error:  # each format has its own for a file that is broken or of another network
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"{checkpoint} holds no weights of timm's {name} with {classes} classes ({reason})") from error


def _imagenet_labels(name: str, classes: int) -> list[str]:
    """The words of WordNet for each class; classes of the same words are told apart by their ids there."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        raise UserError(f"timm's {name} knows {classes} classes, which are not ImageNet's: pass label_names")
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions()
    count = Counter(descriptions)
    return [
        text if count[text] == 1 else f"{text} ({wordnet_id})"
        for text, wordnet_id in zip(descriptions, info.label_names(), strict=True)
    ]


def _other_head(name: str, reason: str) -> str:
    return (
        f"timm's {name} does not end in global average pooling and one linear layer ({reason}): choose a network that "
        "does, such as resnet18"
    )
