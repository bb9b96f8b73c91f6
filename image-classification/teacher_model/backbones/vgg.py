"""VGG with batch norm for small images (Simonyan & Zisserman, arXiv:1409.1556), as the distillation papers use it.

`vgg11`, `vgg13`, `vgg16` and `vgg19` are the paper's A, B, D and E; `vgg8` has one convolution a stage. Of the five
poolings of the paper the last two are left out, so that images of 32 pixels end in maps of 4, and one linear
classifier takes the place of three.
"""

import torch.nn.functional as F
from torch import Tensor

from image_classification.teacher_model.backbones.base import Backbone, PreActivation, initialize
from image_classification.teacher_model.backbones.layers import conv_norm

WIDTHS = (64, 128, 256, 512, 512)  # of the stages
CONVOLUTIONS = {  # by depth, those of each stage
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
POOLED = ("layer1", "layer2", "layer3")  # the stages that a max-pooling follows


class VGG(Backbone):
    """Images (batch, 3, h, w) of 8 pixels or more -> last map (batch, 512, h / 8, w / 8), after the ReLU."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"the depth of a VGG is one of {', '.join(map(str, CONVOLUTIONS))}, got {depth}")
        norms: list[str] = []
        channels = 3
        for width, convolutions in zip(WIDTHS, CONVOLUTIONS[depth], strict=True):
            blocks = [conv_norm(channels if i == 0 else width, width, bias=True) for i in range(convolutions)]
            norms.append(f"{self.add_stage(*blocks)}.1")
            channels = width
        self.pre_activations = [PreActivation(norm, norm) for norm in norms]
        self.num_features = channels
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
            if stage in POOLED:
                x = F.max_pool2d(x, 2)
        return x
