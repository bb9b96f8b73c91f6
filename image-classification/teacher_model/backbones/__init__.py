"""Backbones by name: the networks of the distillation literature for small images, and any of timm's."""

import difflib
import re
from collections.abc import Callable

import timm

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.base import Backbone
from kd.image_classification.teacher_model.backbones.from_timm import TimmBackbone
from kd.image_classification.teacher_model.backbones.mobilenet import MobileNetV2
from kd.image_classification.teacher_model.backbones.resnet import WideResNet, four_stage_resnet, three_stage_resnet
from kd.image_classification.teacher_model.backbones.shufflenet import ShuffleNetV1, ShuffleNetV2
from kd.image_classification.teacher_model.backbones.vgg import VGG

TIMM = "timm:"
FAMILIES: dict[str, Callable[..., Backbone]] = {  # the groups of a pattern are numbers, and the arguments
    r"resnet(18|34|50)": four_stage_resnet,
    r"resnet(\d+)(?:x(\d+))?": three_stage_resnet,
    r"wrn_(\d+)_(\d+)": WideResNet,
    r"vgg(\d+)": VGG,
    r"mobilenetv2(?:x(\d+(?:\.\d+)?))?": MobileNetV2,
    r"shufflenetv1": ShuffleNetV1,
    r"shufflenetv2(?:x(\d+(?:\.\d+)?))?": ShuffleNetV2,
}
COMMON = (  # what the distillation literature compares
    *("resnet8x4", "resnet32x4", "resnet20", "resnet32", "resnet56", "resnet110", "resnet18", "resnet50"),
    *("wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg13"),
    *("mobilenetv2", "mobilenetv2x1.0", "shufflenetv1", "shufflenetv2", "shufflenetv2x1.5"),
)
EXAMPLES = "resnet8x4, resnet32x4, resnet56, wrn_40_2, vgg8, mobilenetv2, shufflenetv2, timm:resnet18"


def build_backbone(name: str) -> Backbone:
    """The backbone NAME with random weights. Raises UserError for a name that is none."""
    if name.startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM))
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            try:
                return family(*(float(group) if "." in group else int(group) for group in match.groups() if group))
            except ValueError as error:
                raise UserError(f"unknown architecture {name!r}: {error}{_guess(name)}") from error
    raise UserError(f"unknown architecture {name!r}: choose one such as {EXAMPLES}{_guess(name)}")


def _guess(name: str) -> str:
    """What was probably meant, to end a message with."""
    if timm.is_model(name):
        return f"; did you mean {TIMM}{name}?"
    close = difflib.get_close_matches(name.lower(), COMMON, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""
