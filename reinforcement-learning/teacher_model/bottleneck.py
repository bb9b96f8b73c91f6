"""The discrete key-value bottleneck as a features extractor of Stable-Baselines3.

The zip of a student with it names the class below, so `PPO.load("student.zip")` needs this project to be installed.
The classes of policies.py are pickled by value instead, which is why this one is in another module.
"""

import torch
from einops import rearrange
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

VALUE_DIM = 4  # with 16, policies agree in at most 0.5 % more states, for four times the parameters


class BottleneckFeatures(BaseFeaturesExtractor):
    """Observations (batch, width), or their parts by key -> features (batch, features_dim): standardized, looked up,
    decoded.

    Mean, standard deviation and keys are fitted once, without labels, to the first observations. After that only the
    values are trained. The heads are random projections, because an observation has few numbers.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int,
        codebooks: int,
        codebook_size: int,
        key_dim: int | None = None,
    ) -> None:
        super().__init__(observation_space, features_dim)
        width = spaces.flatdim(observation_space)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.bottleneck = DiscreteKeyValueBottleneck(
            width, features_dim, codebooks, codebook_size, "projection", key_dim, value_dim=VALUE_DIM
        )

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def fit(self, observations: Tensor) -> None:
        """Fits mean, standard deviation and keys to observations (rows, width), and freezes the keys."""
        mean, std = moments(observations)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.bottleneck.fit_keys(self._standardized(observations))

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Tensor:
        if isinstance(observations, dict):
            observations = torch.cat(
                [rearrange(part, "batch ... -> batch (...)") for part in observations.values()], 1
            )
        return self.bottleneck(self._standardized(observations))

    def _standardized(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std


def moments(observations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (...) of observations (rows, ...); a constant dimension keeps its scale."""
    std, mean = torch.std_mean(observations.float(), dim=0, correction=0)
    return mean, torch.where(std > 1e-6, std, 1.0)
