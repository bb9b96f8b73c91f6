"""Wide residual networks (Zagoruyko & Komodakis, arXiv:1605.07146): `wrn_40_2` has depth 40 and is twice as wide.

Depth 6n + 4 has n blocks of two convolutions in each of three stages.
"""

from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone, PreActivation, initialize


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before either 3x3 convolution; what it returns is a sum, before any ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x).relu()
        out = self.conv2(self.bn2(self.conv1(activated)).relu())
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(Backbone):
    """Images (batch, 3, h, w) -> last map (batch, 64 * width, h / 4, w / 4), after the last batch norm and ReLU."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        blocks_per_stage, rest = divmod(depth - 4, 6)
        if rest or blocks_per_stage < 1 or width < 1:
            raise ValueError(f"a wide ResNet has depth 6n + 4 and width 1 or more, got {depth} and {width}")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        for before, after in zip(widths, widths[1:], strict=False):
            first = PreActivationBlock(before, after, stride=2 if self.stages else 1)
            self.add_stage(first, *(PreActivationBlock(after, after, stride=1) for _ in range(blocks_per_stage - 1)))
        self.bn = nn.BatchNorm2d(widths[-1])
        norms = ["layer2.0.bn1", "layer3.0.bn1", "bn"]  # a stage's last ReLU is the first one behind it
        self.pre_activations = [PreActivation(norm, norm) for norm in norms]
        self.num_features = widths[-1]
        initialize(self)

    def initialize_head(self, head: nn.Linear) -> None:
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.through_stages(self.conv1(x))).relu()
