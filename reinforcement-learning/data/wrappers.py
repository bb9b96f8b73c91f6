"""Wrappers of environments with which agents of rl-baselines3-zoo were trained, and one for evaluations."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from kd.common.utils.errors import UserError


class TimeFeature(gym.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Appends the remaining share of the episode, from 1 to 0, to vectors, as TimeFeatureWrapper of sb3-contrib (Pardo
    et al., arXiv:1712.00378). `max_steps`: the length of an episode of an environment without a time limit.
    `test_mode`: the feature is always 1.
    """

    def __init__(self, env: gym.Env, max_steps: int = 1000, test_mode: bool = False) -> None:
        super().__init__(env)
        space = _box(env, "time_feature", 1)
        low, high = np.append(space.low, 0), np.append(space.high, 1)
        self.observation_space = Box(low.astype(space.dtype), high.astype(space.dtype), dtype=_float(space))
        limit = env.spec.max_episode_steps if env.spec else None
        self.limit, self.test_mode, self.steps = limit or max_steps, test_mode, 0

    def reset(self, **keywords: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.steps = 0
        return super().reset(**keywords)

    def step(self, action: Any) -> Any:
        self.steps += 1
        return super().step(action)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        feature = 1.0 if self.test_mode else 1 - self.steps / self.limit
        return np.append(observation, np.asarray(feature, observation.dtype))


class FrameStack(gym.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """The last `n` observations, oldest first, in one vector (n * size,), or in the channels of frames; zeros before
    the start of an episode. It equals VecFrameStack of Stable-Baselines3.
    """

    def __init__(self, env: gym.Env, n: int) -> None:
        super().__init__(env)
        space = _box(env, "frame_stack", 1, 3)
        low, high = (np.concatenate([bound] * n) for bound in (space.low, space.high))
        self.observation_space = Box(low, high, dtype=_float(space))
        self.size, self.stack = len(space.low), np.zeros_like(low)

    def reset(self, **keywords: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.stack = np.zeros_like(self.stack)
        return super().reset(**keywords)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.stack = np.concatenate([self.stack[self.size :], observation])
        return self.stack


def _float(space: Box) -> Any:
    return space.dtype.type if space.dtype is not None else np.float32


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Starts the episode k after `reset(seed=s)` with the seed s + k * stride. So neither its start nor its random
    events depend on the steps of earlier episodes, as they do in LunarLander, whose engines are random.
    """

    def __init__(self, env: gym.Env, stride: int) -> None:
        super().__init__(env)
        self.stride, self.next_seed = stride, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed = self.next_seed if seed is None else seed
        self.next_seed = seed + self.stride
        return self.env.reset(seed=seed, options=options)


def _box(env: gym.Env, wrapper: str, *dimensions: int) -> Box:
    space = env.observation_space
    if isinstance(space, Box) and len(space.shape) in dimensions:
        return space
    kinds = " or ".join({1: "vectors", 3: "frames"}[number] for number in dimensions)
    raise UserError(f"{wrapper} needs observations that are {kinds}, but the environment has {space}")
