"""Small networks with the module names of other projects' repositories, from which people have weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block; `shortcut` is the name of its convolutional shortcut, "" for option A without parameters."""

    def __init__(self, channels: int, out: int, stride: int, shortcut: str, relu: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.changes, self.name, self.relu = stride != 1 or channels != out, shortcut, relu
        if self.changes and shortcut:
            layers = nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            self.add_module(shortcut, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.changes and self.name:
            x = self.get_submodule(self.name)(x)
        elif self.changes:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
        return F.relu(out + x) if self.relu else out + x


class ResNet(nn.Module):
    """ResNet20-like: RepDistiller and chenyaofo (`downsample`, `fc`), kuangliu (`shortcut`, `linear`), akamaster."""

    def __init__(self, classes: int, n: int, stem: int, width: int, shortcut: str, head: str) -> None:
        super().__init__()
        self.conv1, self.bn1, self.head = nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), head
        before = stem
        for i, out in enumerate((width, 2 * width, 4 * width), 1):
            blocks = [Block(before if j == 0 else out, out, 2 if j == 0 and i > 1 else 1, shortcut) for j in range(n)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            before = out
        self.add_module(head, nn.Linear(before, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for i in range(1, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return self.get_submodule(self.head)(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        out = self.conv2(self.bn2(self.conv1(active)).relu())
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-10-1 as in xternalz and RepDistiller: `block1.layer.0`, `convShortcut`, a last `bn1`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1, self.block2 = WideStage(WideBlock(16, 16, 1)), WideStage(WideBlock(16, 32, 2))
        self.block3, self.bn1, self.fc = WideStage(WideBlock(32, 64, 2)), nn.BatchNorm2d(64), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((2, 3)))


class VGG8(nn.Module):
    """As in RepDistiller: `block0.0`, and `classifier`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        before = 3
        for i, out in enumerate((64, 128, 256, 512, 512)):
            self.add_module(f"block{i}", nn.Sequential(nn.Conv2d(before, out, 3, padding=1), nn.BatchNorm2d(out)))
            before = out
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = self.get_submodule(f"block{i}")(x).relu()
            x = F.max_pool2d(x, 2) if i < 3 else x
        return self.classifier(x.mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, t: int) -> None:
        super().__init__()
        middle = channels * t
        self.adds = stride == 1 and channels == out
        self.conv = nn.Sequential(
            *(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU()),
            *(nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.ReLU()),
            *(nn.Conv2d(middle, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Of width 0.25, as in RepDistiller: `conv1.0`, `blocks.0.0.conv.0`, `conv2.0`, `classifier.0`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        rows, before = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)], 8
        self.blocks = nn.ModuleList()
        for t, c, n, s in [*rows, (6, 160, 3, 2), (6, 320, 1, 1)]:
            blocks = [Inverted(before if i == 0 else c // 4, c // 4, s if i == 0 else 1, t) for i in range(n)]
            self.blocks.append(nn.Sequential(*blocks))
            before = c // 4
        self.conv2 = nn.Sequential(nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


def add_convolutions(module: nn.Module, *shapes: tuple[int, int, int, int, int]) -> None:
    """conv1, bn1, conv2, ... of (channels, out, kernel, stride, groups)."""
    for i, (channels, out, kernel, stride, groups) in enumerate(shapes, 1):
        conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        module.add_module(f"conv{i}", conv)
        module.add_module(f"bn{i}", nn.BatchNorm2d(out))


class Convolutions(nn.Module):
    def layer(self, i: int, x: Tensor, relu: bool = True) -> Tensor:
        x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
        return x.relu() if relu else x


class ShuffleBlockV1(Convolutions):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.groups, middle = stride, 1 if channels == 24 else 3, out // 4
        shapes = (channels, middle, 1, 1, self.groups), (middle, middle, 3, stride, middle), (middle, out, 1, 1, 3)
        add_convolutions(self, *shapes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(2, F.channel_shuffle(self.layer(1, x), self.groups))
        out = self.layer(3, out, relu=False)
        return (torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x).relu()


class ShuffleBlockV2(Convolutions):
    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels // 2
        add_convolutions(self, (c, c, 1, 1, 1), (c, c, 3, 1, c), (c, c, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, 1)
        x = self.layer(3, self.layer(2, self.layer(1, x), relu=False))
        return F.channel_shuffle(torch.cat([kept, x], 1), 2)


class DownBlock(Convolutions):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        c, m = channels, out // 2
        add_convolutions(self, (c, c, 3, 2, c), (c, m, 1, 1, 1), (c, m, 1, 1, 1), (m, m, 3, 2, m), (m, m, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        left = self.layer(2, self.layer(1, x, relu=False))
        right = self.layer(5, self.layer(4, self.layer(3, x), relu=False))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNet(Convolutions):
    """ShuffleNetV1, or ShuffleNetV2 of width 0.5, as in RepDistiller: `conv1`, `layer1.0.conv1`, `linear`."""

    def __init__(self, classes: int, version: int) -> None:
        super().__init__()
        widths, last = ((240, 480, 960), 960) if version == 1 else ((48, 96, 192), 1024)
        add_convolutions(self, (3, 24, 1, 1, 1))
        before = 24
        for i, (out, blocks) in enumerate(zip(widths, (4, 8, 4), strict=True), 1):
            first = ShuffleBlockV1(before, out - before, 2) if version == 1 else DownBlock(before, out)
            others = [ShuffleBlockV1(out, out, 1) if version == 1 else ShuffleBlockV2(out) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *others))
            before = out
        self.version = version
        if version == 2:
            self.conv2, self.bn2 = nn.Conv2d(before, last, 1, bias=False), nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(1, x)
        for i in range(1, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return self.linear((x if self.version == 1 else self.layer(2, x)).mean((2, 3)))


class Distiller(nn.Module):
    """karanchahal/distiller: a stem of 64 channels, ReLUs only after the stages, and 2x2 averages of the last map.

    Args:
        n: blocks per stage.
    """

    def __init__(self, num_classes: int, n: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        before = 64
        for i, out in enumerate((16, 32, 64), 1):
            strides = [2 if i > 1 else 1, *(1 for _ in range(n - 1))]
            blocks = [Block(before if j == 0 else out, out, s, "shortcut", relu=False) for j, s in enumerate(strides)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            before = out
        self.linear = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for i in range(1, 4):
            x = F.relu(self.get_submodule(f"layer{i}")(x))
        return self.linear(F.avg_pool2d(x, x.shape[-1] // 2).flatten(1))


def networks(classes: int) -> dict[str, tuple[str, Any]]:
    """{naming: (architecture here, network)}."""
    return {
        "RepDistiller ResNet": ("resnet8x4", ResNet(classes, 1, 32, 64, "downsample", "fc")),
        "chenyaofo": ("resnet14", ResNet(classes, 2, 16, 16, "downsample", "fc")),
        "kuangliu": ("resnet8", ResNet(classes, 1, 16, 16, "shortcut", "linear")),
        "akamaster": ("resnet20a", ResNet(classes, 3, 16, 16, "", "linear")),
        "WRN": ("wrn_10_1", WideResNet(classes)),
        "VGG": ("vgg8", VGG8(classes)),
        "MobileNetV2": ("mobilenetv2x0.25", MobileNetV2(classes)),
        "ShuffleNetV1": ("shufflenetv1", ShuffleNet(classes, 1)),
        "ShuffleNetV2": ("shufflenetv2x0.5", ShuffleNet(classes, 2)),
    }
