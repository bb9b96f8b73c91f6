"""Tiny environments with a known optimal policy, `right_action`, whose return is exactly 10 per episode.

Importing this module registers them.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space


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


class KnownAnswerSpaces(_Questions):
    """Each observation encodes a number from 0 to 5, high * 2 + low, which the action repeats. Reward: the share of
    right components, or 1 minus the mean absolute error of Box actions.
    """

    OBSERVATIONS: dict[str, Space] = {
        "Dict": Dict(
            {
                "position": Box(-2, 2, (1, 2), np.float64),
                "high": Discrete(3),
                "noise": MultiDiscrete([4, 2]),
                "low": MultiBinary(1),
            }
        ),
        "Discrete": Discrete(6),
        "MultiDiscrete": MultiDiscrete([3, 2]),
        "MultiBinary": MultiBinary(3),
        "frames": Box(0, 255, (40, 36, 3), np.uint8),
    }
    ACTIONS: dict[str, Space] = {
        "Discrete": Discrete(3),
        "MultiDiscrete": MultiDiscrete([3, 2]),
        "MultiBinary": MultiBinary(3),
        "Box": Box(-1, 1, (2,), np.float32),
    }

    def __init__(self, observations: str = "Dict", actions: str = "MultiDiscrete") -> None:
        self.kind, self.actions = observations, actions
        self.observation_space, self.action_space = self.OBSERVATIONS[observations], self.ACTIONS[actions]

    def right_action(self) -> Any:
        high, low = divmod(self._number, 2)
        bits = [high == 1, high == 2, low]
        return {"Discrete": high, "MultiDiscrete": [high, low], "MultiBinary": bits, "Box": [high - 1, low]}[
            self.actions
        ]

    def _draw(self) -> Any:
        self._number = int(self.np_random.integers(6))
        high, low = divmod(self._number, 2)
        noise = self.np_random.integers([4, 2])
        if self.kind == "Dict":
            position = self.np_random.uniform(-2, 2, (1, 2))
            return {"position": position, "high": np.int64(high), "noise": noise, "low": np.array([low], np.int8)}
        if self.kind == "frames":
            frame = np.zeros((40, 36, 3), np.uint8)
            frame[:, 12 * high : 12 * high + 12, low], frame[..., 2] = 255, noise[0]
            return frame
        bits = np.array([high == 1, high == 2, low], np.int8)
        return {"Discrete": np.int64(self._number), "MultiDiscrete": np.array([high, low]), "MultiBinary": bits}[
            self.kind
        ]

    def _reward(self, action: Any) -> float:
        error = np.abs(action - np.asarray(self.right_action()))
        return float(1 - (error if self.actions == "Box" else error > 0).mean())


_SPACES = [(kind, actions) for kind in KnownAnswerSpaces.OBSERVATIONS for actions in KnownAnswerSpaces.ACTIONS]
_ENVIRONMENTS: dict[str, tuple[type[gym.Env], dict[str, str]]] = {  # id -> class, arguments
    "KnownAnswer-v0": (KnownAnswer, {}),
    "KnownAnswerBox-v0": (KnownAnswerBox, {}),
    "KnownAnswerSpaces-v0": (KnownAnswerSpaces, {}),
    **{
        f"{kind}{actions}-v0": (KnownAnswerSpaces, {"observations": kind, "actions": actions})
        for kind, actions in _SPACES
    },
}
for _id, (_class, _arguments) in _ENVIRONMENTS.items():
    if _id not in gym.registry:
        gym.register(_id, f"{__name__}:{_class.__name__}", max_episode_steps=10, kwargs=_arguments)
