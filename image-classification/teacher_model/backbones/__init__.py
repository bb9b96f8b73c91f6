"""Backbones by name: networks of the distillation literature for small images, of timm, and of a user's module."""

import difflib
import re
from collections.abc import Callable
from typing import Any

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.base import Backbone
from kd.image_classification.teacher_model.backbones.mobile import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from kd.image_classification.teacher_model.backbones.names import TIMM, TRANSFORMERS, is_factory
from kd.image_classification.teacher_model.backbones.network import NetworkBackbone, Structure
from kd.image_classification.teacher_model.backbones.vgg_resnet import (
    VGG,
    WideResNet,
    four_stage_resnet,
    padded_resnet,
    three_stage_resnet,
)

FAMILIES: dict[str, Callable[..., Backbone]] = {  # the groups of a pattern are the arguments
    r"resnet(18|34|50)": four_stage_resnet,
    r"resnet(\d+)(?:x(\d+))?": three_stage_resnet,
    r"resnet(\d+)a": padded_resnet,
    r"wrn_(\d+)_(\d+)": WideResNet,
    r"vgg(\d+)": VGG,
    r"mobilenetv2(?:x(\d+(?:\.\d+)?))?": MobileNetV2,
    r"shufflenetv1": ShuffleNetV1,
    r"shufflenetv2(?:x(\d+(?:\.\d+)?))?": ShuffleNetV2,
}
COMMON = (  # the networks of the distillation literature
    *("resnet8x4", "resnet32x4", "resnet20", "resnet32", "resnet56", "resnet110", "resnet18", "resnet50"),
    *("wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg13"),
    *("mobilenetv2", "mobilenetv2x1.0", "shufflenetv1", "shufflenetv2", "shufflenetv2x1.5"),
)
EXAMPLES = "resnet8x4, resnet32x4, resnet56, wrn_40_2, vgg8, mobilenetv2, shufflenetv2, timm:resnet18"


def new_network(name: str, image_size: int, classes: int) -> dict[str, Any] | None:
    """The structure of a network that this project does not define, for the configuration of a classifier; None for
    other backbones. The command line names the network, so a user's module is imported.
    """
    if not name.startswith((TIMM, TRANSFORMERS)) and not is_factory(name):
        return None
    from kd.image_classification.teacher_model.backbones.factories import (
        build_network,
        import_factory,
        transformers_config,
    )
    from kd.image_classification.teacher_model.backbones.structure import find_structure

    config = None
    if name.startswith(TIMM):
        from kd.image_classification.teacher_model.backbones.timm_networks import needs_structure

        if not needs_structure(name):
            return None
    elif name.startswith(TRANSFORMERS):
        config = transformers_config(name, classes, image_size)
    else:
        import_factory(name)
    network = build_network(name, classes, image_size, config)
    return find_structure(network, name, classes, image_size).to_dict() | ({"config": config} if config else {})


def build_backbone(
    name: str, network: dict[str, Any] | None = None, image_size: int = 32, classes: int = 2
) -> Backbone:
    """The backbone NAME with random weights. Raises UserError for an unknown name.

    Args:
        network: of `new_network`.
        image_size, classes: of that network.
    """
    if network is not None:
        from kd.image_classification.teacher_model.backbones.factories import build_network

        structure = Structure.from_dict({key: value for key, value in network.items() if key != "config"})
        return NetworkBackbone(build_network(name, classes, image_size, network.get("config")), structure)
    if name.startswith(TIMM):
        from kd.image_classification.teacher_model.backbones.timm_networks import TimmBackbone

        return TimmBackbone(name.removeprefix(TIMM))
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            try:
                return family(*(float(group) if "." in group else int(group) for group in match.groups() if group))
            except ValueError as error:
                raise UserError(f"unknown architecture {name!r}: {error}{_did_you_mean(name)}") from error
    raise UserError(f"unknown architecture {name!r}: choose one such as {EXAMPLES}{_did_you_mean(name)}")


def _did_you_mean(name: str) -> str:
    """`; did you mean ...?` for a misspelt name, or an empty string."""
    import timm

    if timm.is_model(name):
        return f"; did you mean {TIMM}{name}?"
    close = difflib.get_close_matches(name.lower(), COMMON, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""
