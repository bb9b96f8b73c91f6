"""The same environments for Stable-Baselines3, so that it trains and evaluates on just what everything else uses."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from kd.reinforcement_learning.environments.vector import Environments


class SB3Environments(VecEnv):
    """`Environments` as a VecEnv, with its arguments. The first reset() starts from `seed`, as after seed(seed)."""

    def __init__(self, id: str, count: int, seed: int = 0, training: bool = False, **env_kwargs: Any) -> None:
        # VecEnv promises the first observation of the next episode at once, and the last one in the infos.
        self.environments = Environments(id, count, seed, training, AutoresetMode.SAME_STEP, **env_kwargs)
        super().__init__(count, self.environments.observation_space, self.environments.action_space)
        self.seed(seed)

    def reset(self) -> np.ndarray:
        self.environments.reset(self._seeds[0])  # environment i gets seed + i here as there
        self._reset_seeds()
        return self.environments.observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        step = self.environments.step(self._actions)
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(cut)} for cut in step.truncated & ~step.terminated]
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = step.final_observations[i]
        return self.environments.observations, step.rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        self.environments.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the vector environment (`render_mode`, `metadata`, `spec`), the same for each."""
        return [getattr(self.environments.vector, attr_name) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("these environments are configured when they are made")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError("a vector environment has no separate environments to call")


def training_environments(id: str, count: int, seed: int, **env_kwargs: Any) -> VecMonitor:
    """Environments for `learn`, which reports their returns and lengths.

    Those of Atari games are of one life and of clipped rewards: see `Environments`.
    """
    return VecMonitor(SB3Environments(id, count, seed, training=True, **env_kwargs))
