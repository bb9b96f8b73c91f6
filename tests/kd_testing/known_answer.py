"""Two tiny environments with a known optimal policy, `right_action`, whose return is exactly 10 per episode.

Importing this module registers them.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class _Questions(gym.Env):
    """Draws a new observation at each step. The reward depends on the previous observation and the action."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._observation = self._draw()
        return self._observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self._reward(action)
        self._observation = self._draw()
        return self._observation, reward, False, False, {}

    def _draw(self) -> np.ndarray:
        raise NotImplementedError

    def _reward(self, action: Any) -> float:
        raise NotImplementedError


class KnownAnswer(_Questions):
    """The action is the index of the largest of four numbers. Reward: 1 if right, else 0."""

    observation_space = Box(-np.inf, np.inf, (4,), np.float32)
    action_space = Discrete(4)

    @staticmethod
    def right_action(observations: np.ndarray) -> np.ndarray:
        return observations.argmax(-1)  # (..., 4) -> (...)

    def _draw(self) -> np.ndarray:
        return self.np_random.standard_normal(4, dtype=np.float32)

    def _reward(self, action: Any) -> float:
        return float(action == self.right_action(self._observation))


class KnownAnswerBox(_Questions):
    """The action is the first of three numbers and the negated second. Reward: 1 minus the mean absolute error."""

    observation_space = Box(-1, 1, (3,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    @staticmethod
    def right_action(observations: np.ndarray) -> np.ndarray:
        return observations[..., :2] * np.array([1, -1], dtype=np.float32)  # (..., 3) -> (..., 2)

    def _draw(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def _reward(self, action: Any) -> float:
        return float(1 - np.abs(action - self.right_action(self._observation)).mean())


for _id, _name in {"KnownAnswer-v0": "KnownAnswer", "KnownAnswerBox-v0": "KnownAnswerBox"}.items():
    if _id not in gym.registry:
        gym.register(_id, f"{__name__}:{_name}", max_episode_steps=10)
