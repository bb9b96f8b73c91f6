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
    of what a submodule yields. `last` is the 1x1 convolution, with batch norm and ReLU, that MobileNetV2 and
    ShuffleNetV2 have after their stages.
    """

    num_features: int
    pre_activations: Sequence[PreActivation] = ()
    last: nn.Sequential | None

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_stage(self, *blocks: nn.Module) -> str:
        """Appends `layer1`, `layer2`, ..., a Sequential of the blocks; returns the path of the last of them."""
        path = f"layer{len(self.stages) + 1}"
        self.add_module(path, nn.Sequential(*blocks))
        self.stages.append(path)
        return f"{path}.{len(blocks) - 1}"

    def add_last(self, channels: int, out_channels: int) -> None:
        """Adds `last`; to be called after the stages are added."""
        self.last, self.num_features = conv_norm(channels, out_channels, kernel=1), out_channels

    def remove_last(self) -> None:
        """Removes `last` where there is one: the backbone then returns the map of its last stage."""
        if self.last is not None:
            conv = self.last[0]
            assert isinstance(conv, nn.Conv2d)
            self.num_features, self.last = conv.in_channels, None

    def initialize_head(self, head: nn.Linear) -> None:
        """Initializes a linear classifier on this backbone as the distillation toolboxes do: here, as PyTorch does."""

    def through_stages(self, x: Tensor) -> Tensor:
        """The last map, of the output of the stem."""
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x if self.last is None else self.last(x)


def conv_norm(
    channels: int,
    out_channels: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """Convolution, batch norm and ReLU: (batch, channels, h, w) -> (batch, out_channels, h / stride, w / stride).

    The ReLU is not in place, as what a submodule returned may have been recorded.
    """
    layers = [
        nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def initialize(backbone: nn.Module) -> None:
    """He's normal initialization (fan out) of convolutions, without a bias; batch norms start as the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_head(head: nn.Linear) -> None:
    """The initialization of classifiers in the toolboxes' VGG and MobileNetV2."""
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
