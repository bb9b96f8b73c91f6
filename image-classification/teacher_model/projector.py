"""SimKD's projector: maps a student's last map to the space of its teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd.image_classification.teacher_model.backbones.base import initialize


class Projector(nn.Module):
    """Maps (batch, in_channels, h, w) -> (batch, out_channels, h', w') (Chen et al., CVPR 2022, arXiv:2203.14001).

    1x1, 3x3 and 1x1 convolutions with batch norm, `out_channels // factor` channels in between. Unlike in the authors'
    code, which leaves them as PyTorch initializes them, the convolutions have He's normal initialization.

    Args:
        factor: f of the paper; 2 adds 214,016 parameters from 256 to 256 channels, 8 only 26,240.
        relu: Ends with a ReLU, as the teacher's map is after one.
        max_size: larger maps are first averaged down to that many pixels, the size of the teacher's map.
    """

    def __init__(
        self, in_channels: int, out_channels: int, factor: int = 2, relu: bool = True, max_size: int | None = None
    ) -> None:
        super().__init__()
        if out_channels % factor:
            raise ValueError(f"a projector factor of {factor} does not divide the teacher's {out_channels} channels")
        middle = out_channels // factor
        self.max_size = max_size
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU() if relu else nn.Identity(),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.max_size is not None and x.shape[-1] > self.max_size:
            x = F.adaptive_avg_pool2d(x, self.max_size)
        return self.layers(x)
