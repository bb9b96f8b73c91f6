"""The convolutions of a policy for frames, at any width.

A zip of Stable-Baselines3 contains this class, so it must need nothing but torch and Stable-Baselines3.
"""

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

KERNELS = ((8, 4), (4, 2), (3, 1))  # size and stride, of Mnih et al. 2015


class FrameFeatures(BaseFeaturesExtractor):
    """Three convolutions and a layer of `features_dim`: the DQN network (32, 64, 64 and 512) at any size.

    Rusu et al. (arXiv:1511.06295) distill into (16, 32, 32 and 256), (16, 16, 16 and 128) and (16, 16, 16 and 64):
    25, 7 and 4 % of its parameters.
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int, channels: tuple[int, ...]) -> None:
        super().__init__(observation_space, features_dim)
        layers: list[nn.Module] = []
        width = observation_space.shape[0]
        for channel, (kernel, stride) in zip(channels, KERNELS, strict=True):
            layers += [nn.Conv2d(width, channel, kernel, stride), nn.ReLU()]
            width = channel
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.cnn(torch.zeros(1, *observation_space.shape)).shape[1]
        self.linear = nn.Sequential(nn.Linear(size, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(self.cnn(observations))
