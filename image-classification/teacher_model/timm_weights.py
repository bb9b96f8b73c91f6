"""Networks of timm with pretrained weights, from the Hub or from a file."""

import copy
import os
import textwrap
from collections import Counter
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from kd.common.data.sources import offline_if_unreachable
from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.names import TIMM
from kd.image_classification.teacher_model.backbones.timm_networks import known_weights, needs_structure, timm_network
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.conversion import TOLERANCE, from_network
from kd.image_classification.teacher_model.state_dicts import read_state_dict


def pretrained_classifier(
    name: str,
    checkpoint: str | None = None,
    label_names: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ImageClassifier:
    """timm's NAME (`resnet18`, `resnet18.a1_in1k`) with pretrained weights, in evaluation mode.

    Raises UserError for weights that cannot be loaded. The logits are compared with those of timm's network.

    Args:
        checkpoint: file with weights of timm's network (.safetensors or torch.save); default: the weights on the Hub.
        label_names: by class id; default: ImageNet's.
        image_size, mean, std: of the images that the weights were trained on; default: timm's.
    """
    weights = known_weights(name)
    labels = label_names or _imagenet_labels(name, weights.num_classes)
    if checkpoint is None and len(labels) != weights.num_classes:
        raise UserError(f"timm's {name} has {weights.num_classes} classes, not the {len(labels)} of label_names")
    size = image_size or weights.input_size[-1]
    data_config = {
        "image_size": size,
        "mean": mean or list(weights.mean),
        "std": std or list(weights.std),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    original = _load(name, checkpoint, len(labels), size)
    return timm_classifier(f"{TIMM}{name}", original, data_config)


def timm_classifier(name: str, network: Any, data_config: dict[str, Any]) -> ImageClassifier:
    """A classifier with the weights of timm's network `timm:NAME`, in evaluation mode.

    Raises UserError if its logits would differ from those of the network.
    """
    if not needs_structure(name):
        model = new_classifier(name, data_config).eval()
        if _copy_weights(model, network):
            return model
    return from_network(network, name, data_config)


def _copy_weights(model: ImageClassifier, original: Any) -> bool:
    """Copies all weights of timm's network. Returns whether the logits are the same: whether the network ends in a
    map, global average pooling and one linear layer.
    """
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = copy.deepcopy(original).eval()
    with torch.no_grad():
        expected = network(images)
        try:
            model.head.load_state_dict(network.get_classifier().state_dict())
            network.reset_classifier(0, "")
            buffers = dict(network.named_buffers())  # also those that timm does not save
            model.backbone.get_submodule("model").load_state_dict({**network.state_dict(), **buffers})
            difference = (model(images).logits - expected).abs().max() / expected.abs().max()
        except (AssertionError, AttributeError, RuntimeError, TypeError):
            return False
    return bool(difference <= TOLERANCE)


def _load(name: str, checkpoint: str | None, classes: int, image_size: int) -> nn.Module:
    """timm's network with its classifier, and with weights from the file or from the Hub."""
    if checkpoint is not None:
        if not os.path.isfile(checkpoint):
            raise UserError(f"there is no file {checkpoint}: pass one with weights of timm's {name}")
        return load_timm_weights(f"{TIMM}{name}", checkpoint, classes, image_size)
    try:
        with offline_if_unreachable():
            return timm_network(f"{TIMM}{name}", classes, image_size, pretrained=True)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 300).rstrip(".")
        raise UserError(
            f"cannot get timm's pretrained weights of {name} ({reason}): pass the local folder of a trained "
            "classifier instead, or the file of these weights with --teacher_weights"
        ) from error


def load_timm_weights(name: str, path: str, classes: int, image_size: int) -> nn.Module:
    """timm's network `timm:NAME` with its classifier and the weights in a file.

    Position embeddings of another image size are interpolated. Raises UserError for weights of another network.
    """
    state = read_state_dict(path)
    # With another number of classes timm would silently skip the weights of the classifier.
    overlay = {"state_dict": state, "num_classes": classes, "custom_load": False}
    try:
        return timm_network(name, classes, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 300)
        raise UserError(
            f"{path} holds no weights of {name} with {classes} classes for images of {image_size} pixels "
            f"({reason}): pass the network and the --image_size of these weights"
        ) from error


def _imagenet_labels(name: str, classes: int) -> list[str]:
    """WordNet's description of each class, with the WordNet id if several classes have the same description."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        raise UserError(f"timm's {name} has {classes} classes, which are not ImageNet's: pass label_names")
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions()
    count = Counter(descriptions)
    return [
        text if count[text] == 1 else f"{text} ({wordnet_id})"
        for text, wordnet_id in zip(descriptions, info.label_names(), strict=True)
    ]
