"""Vector environments of Gymnasium, and their adapter to Stable-Baselines3.

The transitions do not depend on the vector environment or the autoreset mode: they are the steps in which `acting` is
True.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from kd.common.utils.devices import use_one_thread
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.observations import (
    is_box,
    original_space,
    unsupported_observations,
    with_box_observations,
)
from kd.reinforcement_learning.data.specs import environment_error, find_spec, time_limit
from kd.reinforcement_learning.data.wrappers import SeededEpisodes

SUPPORTED = "supported are Discrete and MultiDiscrete actions from 0, MultiBinary, and bounded Box of one dimension"


def require_single_process() -> None:
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise UserError(
            f"policies are trained and evaluated in one process, not in {processes}: start the script with python "
            "instead of torchrun or accelerate launch"
        )


@dataclass
class Step:
    rewards: np.ndarray  # (count,) float; 0 for an environment that only restarted
    terminated: np.ndarray  # (count,) bool
    truncated: np.ndarray  # (count,) bool
    # (count, ...), before a restart; with SAME_STEP, `Environments.observations` are then those after it.
    final_observations: np.ndarray


class Memory(NamedTuple):
    """What a recurrent policy keeps of the steps before: `size` numbers, zero at the start of an episode. `step`: rows
    of an observation and a state (rows, ...) -> the states after them (rows, size).
    """

    size: int
    step: Callable[[Tensor], Tensor]


def is_vectorized(id: str) -> bool:
    """Whether NumPy steps all copies of an environment at once, so that hundreds cost little more than one."""
    spec = find_spec(id)
    return spec.vector_entry_point is not None and spec.namespace != "ALE"


def choose_threads(*ids: str) -> None:
    """Uses one thread if no environment has frames: a policy for vectors is too small for several threads."""
    if torch.get_num_threads() == 1:
        return  # without creating environments
    for id in ids:
        with closing(Environments(id, 1)) as environments:
            if is_image_space(environments.observation_space):
                return
    use_one_thread()


class Environments:
    """`count` copies of one Gymnasium environment, which are stepped together and restart automatically.

    Environment i has the seed `seed + i`, unless all share one generator (the vector entry point of CartPole). With
    `seeded_episodes` its episode k has the seed `seed + i + k * count`, except in vector entry points. The caller
    clips actions to the bounds of a Box with `to_environment`. Environments that are registered without a time limit
    are truncated after EPISODE_STEPS.

    Observations are those of one Box (see `observations`), `observation_space`; `original_space` is the space of the
    environment itself.

    With the `memory` of a recurrent policy, each row of `observations` is a vector: an observation, and the state of
    the policy before it. The states also change if another policy acts.

    Atari games (ALE/...) return four 84x84 grey frames and use the sticky actions of their id. `training` clips their
    rewards to -1, 0, 1 and ends an episode at the loss of a life. The whole game then restarts, unlike in
    Stable-Baselines3's AtariWrapper, so only training=False measures a game's score. Other environments ignore it.
    """

    def __init__(
        self,
        id: str,
        count: int,
        seed: int = 0,
        training: bool = False,
        autoreset: AutoresetMode | None = None,
        seeded_episodes: bool = False,
        memory: Memory | None = None,
        **env_kwargs: Any,
    ) -> None:
        if count < 1:
            raise UserError(f"the number of environments must be 1 or more, not {count}")
        self.id, self.count, self.memory = id, count, memory
        self.autoreset = autoreset or AutoresetMode.NEXT_STEP  # the default of all vector environments of Gymnasium
        assert memory is None or self.autoreset == AutoresetMode.NEXT_STEP
        spec = find_spec(id)
        if spec.namespace == "ALE":
            env_kwargs = _atari_kwargs(training, env_kwargs)
        try:
            self.vector = _make(spec, count, self.autoreset, env_kwargs)
        except Exception as error:  # the environment's code may raise any exception
            raise environment_error(id, error) from error
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.original_space = self.observation_space
        if isinstance(self.vector, SyncVectorEnv):
            self.original_space = original_space(self.vector.envs[0])
        if fault := _unsupported(self.observation_space, self.action_space):
            self.close()
            raise UserError(f"environment {id} has {fault}")
        if seeded_episodes and isinstance(self.vector, SyncVectorEnv):
            self.vector.envs = [SeededEpisodes(one, count) for one in self.vector.envs]
        self.reset(seed)

    @property
    def has_action_masks(self) -> bool:
        """Whether the environment has the method `action_masks`, from which MaskablePPO takes its masks."""
        return isinstance(self.vector, SyncVectorEnv) and self.vector.envs[0].has_wrapper_attr("action_masks")

    def reset(self, seed: int | None = None) -> None:
        """Restarts all environments; without a seed their random generators continue."""
        observations: np.ndarray = self.vector.reset(seed=seed)[0]  # (count, ...)
        self.observations = observations
        if self.memory is not None:
            self.observations = _with_states(observations, np.zeros((self.count, self.memory.size), np.float32))
        self.acting = np.ones(self.count, dtype=bool)  # False where the next step ignores the action and restarts

    def step(self, actions: np.ndarray) -> Step:
        """Acts in all environments, (count,) or (count, components), and updates `observations` and `acting`."""
        actions = np.asarray(actions, dtype=self.vector.action_space.dtype)
        if self.memory is not None:
            states = self.memory.step(torch.as_tensor(self.observations)).numpy() * self.acting[:, None]
        self.observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        if not (np.isfinite(rewards).all() and np.isfinite(self.observations).all()):
            raise UserError(f"environment {self.id} returned an observation or a reward that is not finite")
        done = terminated | truncated
        final = self.observations
        if self.autoreset == AutoresetMode.NEXT_STEP:
            self.acting = ~done
        elif done.any():
            final = final.copy()
            final[done] = np.stack(infos["final_obs"][done])  # (count,) objects or (count, ...) -> (ended, ...)
        if self.memory is not None:
            self.observations = _with_states(self.observations, states)
        return Step(np.asarray(rewards, dtype=np.float64), terminated, truncated, final)

    def close(self) -> None:
        self.vector.close()


def _with_states(observations: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Rows (count, all columns) of observations (count, ...) and the states of a policy (count, size)."""
    return np.concatenate([observations.reshape(len(observations), -1), states], 1)


def _atari_kwargs(training: bool, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    if env_kwargs.get("life_loss_info"):  # ale_py leaves final_obs undefined
        raise UserError("life_loss_info ends episodes without a restart; use episodic_life=True, which restarts")
    return {"num_threads": 1, "reward_clipping": training, "episodic_life": training} | env_kwargs


def _make(spec: EnvSpec, count: int, autoreset: AutoresetMode, env_kwargs: dict[str, Any]) -> VectorEnv:
    """Uses the environment's vector entry point if it has one that supports the autoreset mode and has Box
    observations.
    """
    passed = env_kwargs
    env_kwargs = time_limit(spec) | env_kwargs
    vectorized = spec.vector_entry_point
    if vectorized and "max_episode_steps" in env_kwargs and "max_episode_steps" not in _parameters(vectorized):
        vectorized = None
    vector_kwargs: dict[str, Any] = {}
    if vectorized and "autoreset_mode" in _parameters(vectorized):
        env_kwargs = env_kwargs | {"autoreset_mode": autoreset}
    elif not vectorized or autoreset != AutoresetMode.NEXT_STEP:
        vectorized, vector_kwargs = None, {"autoreset_mode": autoreset}
    if "render_mode" in _parameters(vectorized or spec.entry_point):
        env_kwargs = {"render_mode": None} | env_kwargs  # the default halves the speed of LunarLander
    with quiet_mujoco():
        # For an id instead of a spec Gymnasium warns about every version but the newest.
        if not vectorized:
            wrappers: Any = [with_box_observations]
            return gym.make_vec(spec, count, "sync", vector_kwargs, wrappers, **env_kwargs)
        vector = gym.make_vec(spec, count, "vector_entry_point", **env_kwargs)
    if is_box(vector.single_observation_space) or spec.entry_point is None:
        return vector
    vector.close()
    return _make(replace(spec, vector_entry_point=None), count, autoreset, passed)


def _parameters(entry_point: Any) -> set[str]:
    """Names of the arguments of an environment's constructor, a callable or `module:name`."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    return set(inspect.signature(creator).parameters)


@contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Drops the warnings of MuJoCo 4 about `settotalmass` in HalfCheetah's model, which also go to MUJOCO_LOG.TXT."""
    mujoco = sys.modules.get("mujoco")  # imported already if the environment uses it
    if mujoco is None:
        yield
        return

    def pass_on(message: str) -> None:
        if "settotalmass" not in message:
            warnings.warn(f"MuJoCo: {message}", stacklevel=2)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(pass_on)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _unsupported(observation_space: gym.Space, action_space: gym.Space) -> str:
    """Describes a space that is not supported, and what helps; empty if both are."""
    if fault := unsupported_observations(observation_space):
        return fault
    if not is_box(observation_space):
        return (
            f"{type(observation_space).__name__} observations and only a vector entry point: register an entry point"
        )
    fault = _unsupported_actions(action_space)
    return f"{fault}; {SUPPORTED}" if fault else ""


def _unsupported_actions(space: gym.Space) -> str:
    kind = type(space).__name__
    if isinstance(space, Discrete):
        return "" if space.start == 0 else f"Discrete actions from {space.start}"
    if not isinstance(space, Box | MultiDiscrete | MultiBinary):
        return f"{kind} actions"
    if len(space.shape) != 1:
        return f"{kind} actions of shape {space.shape}"
    if isinstance(space, MultiDiscrete) and space.start.any():
        return f"MultiDiscrete actions from {space.start.tolist()}"
    return "unbounded Box actions" if isinstance(space, Box) and not space.is_bounded() else ""


def to_environment(actions: Tensor, space: gym.Space) -> np.ndarray:
    """Converts actions (rows, ...) for an environment: integers, or floats clipped to the bounds of a Box."""
    array = actions.cpu().numpy()
    return np.clip(array, space.low, space.high).astype(space.dtype) if isinstance(space, Box) else array


class SB3Environments(VecEnv):
    """`Environments` as a VecEnv, with its arguments. The first reset() starts from `seed`, as after seed(seed)."""

    def __init__(self, id: str, count: int, seed: int = 0, training: bool = False, **env_kwargs: Any) -> None:
        # A VecEnv returns the first observation of the next episode at once, and the last one in the infos.
        self.environments = Environments(id, count, seed, training, AutoresetMode.SAME_STEP, **env_kwargs)
        super().__init__(count, self.environments.observation_space, self.environments.action_space)
        self.seed(seed)

    def reset(self) -> np.ndarray:
        self.environments.reset(self._seeds[0])
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
        """An attribute of the vector environment, such as `render_mode`, repeated for each environment."""
        return [getattr(self.environments.vector, attr_name) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("the attributes of these environments are fixed")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError("a vector environment has no single environments to call")


def training_environments(id: str, count: int, seed: int, **env_kwargs: Any) -> VecMonitor:
    """Environments for `learn`, with `training=True` and a log of the returns and lengths of their episodes."""
    return VecMonitor(SB3Environments(id, count, seed, training=True, **env_kwargs))
