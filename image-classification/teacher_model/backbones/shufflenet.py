"""ShuffleNets for small images, as the distillation papers use them.

`shufflenetv1` (Zhang et al., arXiv:1707.01083) has the paper's three groups and its width of 1; unlike the paper's
network, it has a ReLU after the depth-wise convolutions, too. `shufflenetv2` (Ma et al., arXiv:1807.11164) is the
paper's 1x; there are `shufflenetv2x0.5`, `shufflenetv2x1.5` and `shufflenetv2x2.0`. Unlike in the papers, the stem is
a 1x1 convolution that keeps the size, and no pooling follows. As in the distillation toolboxes, the weights start with
PyTorch's default initialization.
"""

import torch
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone, PreActivation, conv_norm

STEM = 24
BLOCKS = (4, 8, 4)  # in each stage
GROUPS = 3  # of version 1
CHANNELS_V1 = (240, 480, 960)  # of the stages
CHANNELS_V2: dict[float, tuple[int, ...]] = {  # by width, those of the stages and of the last map
    0.5: (48, 96, 192, 1024),
    1: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2: (244, 488, 976, 2048),
}


# ---- version 1 ----


class ShuffleBlock(nn.Module):
    """1x1 in groups, channels shuffled between groups, 3x3 depth-wise, 1x1 in groups; returns a map after a ReLU.

    With stride 1 the input is added. With stride 2 the average-pooled input is concatenated, so that the convolutions
    yield `out_channels - in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first_groups = 1 if in_channels == STEM else GROUPS  # too few channels to be split
        new_channels = out_channels if stride == 1 else out_channels - in_channels
        middle = new_channels // 4
        self.reduce = conv_norm(in_channels, middle, kernel=1, groups=self.first_groups)
        self.depthwise = conv_norm(middle, middle, stride=stride, groups=middle)
        self.expand = conv_norm(middle, new_channels, kernel=1, groups=GROUPS, relu=False)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.before_relu = nn.Identity()  # where hooks find it

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
            first = ShuffleBlock(before, after, stride=2)
            last.append(self.add_stage(first, *(ShuffleBlock(after, after, stride=1) for _ in range(blocks - 1))))
        self.pre_activations = [PreActivation(f"{block}.before_relu", f"{block}.expand.1") for block in last]
        self.num_features = CHANNELS_V1[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.stem(x))


# ---- version 2 ----


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
    """One half of the channels goes through a branch, the other stays; returns a map after a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return interleave(kept, self.branch(changed))


class DownsamplingBlock(nn.Module):
    """All channels go through either branch, which halve the size; returns a map after a ReLU."""

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
            self.add_stage(DownsamplingBlock(before, after), *(Block(after) for _ in range(blocks - 1)))
        self.add_last(widths[-1], last)

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.stem(x))
