"""The layer that the plain and the mobile backbones are made of."""

from torch import nn


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
