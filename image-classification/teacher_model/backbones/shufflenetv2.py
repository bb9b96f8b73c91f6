"""ShuffleNetV2 for small images (Ma et al., arXiv:1807.11164), as the distillation papers use it.

`shufflenetv2` is the paper's 1x; there are `shufflenetv2x0.5`, `shufflenetv2x1.5` and `shufflenetv2x2.0`. Unlike
the paper's network, its stem is a 1x1 convolution that keeps the size, and no pooling follows. As in the distillation
toolboxes, its weights begin as PyTorch's do.
"""

import torch
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone
from kd.image_classification.teacher_model.backbones.layers import conv_norm

STEM = 24
BLOCKS = (4, 8, 4)  # of the stages
CHANNELS: dict[float, tuple[int, ...]] = {  # by width, those of the stages and of the last map
    0.5: (48, 96, 192, 1024),
    1: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2: (244, 488, 976, 2048),
}


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Two maps (batch, channels, h, w) -> (batch, 2 * channels, h, w), channels in turn: the paper's shuffle."""
    return torch.channel_shuffle(torch.cat([first, second], dim=1), 2)


def branch(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1x1, depth-wise 3x3 and 1x1 convolutions: (batch, channels, h, w) -> (batch, out_channels, h / stride, ...)."""
    return nn.Sequential(
        conv_norm(channels, out_channels, kernel=1),
        conv_norm(out_channels, out_channels, stride=stride, groups=out_channels, relu=False),
        conv_norm(out_channels, out_channels, kernel=1),
    )


class Block(nn.Module):
    """One half of the channels goes through a branch, the other stays; what it returns is after a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return interleave(kept, self.branch(changed))


class DownsamplingBlock(nn.Module):
    """All channels go through either branch, which halve the size; what it returns is after a ReLU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.short_branch = nn.Sequential(
            conv_norm(channels, channels, stride=2, groups=channels, relu=False),
            conv_norm(channels, out_channels // 2, kernel=1),
        )
        self.branch = branch(channels, out_channels // 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return interleave(self.short_branch(x), self.branch(x))


class ShuffleNetV2(Backbone):
    """Images (batch, 3, h, w) -> last map (batch, 1024, h / 8, w / 8), after the ReLU; 2048 channels at width 2."""

    def __init__(self, width: float = 1) -> None:
        super().__init__()
        if width not in CHANNELS:
            raise ValueError(f"the width of a ShuffleNetV2 is one of {', '.join(map(str, CHANNELS))}, got {width}")
        *widths, last = CHANNELS[width]
        self.stem = conv_norm(3, STEM, kernel=1)
        for before, after, blocks in zip([STEM, *widths], widths, BLOCKS, strict=False):
            self.add_stage(DownsamplingBlock(before, after), *(Block(after) for _ in range(blocks - 1)))
        self.add_last(widths[-1], last)

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.stem(x))
