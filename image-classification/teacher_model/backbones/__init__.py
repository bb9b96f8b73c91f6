"""Backbones by name: networks of the distillation literature for small images, of timm, and of a user's module."""

import difflib
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.base import Backbone
from kd.image_classification.teacher_model.backbones.factories import (
    TIMM,
    TRANSFORMERS,
    build_network,
    import_factory,
    is_factory,
    timm_arguments,
    transformers_config,
)
from kd.image_classification.teacher_model.backbones.mobile import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from kd.image_classification.teacher_model.backbones.network import NetworkBackbone, Structure
from kd.image_classification.teacher_model.backbones.structure import find_structure
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
    config = None
    if name.startswith(TIMM):
        if not needs_structure(name):
            return None
    elif name.startswith(TRANSFORMERS):
        config = transformers_config(name, classes, image_size)
    elif is_factory(name):
        import_factory(name)
    else:
        return None
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
        structure = Structure.from_dict({key: value for key, value in network.items() if key != "config"})
        return NetworkBackbone(build_network(name, classes, image_size, network.get("config")), structure)
    if name.startswith(TIMM):
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
    if timm.is_model(name):
        return f"; did you mean {TIMM}{name}?"
    close = difflib.get_close_matches(name.lower(), COMMON, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# ---- timm ----


@cache
def needs_structure(name: str) -> bool:
    """Whether timm's network is no convolutional network whose average map is the input of its classifier."""
    network, arguments = timm_arguments(name)
    known_weights(network)  # raises UserError for an unknown name
    if arguments:
        return True
    try:
        with torch.device("meta"):
            TimmBackbone(network)
            whole, plain = timm.create_model(network), timm.create_model(network, num_classes=0, global_pool="")
    except UserError:
        return True
    classifier = getattr(whole, "get_classifier", lambda: None)()
    return not isinstance(classifier, nn.Linear) or len(whole.state_dict()) != len(plain.state_dict()) + len(
        classifier.state_dict()
    )


class TimmBackbone(Backbone):
    """timm's network without pooling and classifier: (batch, 3, h, w) -> last map (batch, num_features, h', w').

    `stages` are timm's, without those whose maps are at least half as large as the image. The minimum image size
    depends on the network. Raises UserError for a name that timm does not have, and for a network whose last features
    are not a map.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        input_size = known_weights(name).input_size
        try:
            self.model = timm.create_model(name, num_classes=0, global_pool="")
            shape = _output_shape(self.model, input_size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(_no_map(name, textwrap.shorten(str(error), 200))) from error
        if len(shape) != 4 or shape[1] != getattr(self.model, "head_hidden_size", None):
            raise UserError(_no_map(name, f"they have shape {tuple(shape)} for a batch of one"))
        self.num_features = shape[1]
        modules: list[Any] = list(self.model.modules())
        for module in modules:
            if getattr(module, "inplace", False):
                module.inplace = False  # a hook may have recorded the module's input
            for key, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(key, buffer)  # persistent: from_pretrained restores only saved buffers
        paths = {path for path, _ in self.model.named_modules()}
        info = [entry for entry in getattr(self.model, "feature_info", []) if entry["module"] in paths]
        self.stages = [f"model.{entry['module']}" for entry in info if entry["reduction"] > 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def known_weights(name: str) -> Any:
    """timm's PretrainedCfg of the weights NAME, `architecture` or `architecture.tag`, without a download.

    Raises UserError for an architecture or a tag that timm does not have.
    """
    architecture, _, tag = name.partition(".")
    try:
        weights = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(other.removeprefix(f"{architecture}.") for other in timm.list_pretrained(f"{architecture}.*"))
        raise UserError(f"timm has no weights {tag!r} of {architecture}, only {tags or 'none'}") from error
    if weights is None:
        close = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        raise UserError(f"timm has no model {name!r}" + (f"; did you mean one of {close}?" if close else ""))
    return weights


def _output_shape(model: nn.Module, input_size: tuple[int, int, int]) -> torch.Size:
    """The shape of the output for one image, computed on the meta device."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {path: tensor.to("meta") for path, tensor in state.items()}
    output = functional_call(model.eval(), on_meta, (torch.empty(1, *input_size, device="meta"),))
    model.train()
    return output.shape


def _no_map(name: str, reason: str) -> str:
    return (
        f"the last features of timm's {name} are not a map (channels, h, w) ({reason}): choose a convolutional "
        "network such as timm:resnet18"
    )
