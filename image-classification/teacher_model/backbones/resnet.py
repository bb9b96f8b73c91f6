"""Residual networks for small images (He et al., arXiv:1512.03385, section 4.2), as the distillation papers use them.

`resnet20` has stages of 16, 32 and 64 channels; `resnet32x4` and `resnet8x4` are four times as wide (stem 32, stages
64, 128 and 256), `resnet38x2` twice. The depth counts the stem, two convolutions a block, and the classifier.
"""

from torch import Tensor, nn

from image_classification.teacher_model.backbones.base import Backbone, PreActivation, initialize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; what it returns is after the ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.before_relu = nn.Identity()  # where hooks find the sum
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return self.before_relu(self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(Backbone):
    """Images (batch, 3, h, w) -> last map (batch, 64 * width, h / 4, w / 4), after the ReLU."""

    def __init__(self, depth: int, width: int = 1) -> None:
        super().__init__()
        if (depth - 2) % 6 or depth < 8:
            raise ValueError(f"the depth of a ResNet for small images is 6n + 2, at least 8, got {depth}")
        if width < 1:
            raise ValueError(f"the width of a ResNet is at least 1, got {width}")
        stem = 32 if width > 1 else 16
        channels = [16 * width, 32 * width, 64 * width]
        blocks_per_stage = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        for number, (before, after) in enumerate(zip([stem, *channels], channels, strict=False), start=1):
            blocks = [BasicBlock(before, after, stride=1 if number == 1 else 2)]
            blocks += [BasicBlock(after, after, stride=1) for _ in range(blocks_per_stage - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.stages = ["layer1", "layer2", "layer3"]
        last = [f"{stage}.{blocks_per_stage - 1}" for stage in self.stages]
        self.pre_activations = [PreActivation(f"{block}.before_relu", f"{block}.bn2") for block in last]
        self.num_features = channels[-1]
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.through_stages(self.bn1(self.conv1(x)).relu())
