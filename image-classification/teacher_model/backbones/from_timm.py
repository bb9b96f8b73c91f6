"""Any convolutional network of timm as a backbone."""

import difflib
import textwrap
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.backbones.base import Backbone


class TimmBackbone(Backbone):
    """timm's network without pooling and classifier: (batch, 3, h, w) -> last map (batch, num_features, h', w').

    `stages` are those that timm names, less those whose maps are at least half as large as the image. How small an
    image may be is up to the network. Raises UserError for a name that timm does not know, and for a network whose
    last features are no map.
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
                module.inplace = False  # what the module before returned may have been recorded
            for key, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(key, buffer)  # persistent: from_pretrained restores nothing but what was saved
        paths = {path for path, _ in self.model.named_modules()}
        info = [entry for entry in getattr(self.model, "feature_info", []) if entry["module"] in paths]
        self.stages = [f"model.{entry['module']}" for entry in info if entry["reduction"] > 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def known_weights(name: str) -> Any:
    """timm's description (PretrainedCfg) of the weights NAME, `architecture` or `architecture.tag`; no file is needed.

    Raises UserError for an architecture or a tag that timm does not know.
    """
    architecture, _, tag = name.partition(".")
    try:
        weights = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(other.removeprefix(f"{architecture}.") for other in timm.list_pretrained(f"{architecture}.*"))
        raise UserError(f"timm knows no weights {tag!r} of {architecture}, only {tags or 'none'}") from error
    if weights is None:
        close = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        raise UserError(f"timm knows no model {name!r}" + (f"; did you mean one of {close}?" if close else ""))
    return weights


def _output_shape(model: nn.Module, input_size: tuple[int, int, int]) -> torch.Size:
    """The shape of what the model returns for one image, found out without computing anything."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {path: tensor.to("meta") for path, tensor in state.items()}
    output = functional_call(model.eval(), on_meta, (torch.empty(1, *input_size, device="meta"),))
    model.train()
    return output.shape


def _no_map(name: str, reason: str) -> str:
    return (
        f"the last features of timm's {name} are no map (channels, h, w) ({reason}): choose a convolutional network "
        "such as timm:resnet18"
    )
