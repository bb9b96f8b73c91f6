"""What every backbone for small images has in common."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Images (batch, 3, h, w) -> last map (batch, num_features, h', w').

    `stages` are the paths of the submodules at whose ends the resolution is about to change; a stage that is a
    Sequential is made of blocks.
    """

    num_features: int
    stages: list[str]

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def through_stages(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x


def initialize(backbone: nn.Module) -> None:
    """He's normal initialization (fan out) of convolutions; batch norms start as the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
