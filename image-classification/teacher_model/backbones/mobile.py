"""MobileNetV2 and ShuffleNets for small images, as the distillation papers use them.

MobileNetV2 (Sandler et al., arXiv:1801.04381): `mobilenetv2x1.0` has the paper's width, `mobilenetv2` half of it.
Unlike in the paper, the blocks of 24 channels keep the size, ReLUs are not capped at 6, and the first block starts
with a 1x1 convolution as the others do, although it adds no channels.

ShuffleNetV1 (Zhang et al., arXiv:1707.01083): `shufflenetv1` has the paper's three groups and width 1. Unlike in the
paper, a ReLU also follows the depth-wise convolutions. ShuffleNetV2 (Ma et al., arXiv:1807.11164): `shufflenetv2` is
the paper's 1x; the others are `shufflenetv2x0.5`, `shufflenetv2x1.5` and `shufflenetv2x2.0`. Unlike in the papers, the
stem of both is a 1x1 convolution that keeps the size, without pooling. As in the distillation toolboxes, their weights
have PyTorch's default initialization.
"""

import torch
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import (
    Backbone,
    PreActivation,
    conv_norm,
    initialize,
    initialize_small_head,
)

# ---- MobileNetV2 ----

STAGES = (  # rows: (expansion, channels at width 1, blocks, stride of the first block)
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depth-wise 3x3, 1x1 back, and a shortcut where the shape allows it.

    The output is before any ReLU.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = channels * expansion
        self.layers = nn.Sequential(
            conv_norm(channels, middle, kernel=1),
            conv_norm(middle, middle, stride=stride, groups=middle),
            conv_norm(middle, out_channels, kernel=1, relu=False),
        )
        self.has_shortcut = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


class MobileNetV2(Backbone):
    """Images (batch, 3, h, w) -> last map (batch, 1280, h / 16, w / 16), after the ReLU.

    Above width 1 the map has 1280 * width channels. 8x8 images end in 1x1 maps.
    """

    def __init__(self, width: float = 0.5) -> None:
        super().__init__()
        channels = int(32 * width)
        if int(16 * width) < 1:
            raise ValueError(f"the width of a MobileNetV2 is at least 0.0625, got {width}")
        self.stem = conv_norm(3, channels, stride=2)
        for rows in STAGES:
            blocks = []
            for expansion, channels_at_1, repeats, first_stride in rows:
                out_channels = int(channels_at_1 * width)
                for i in range(repeats):
                    blocks.append(InvertedResidual(channels, out_channels, first_stride if i == 0 else 1, expansion))
                    channels = out_channels
            self.add_stage(*blocks)
        self.add_last(channels, int(1280 * max(1.0, width)))
        initialize(self)

    def initialize_head(self, head: nn.Linear) -> None:
        initialize_small_head(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_stages(self.stem(x))


# ---- ShuffleNets ----

STEM = 24  # channels
BLOCKS = (4, 8, 4)  # per stage
GROUPS = 3  # in the 1x1 convolutions of ShuffleNetV1
CHANNELS_V1 = (240, 480, 960)  # of each stage
CHANNELS_V2: dict[float, tuple[int, ...]] = {  # width: channels of each stage and of the last map
    0.5: (48, 96, 192, 1024),
    1: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2: (244, 488, 976, 2048),
}


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, channel shuffle, depth-wise 3x3 and grouped 1x1 convolutions; the output is after a ReLU.

    With stride 1 the input is added. With stride 2 the average-pooled input is concatenated, so the convolutions
    return `out_channels - in_channels` channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first_groups = 1 if in_channels == STEM else GROUPS  # the stem has too few channels for groups
        new_channels = out_channels if stride == 1 else out_channels - in_channels
        middle = new_channels // 4
        self.reduce = conv_norm(in_channels, middle, kernel=1, groups=self.first_groups)
        self.depthwise = conv_norm(middle, middle, stride=stride, groups=middle)
        self.expand = conv_norm(middle, new_channels, kernel=1, groups=GROUPS, relu=False)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.before_relu = nn.Identity()  # hooks record the sum here

    def forward(self, x: Tensor) -> Tensor:
        out = torch.channel_shuffle(self.reduce(x), self.first_groups)
        out = self.expand(self.depthwise(out))
        return self.before_relu(out + x if self.stride == 1 else torch.cat([out, self.pool(x)], dim=1)).relu()


class ShuffleNetV1(Backbone):
    """Images (batch, 3, h, w) -> last map (batch, 960, h / 8, w / 8), after the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, STEM, kernel=1)
        last = []
        for before, after, blocks in zip((STEM, *CHANNELS_V1), CHANNELS_V1, BLOCKS, strict=False):
            first = ShuffleV1Block(before, after, stride=2)
            last.append(self.add_stage(first, *(ShuffleV1Block(after, after, stride=1) for _ in range(blocks - 1))))
        self.pre_activations = [PreActivation(f"{block}.before_relu", f"{block}.expand.1") for block in last]
        self.num_features = CHANNELS_V1[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_stages(self.stem(x))


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Two maps (batch, channels, h, w) -> (batch, 2 * channels, h, w) with alternating channels."""
    return torch.channel_shuffle(torch.cat([first, second], dim=1), 2)


def branch(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1x1, depth-wise 3x3 and 1x1 convolutions: (batch, channels, h, w) -> (batch, out_channels, h / stride, ...)."""
    return nn.Sequential(
        conv_norm(channels, out_channels, kernel=1),
        conv_norm(out_channels, out_channels, stride=stride, groups=out_channels, relu=False),
        conv_norm(out_channels, out_channels, kernel=1),
    )


class ShuffleV2Block(nn.Module):
    """Half of the channels go through a branch, the other half is unchanged; the output is after a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return interleave(kept, self.branch(changed))


class ShuffleV2DownBlock(nn.Module):
    """All channels go through both branches, which halve the size; the output is after a ReLU."""

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
        if width not in CHANNELS_V2:
            raise ValueError(f"the width of a ShuffleNetV2 is one of {', '.join(map(str, CHANNELS_V2))}, got {width}")
        *widths, last = CHANNELS_V2[width]
        self.stem = conv_norm(3, STEM, kernel=1)
        for before, after, blocks in zip([STEM, *widths], widths, BLOCKS, strict=False):
            self.add_stage(ShuffleV2DownBlock(before, after), *(ShuffleV2Block(after) for _ in range(blocks - 1)))
        self.add_last(widths[-1], last)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_stages(self.stem(x))
