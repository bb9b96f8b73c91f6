"""A student that looks observations up: common's discrete key-value bottleneck as a Stable-Baselines3 extractor.

The zip of such a student names the class below, so `PPO.load("student.zip")` needs this project to be installed.
"""

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

VALUE_DIM = 4  # with 16, four times the parameters agree with a teacher in at most 0.5 % more states


class BottleneckFeatures(BaseFeaturesExtractor):
    """Observations (batch, width) -> features (batch, features_dim): standardized, looked up, decoded.

    What it standardizes by and its keys are fitted once, without labels, to the first observations that it is shown;
    from then on only the values are learned. The heads are random projections, since an observation has few numbers.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        features_dim: int,
        codebooks: int,
        codebook_size: int,
        key_dim: int | None = None,
    ) -> None:
        super().__init__(observation_space, features_dim)
        (width,) = observation_space.shape
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.bottleneck = DiscreteKeyValueBottleneck(
            width, features_dim, codebooks, codebook_size, "projection", key_dim, value_dim=VALUE_DIM
        )

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def fit(self, observations: Tensor) -> None:
        """Fits to observations (rows, width), and freezes the keys."""
        std, mean = torch.std_mean(observations, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))  # what did not move yet keeps its scale
        self.bottleneck.fit_keys(self._standardized(observations))

    def forward(self, observations: Tensor) -> Tensor:
        return self.bottleneck(self._standardized(observations))

    def _standardized(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std
