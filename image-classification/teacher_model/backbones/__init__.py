"""Backbones by name: the networks of the distillation literature for small images, and any of timm's."""

import re
from collections.abc import Callable

from torch import nn

from common.utils.errors import UserError
from image_classification.teacher_model.backbones.base import Backbone
from image_classification.teacher_model.backbones.from_timm import TimmBackbone
from image_classification.teacher_model.backbones.resnet import ResNet

TIMM = "timm:"
FAMILIES: dict[str, Callable[..., Backbone]] = {  # the groups of a pattern are the arguments
    r"resnet(\d+)(?:x(\d+))?": ResNet,
}
EXAMPLES = "resnet8x4, resnet32x4, resnet20, resnet56, timm:resnet18, ..."


def build_backbone(name: str) -> nn.Module:
    """The backbone NAME with random weights. Raises UserError for a name that is none."""
    if name.startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM))
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            try:
                return family(*(int(number) for number in match.groups() if number))
            except ValueError as error:
                raise UserError(f"unknown architecture {name!r}: {error}") from error
    raise UserError(f"unknown architecture {name!r}: choose one such as {EXAMPLES}")
