"""VGG with batch norm for small images (Simonyan & Zisserman, arXiv:1409.1556), as the distillation papers use it.

`vgg11`, `vgg13`, `vgg16` and `vgg19` are the paper's A, B, D and E; `vgg8` has one convolution a group. Of the five
poolings of the paper the last two are left out, so that images of 32 pixels end in maps of 4, and one linear
classifier takes the place of three. As in the distillation toolboxes, the first of the five groups of convolutions is
the stem and the other four are the stages.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import (
    Backbone,
    PreActivation,
    conv_norm,
    initialize,
    small_head,
)

WIDTHS = (64, 128, 256, 512, 512)  # of the groups
CONVOLUTIONS = {  # by depth, those of each group
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
POOLED = ("stem", "layer1", "layer2")  # the groups that a max-pooling follows


class VGG(Backbone):
    """Images (batch, 3, h, w) of 8 pixels or more -> last map (batch, 512, h / 8, w / 8), after the ReLU."""

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
        small_head(head)

    def forward(self, x: Tensor) -> Tensor:
        for group in ("stem", *self.stages):
            x = self.get_submodule(group)(x)
            if group in POOLED:
                x = F.max_pool2d(x, 2)
        return x
