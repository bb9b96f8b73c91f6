"""The base class of all backbones for small images."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class PreActivation(NamedTuple):
    """path: the submodule that returns the input of a stage's last ReLU; norm: the batch norm that produces it."""

    path: str
    norm: str


class Backbone(nn.Module):
    """Images (batch, 3, h, w) -> last map (batch, num_features, h', w').

    Attributes:
        stages: paths of the submodules after which the resolution changes. A stage that is a Sequential consists of
            blocks.
        pre_activations: one for each stage; empty where stages do not end in a ReLU of a submodule's output.
        last: the 1x1 convolution, batch norm and ReLU of MobileNetV2 and ShuffleNetV2 after their stages.
        same_size: whether the stages are blocks of one size, as in a ViT. Methods then match evenly spaced blocks.
    """

    num_features: int
    pre_activations: Sequence[PreActivation] = ()
    last: nn.Sequential | None
    same_size: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_stage(self, *blocks: nn.Module) -> str:
        """Appends a Sequential of the blocks as `layer1`, `layer2`, ...; returns the path of its last block."""
        path = f"layer{len(self.stages) + 1}"
        self.add_module(path, nn.Sequential(*blocks))
        self.stages.append(path)
        return f"{path}.{len(blocks) - 1}"

    def add_last(self, channels: int, out_channels: int) -> None:
        """Adds `last`. Call it after the last `add_stage`."""
        self.last, self.num_features = conv_norm(channels, out_channels, kernel=1), out_channels

    def remove_last(self) -> None:
        """Removes `last`, if there is one: the backbone then returns the map of its last stage."""
        if self.last is not None:
            conv = self.last[0]
            assert isinstance(conv, nn.Conv2d)
            self.num_features, self.last = conv.in_channels, None

    def initialize_head(self, head: nn.Linear) -> None:
        """Initializes a linear classifier on this backbone. The default keeps PyTorch's initialization."""

    def forward_stages(self, x: Tensor) -> Tensor:
        """Output of the stem -> last map."""
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

    The ReLU is not in place, because a hook may have recorded its input.
    """
    layers = [
        nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def initialize(backbone: nn.Module) -> None:
    """Initializes convolutions with He's normal distribution (fan out) and their biases with zeros."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_small_head(head: nn.Linear) -> None:
    """Initializes a classifier as the distillation toolboxes do on VGG and MobileNetV2: N(0, 0.01²), zero bias."""
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
