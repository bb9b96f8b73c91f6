"""Residual networks for small images (He et al., arXiv:1512.03385), as the distillation papers use them.

Of three stages (the paper's section 4.2), by a depth of 6n + 2 that counts the stem, two convolutions a block and the
classifier: `resnet20` has stages of 16, 32 and 64 channels and a stem of 16; `resnet38x2` has stages twice as wide,
`resnet32x4` and `resnet8x4` have stages four times as wide (64, 128 and 256) and a stem of 32.

Of four stages (its table 1): `resnet18`, `resnet34` and `resnet50` are those for ImageNet but for the stem, a 3x3
convolution that keeps the size, without pooling. 50 is also 6n + 2, but no paper's ResNet50 has three stages.

Wide residual networks (Zagoruyko & Komodakis, arXiv:1605.07146): `wrn_40_2` has depth 40 and is twice as wide. Depth
6n + 4 has n blocks of two convolutions in each of three stages.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import Backbone, PreActivation, initialize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; what it returns is after the ReLU."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.before_relu = nn.Identity()  # where hooks find the sum
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return self.before_relu(self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to `4 * channels`, and a shortcut; what it returns is after the ReLU."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.before_relu = nn.Identity()  # where hooks find the sum
        self.shortcut = _shortcut(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return self.before_relu(self.bn3(self.conv3(out)) + self.shortcut(x)).relu()


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(Backbone):
    """Images (batch, 3, h, w) -> last map, after the ReLU; every stage but the first halves the size.

    Args:
        block: what stages are made of.
        stem: channels of the first convolution.
        channels: of each stage's blocks; the map has `block.expansion` times those of the last stage.
        blocks: in each stage.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], stem: int, channels: Sequence[int], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        before, last = stem, []
        for inside, count in zip(channels, blocks, strict=True):
            after = inside * block.expansion
            first = block(before, inside, stride=2 if self.stages else 1)
            last.append(self.add_stage(first, *(block(after, inside, stride=1) for _ in range(count - 1))))
            before = after
        self.pre_activations = [PreActivation(f"{path}.before_relu", f"{path}.{block.last_norm}") for path in last]
        self.num_features = before
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.bn1(self.conv1(x)).relu())


def three_stage_resnet(depth: int, width: int = 1) -> ResNet:
    """Images (batch, 3, h, w) -> last map (batch, 64 * width, h / 4, w / 4)."""
    if (depth - 2) % 6 or depth < 8:
        raise ValueError(f"the depth of a ResNet for small images is 18, 34, 50 or 6n + 2, at least 8, got {depth}")
    if width < 1:
        raise ValueError(f"the width of a ResNet is at least 1, got {width}")
    channels = [16 * width, 32 * width, 64 * width]
    return ResNet(BasicBlock, 32 if width >= 4 else 16, channels, [(depth - 2) // 6] * 3)


def four_stage_resnet(depth: int) -> ResNet:
    """Images (batch, 3, h, w) -> last map (batch, 512, h / 8, w / 8), of depth 50 with 2048 channels."""
    block = Bottleneck if depth == 50 else BasicBlock
    return ResNet(block, 64, (64, 128, 256, 512), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3))


# ---- wide residual networks ----


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
