"""What every backbone for small images has in common."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class PreActivation(NamedTuple):
    """path: of the submodule that yields what the ReLU at the end of a stage sees; norm: of the batch norm in it."""

    path: str
    norm: str


class Backbone(nn.Module):
    """Images (batch, 3, h, w) -> last map (batch, num_features, h', w').

    `stages` are the paths of the submodules at whose ends the resolution is about to change; a stage that is a
    Sequential is made of blocks. `pre_activations` has one for each stage, and none where stages do not end in a ReLU
    of what a submodule yields.
    """

    num_features: int
    pre_activations: Sequence[PreActivation] = ()

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_stage(self, *blocks: nn.Module) -> str:
        """Appends `layer1`, `layer2`, ..., a Sequential of the blocks; returns the path of the last of them."""
        path = f"layer{len(self.stages) + 1}"
        self.add_module(path, nn.Sequential(*blocks))
        self.stages.append(path)
        return f"{path}.{len(blocks) - 1}"

    def through_stages(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x


def initialize(backbone: nn.Module) -> None:
    """He's normal initialization (fan out) of convolutions; batch norms start as the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
