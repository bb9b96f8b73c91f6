"""Networks of timm, with their classifiers or as backbones. Importing timm takes seconds, so only these import it."""

import ast
import difflib
import textwrap
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.base import Backbone
from kd.image_classification.teacher_model.backbones.factories import in_one_line
from kd.image_classification.teacher_model.backbones.names import TIMM

NOT_OF_THE_NETWORK = {  # arguments of timm.create_model that load weights or files
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("num_classes", "img_size", "scriptable", "exportable", "no_jit"),
}


# ---- with their classifiers ----


def timm_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """`timm:NAME:key=value:...` -> NAME, {key: value}."""
    network, *words = name.removeprefix(TIMM).split(":")
    if words and not timm.is_model(network.partition(".")[0]):
        raise UserError(f"timm has no model {network!r}")
    arguments = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key.isidentifier() or not equals or key in NOT_OF_THE_NETWORK:
            raise UserError(f"{name} has {word!r}: pass arguments of timm's network as {TIMM}{network}:key=value")
        try:
            arguments[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[key] = value
    return network, arguments


def timm_network(name: str, classes: int, image_size: int, **options: Any) -> nn.Module:
    """`timm:NAME` for images of this size. Raises UserError if timm cannot build it."""
    network, arguments = timm_arguments(name)
    arguments = {"num_classes": classes} | options | arguments
    try:
        try:
            return timm.create_model(network, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(network, **arguments)  # takes images of any size
    except UserError:
        raise
    except Exception as error:  # timm checks arguments with asserts, and modules raise others
        raise UserError(
            f"timm cannot build {name} for images of {image_size} pixels ({in_one_line(error)}): pass another "
            f"--image_size, or arguments such as {TIMM}{network}:patch_size=4"
        ) from error


# ---- as backbones ----


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
