"""A network of any make with its weights, as an ImageClassifier."""

import copy
from typing import Any

import torch
from torch import nn

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.network import NetworkBackbone, logits_of
from kd.image_classification.teacher_model.backbones.structure import find_structure
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig

TOLERANCE = 1e-4  # of logits, relative to the largest


def from_network(
    network: nn.Module, architecture: str, data_config: dict[str, Any], config: dict[str, Any] | None = None
) -> ImageClassifier:
    """A classifier with the weights of a network, in evaluation mode. `config`: of a network of transformers.

    Raises UserError if its logits would differ from those of the network.
    """
    network, classes = network.eval(), len(data_config["id2label"])
    structure = find_structure(network, architecture, classes, data_config["image_size"])
    parts = structure.to_dict() | ({"config": config} if config else {})
    settings = ImageClassifierConfig(architecture=architecture, network=parts, pool=structure.pool, **data_config)
    model = ImageClassifier(settings).eval()
    size = data_config["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = logits_of(network(images))
        _copy_weights(model, network, structure.heads)
        difference = (model(images).logits - expected).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of {architecture} would differ by {difference:.2%}: they must depend on the images alone"
        )
    return model


def _copy_weights(model: ImageClassifier, network: nn.Module, heads: list[str]) -> None:
    """Copies all weights of a network, with its linear classifiers, whose logits are averaged, as one."""
    assert isinstance(model.backbone, NetworkBackbone)
    network = copy.deepcopy(network)
    linear: list[Any] = [network.get_submodule(path) for path in heads]
    if linear:
        weight = torch.cat([head.weight for head in linear], dim=1) / len(linear)
        biases = [torch.zeros(len(weight)) if head.bias is None else head.bias for head in linear]
        model.head.load_state_dict({"weight": weight, "bias": torch.stack(biases).mean(0)})
    for path in heads:
        network.set_submodule(path, nn.Identity())
    state = network.state_dict() | dict(network.named_buffers())
    model.backbone.network.load_state_dict(state)
