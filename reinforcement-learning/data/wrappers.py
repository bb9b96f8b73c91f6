"""Wrappers of environments: those of agents of rl-baselines3-zoo, of evaluations, and of students that observe
otherwise than their teachers.
"""

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.observations import as_box, box_space, with_box_observations


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
    """The last `n` observations, oldest first, in one vector (n * size,), or in the channels of frames. Observations
    of other spaces become vectors first (see `observations`).

    Before the start of an episode they are zeros, as in VecFrameStack of Stable-Baselines3 (`padding` zero), or the
    first observation (reset), as if the environment had been at rest.
    """

    def __init__(self, env: gym.Env, n: int, padding: Literal["zero", "reset"] = "zero") -> None:
        env = with_box_observations(env)
        super().__init__(env)
        if n < 1 or padding not in ("zero", "reset"):
            raise UserError(f"frame_stack needs n of 1 or more and padding zero or reset, not {n} and {padding}")
        space = _box(env, "frame_stack", 1, 3)
        low, high = (np.concatenate([bound] * n) for bound in (space.low, space.high))
        self.observation_space = Box(low, high, dtype=_float(space))
        self.n, self.padding = n, padding

    def reset(self, **keywords: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(**keywords)
        before = observation if self.padding == "reset" else np.zeros_like(observation)
        self.stack = np.concatenate([before] * self.n)
        return self.observation(observation), info

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.stack = np.concatenate([self.stack[len(observation) :], observation])
        return self.stack


class Mask(gym.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Sets the numbers at some `indices` of a vector to 0, as MaskVelocityWrapper of rl-baselines3-zoo does."""

    def __init__(self, env: gym.Env, indices: Sequence[int]) -> None:
        super().__init__(env)
        self.kept = np.ones_like(_box(env, "mask", 1).low)
        if not set(indices) <= set(range(len(self.kept))):
            raise UserError(f"mask takes indices from 0 to {len(self.kept) - 1}, not {indices}")
        self.kept[list(indices)] = 0

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation * self.kept


class Select(gym.ObservationWrapper[Any, Any, Any]):
    """Some `indices` of a vector, or some `keys` of a Dict: a Dict again, or the value of a single key."""

    def __init__(self, env: gym.Env, indices: Sequence[int] = (), keys: Sequence[str] = ()) -> None:
        super().__init__(env)
        if bool(indices) == bool(keys):
            raise UserError("select needs either indices or keys")
        self.indices, self.keys = list(indices), list(keys)
        self.observation_space = self._of_keys(env) if keys else self._of_indices(env)

    def _of_keys(self, env: gym.Env) -> gym.Space:
        spaces = env.observation_space
        if not isinstance(spaces, Dict):
            raise UserError(f"there are no keys to select, such as {self.keys[0]}, in observations that are {spaces}")
        if unknown := [key for key in self.keys if key not in spaces.spaces]:
            raise UserError(f"there is no observation {unknown[0]} to select: choose of {', '.join(spaces.spaces)}")
        return spaces[self.keys[0]] if len(self.keys) == 1 else Dict({key: spaces[key] for key in self.keys})

    def _of_indices(self, env: gym.Env) -> gym.Space:
        space = _box(env, "the selection of indices", 1)
        if outside := [index for index in self.indices if not 0 <= index < len(space.low)]:
            raise UserError(
                f"there is no observation {outside[0]} to select: the observations are {len(space.low)} numbers, 0 to "
                f"{len(space.low) - 1}"
            )
        return Box(space.low[self.indices], space.high[self.indices], dtype=_float(space))

    def observation(self, observation: Any) -> Any:
        if self.indices:
            return observation[self.indices]
        if len(self.keys) == 1:
            return observation[self.keys[0]]
        return {key: observation[key] for key in self.keys}


class TeacherPart(gym.ObservationWrapper[Any, Any, Any]):
    """Keeps the observation of the teacher, around which further wrappers make that of the student."""

    def observation(self, observation: Any) -> Any:
        self.newest = observation
        return observation


class StudentPart(gym.ObservationWrapper[np.ndarray, Any, Any]):
    """The observation that TeacherPart keeps and that of this wrapper's environment, both as a Box (see
    `observations`), in one vector.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        inner = env
        while not isinstance(inner, TeacherPart):
            assert isinstance(inner, gym.Wrapper), "student_part needs teacher_part"
            inner = inner.env
        self.teacher, self.parts = inner, (inner.observation_space, env.observation_space)
        boxes = [box_space(space) for space in self.parts]
        low, high = (np.concatenate([getattr(box, end).ravel() for box in boxes]) for end in ("low", "high"))
        self.observation_space = Box(low, high, dtype=low.dtype.type)

    def observation(self, observation: Any) -> np.ndarray:
        both = zip(self.parts, (self.teacher.newest, observation), strict=True)
        return np.concatenate([as_box(space, value).ravel() for space, value in both])


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
