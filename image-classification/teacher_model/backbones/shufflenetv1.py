"""ShuffleNet for small images (Zhang et al., arXiv:1707.01083), as the distillation papers use it: `shufflenetv1`.

It has the paper's three groups and its width of 1. Unlike the paper's network, its stem is a 1x1 convolution that
keeps the size, no pooling follows, and there is a ReLU behind the depth-wise convolutions, too. As in the distillation
toolboxes, its weights begin as PyTorch's do.
"""

import torch
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone, PreActivation
from kd.image_classification.teacher_model.backbones.layers import conv_norm

STEM = 24
GROUPS = 3
CHANNELS = (240, 480, 960)  # of the stages
BLOCKS = (4, 8, 4)


class ShuffleBlock(nn.Module):
    """1x1 in groups, channels shuffled between groups, 3x3 depth-wise, 1x1 in groups; it returns what is after a ReLU.

    Of stride 1 it is added to what came in. Of stride 2 it stands beside what came in, average-pooled, so that the
    convolutions yield `out_channels - in_channels`.
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
        for before, after, blocks in zip((STEM, *CHANNELS), CHANNELS, BLOCKS, strict=False):
            first = ShuffleBlock(before, after, stride=2)
            last.append(self.add_stage(first, *(ShuffleBlock(after, after, stride=1) for _ in range(blocks - 1))))
        self.pre_activations = [PreActivation(f"{block}.before_relu", f"{block}.expand.1") for block in last]
        self.num_features = CHANNELS[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.stem(x))
