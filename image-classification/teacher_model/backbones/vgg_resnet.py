"""VGGs and residual networks for small images, as the distillation papers use them.

VGG with batch norm (Simonyan & Zisserman, arXiv:1409.1556): `vgg11`, `vgg13`, `vgg16` and `vgg19` are the paper's A,
B, D and E; `vgg8` has one convolution per group. The last two of the paper's five poolings are left out, so 32x32
images end in 4x4 maps. One linear classifier replaces the paper's three. As in the distillation toolboxes, the
first of the five groups of convolutions is the stem and the other four are the stages.

ResNets with three stages (He et al., arXiv:1512.03385, section 4.2) have depth 6n + 2, which counts the stem, two
convolutions per block and the classifier. `resnet20` has a stem of 16 channels and stages of 16, 32 and 64;
`resnet38x2` has stages twice as wide; `resnet32x4` and `resnet8x4` have stages four times as wide (64, 128, 256) and a
stem of 32. Their shortcuts to more channels are convolutions, as in the distillation toolboxes; those of `resnet20a`,
`resnet56a`, ... are the paper's option A, without parameters.

ResNets with four stages (table 1 of the paper): `resnet18`, `resnet34` and `resnet50` are those for ImageNet, except
for the stem: a 3x3 convolution that keeps the size, without pooling. 50 is also 6n + 2, but no paper uses a ResNet50
with three stages.

Wide ResNets (Zagoruyko & Komodakis, arXiv:1605.07146): `wrn_40_2` has depth 40 and width 2. Depth 6n + 4 has n blocks
of two convolutions in each of three stages.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import (
    Backbone,
    PreActivation,
    conv_norm,
    initialize,
    initialize_small_head,
)

# ---- VGG ----

WIDTHS = (64, 128, 256, 512, 512)  # channels of each group
CONVOLUTIONS = {  # depth: convolutions in each group
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
POOLED = ("stem", "layer1", "layer2")  # groups followed by max pooling


class VGG(Backbone):
    """Images (batch, 3, h, w) of at least 8 pixels -> last map (batch, 512, h / 8, w / 8), after the ReLU."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"the depth of a VGG is one of {', '.join(map(str, CONVOLUTIONS))}, got {depth}")
        groups, channels = [], 3
        for width, convolutions in zip(WIDTHS, CONVOLUTIONS[depth], strict=True):
            groups.append([conv_norm(channels if i == 0 else width, width, bias=True) for i in range(convolutions)])
            channels = width
        self.stem = nn.Sequential(*groups[0])
        norms = [f"{self.add_stage(*group)}.1" for group in groups[1:]]
        self.pre_activations = [PreActivation(norm, norm) for norm in norms]
        self.num_features = channels
        initialize(self)

    def initialize_head(self, head: nn.Linear) -> None:
        initialize_small_head(head)

    def forward(self, x: Tensor) -> Tensor:
        for group in ("stem", *self.stages):
            x = self.get_submodule(group)(x)
            if group in POOLED:
                x = F.max_pool2d(x, 2)
        return x


# ---- residual networks ----


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the output is after the ReLU."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.before_relu = nn.Identity()  # hooks record the sum here
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return self.before_relu(self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to `4 * channels`, and a shortcut; the output is after the ReLU."""

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
        self.before_relu = nn.Identity()  # hooks record the sum here
        self.shortcut = _shortcut(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return self.before_relu(self.bn3(self.conv3(out)) + self.shortcut(x)).relu()


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class PaddedShortcut(nn.Module):
    """Every second row and column, with zero channels before and after the others (option A of the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class ResNet(Backbone):
    """Images (batch, 3, h, w) -> last map, after the ReLU. Each stage except the first halves the size.

    Args:
        block: class of the blocks.
        stem: channels of the first convolution.
        channels: inside the blocks of each stage; a stage returns `block.expansion` times as many.
        blocks: number of blocks in each stage.
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
        return self.forward_stages(self.bn1(self.conv1(x)).relu())


def three_stage_resnet(depth: int, width: int = 1) -> ResNet:
    """Images (batch, 3, h, w) -> last map (batch, 64 * width, h / 4, w / 4)."""
    if (depth - 2) % 6 or depth < 8:
        raise ValueError(f"the depth of a ResNet for small images is 18, 34, 50 or 6n + 2, at least 8, got {depth}")
    if width < 1:
        raise ValueError(f"the width of a ResNet is at least 1, got {width}")
    channels = [16 * width, 32 * width, 64 * width]
    return ResNet(BasicBlock, 32 if width >= 4 else 16, channels, [(depth - 2) // 6] * 3)


def padded_resnet(depth: int) -> ResNet:
    """`three_stage_resnet` of width 1 whose shortcuts have no parameters."""
    network = three_stage_resnet(depth)
    for stage in network.stages:
        block = network.get_submodule(stage)[0]  # type: ignore[index]
        if not isinstance(block.shortcut, nn.Identity):
            block.shortcut = PaddedShortcut((block.conv2.out_channels - block.conv1.in_channels) // 2)
    return network


def four_stage_resnet(depth: int) -> ResNet:
    """Images (batch, 3, h, w) -> last map (batch, 512, h / 8, w / 8); 2048 channels at depth 50."""
    block = Bottleneck if depth == 50 else BasicBlock
    return ResNet(block, 64, (64, 128, 256, 512), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3))


# ---- wide residual networks ----


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; the output is a sum, before any ReLU."""

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
        norms = ["layer2.0.bn1", "layer3.0.bn1", "bn"]  # the first ReLU after each stage
        self.pre_activations = [PreActivation(norm, norm) for norm in norms]
        self.num_features = widths[-1]
        initialize(self)

    def initialize_head(self, head: nn.Linear) -> None:
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.forward_stages(self.conv1(x))).relu()
