"""MobileNetV2 for small images (Sandler et al., arXiv:1801.04381), as the distillation papers use it.

`mobilenetv2` is half as wide as the paper's, `mobilenetv2x1.0` as wide. Unlike the paper's network, its blocks of 24
channels keep the size, its ReLUs are not capped at 6, and its first block starts with a 1x1 convolution as the others
do, although that adds no channels.
"""

from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone, conv_norm, initialize, small_head

STAGES = (  # rows of (expansion, channels at width 1, blocks, stride of the first of them)
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, 3x3 in each of them, 1x1 back, and where the shape allows it a shortcut.

    What it returns is before any ReLU.
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
    """Images (batch, 3, h, w) -> last map (batch, 1280, h / 16, w / 16), after the ReLU; wider than 1, 1280 * width.

    Images of 8 pixels end in maps of one.
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
        small_head(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.stem(x))
