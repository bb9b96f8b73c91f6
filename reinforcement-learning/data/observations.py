"""Observations of other spaces as one Box: vectors for Dict, Discrete, MultiDiscrete and MultiBinary observations, and
frames with the channels first.

Vectors are those of Stable-Baselines3's preprocessing and CombinedExtractor: the numbers of a Dict in the order of its
keys, Discrete and MultiDiscrete observations one-hot. A policy of Stable-Baselines3 for the original observations
therefore has the same weights as one for the Box.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from einops import rearrange
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
from gymnasium.spaces.utils import flatten, flatten_space, unflatten
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first, preprocess_obs
from torch import Tensor

SUPPORTED = "supported are Box, Discrete, MultiDiscrete and MultiBinary observations, and a Dict of vectors"
FLATTEN = "pass --wrapper gymnasium.wrappers:FlattenObservation"
FILTER = "pass --wrapper 'gymnasium.wrappers:FilterObservation{\"filter_keys\": [...]}' with the keys of vectors"


def unsupported_observations(space: Space) -> str:
    """Describes observations that cannot be a Box, and what helps; empty for a supported space."""
    if not isinstance(space, Dict):
        return f"{fault}{_cure(space)}" if (fault := _fault(space)) else ""
    for key, part in space.items():
        if is_image_space(part):
            return f"frames at key {key} of its Dict observations: {FILTER}"
        if fault := _fault(part) or ("a dot in the name" if "." in key else ""):
            return f"{fault} at key {key} of its Dict observations{_cure(space)}"
    return ""


def _fault(space: Space) -> str:
    kind = type(space).__name__
    if not isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        return f"{kind} observations"
    if isinstance(space, Box):
        return "" if space.shape else "observations that are a single number"
    if isinstance(space, MultiDiscrete) and len(space.shape) > 1:
        return f"MultiDiscrete observations of shape {space.shape}"
    return f"{kind} observations that do not start from 0" if np.any(getattr(space, "start", 0)) else ""


def _cure(space: Space) -> str:
    return f": {FLATTEN}" if space.is_np_flattenable else f"; {SUPPORTED}"


def box_space(space: Space) -> Box:
    """The Box of the observations of a supported space: the same Box, one with the channels first, or a vector: of
    float32, or of uint8 without numbers, which needs a quarter of the memory.
    """
    if not isinstance(space, Box):
        flat = flatten_space(space)
        assert isinstance(flat, Box)
        dtype = np.float32 if isinstance(space, Dict) else np.uint8
        return Box(flat.low.astype(dtype), flat.high.astype(dtype), dtype=dtype)
    if _has_channels_last(space):
        return Box(np.moveaxis(space.low, -1, 0), np.moveaxis(space.high, -1, 0), dtype=np.uint8)
    return space


class BoxObservation(gym.ObservationWrapper[np.ndarray, Any, Any]):
    """Converts the observations of a supported space to those of `box_space`."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = box_space(env.observation_space)

    def observation(self, observation: Any) -> np.ndarray:
        return as_box(self.env.observation_space, observation)


def as_box(space: Space, observation: Any) -> np.ndarray:
    """An observation of a supported space as one of `box_space`."""
    if not isinstance(space, Box):
        return np.asarray(flatten(space, observation), np.float32 if isinstance(space, Dict) else np.uint8)
    return np.moveaxis(observation, -1, 0) if _has_channels_last(space) else observation


def with_box_observations(env: gym.Env) -> gym.Env:
    """Wraps an environment in `BoxObservation` if its observations are of another supported space."""
    space = env.observation_space
    return env if is_box(space) or unsupported_observations(space) else BoxObservation(env)


def to_box(observations: Tensor | dict[str, Tensor], space: Space) -> Tensor:
    """Converts a batch of observations, those of a Dict by key, as `BoxObservation` does: (batch, ...)."""
    if isinstance(space, Dict):
        assert isinstance(observations, dict)
        return torch.cat([_vectors(part, space[key]) for key, part in observations.items()], 1)
    assert isinstance(observations, Tensor)
    if not isinstance(space, Box):
        return _vectors(observations, space)
    return rearrange(observations, "batch h w c -> batch c h w") if _has_channels_last(space) else observations


def _vectors(observations: Tensor, space: Space) -> Tensor:
    vectors = preprocess_obs(observations, space)
    assert isinstance(vectors, Tensor)
    return rearrange(vectors, "batch ... -> batch (...)")


def from_box(rows: np.ndarray, space: Space) -> np.ndarray | dict[str, np.ndarray]:
    """The inverse of `to_box`: observations of a space, in its dtype, from rows (batch, ...)."""
    if isinstance(space, Box):
        return np.ascontiguousarray(np.moveaxis(rows, 1, -1)) if _has_channels_last(space) else rows
    found = [unflatten(space, row) for row in rows]
    return (
        {key: np.stack([one[key] for one in found]) for key in space} if isinstance(space, Dict) else np.stack(found)
    )


def is_box(space: Space) -> bool:
    """Whether observations need no conversion."""
    return isinstance(space, Box) and not _has_channels_last(space)


def original_space(env: gym.Env) -> Space:
    """The observations of an environment before `with_box_observations`."""
    return env.env.observation_space if isinstance(env, BoxObservation) else env.observation_space


def _has_channels_last(space: Box) -> bool:
    return is_image_space(space) and not is_image_space_channels_first(space)
