"""Several copies of one Gymnasium environment, made the fast way, that restart by themselves.

What an agent may learn from is the same whatever the vector environment underneath: rows where `acting` is True.
"""

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from kd.common.utils.errors import UserError

EPISODE_STEPS = 10_000  # maximum length of an episode, for environments without a time limit
# Modules that register their environments when they are imported, by what the ids of these start with.
MODULES = {"ALE/": "ale_py", "KnownAnswer": f"{__package__}.known_answer"}
SUPPORTED = (
    "supported are Box observations, of frames with their channels first, and Discrete (from 0) or bounded "
    "one-dimensional Box actions"
)


@dataclass
class Step:
    rewards: np.ndarray  # (count,) float, 0 where the environment only restarted
    terminated: np.ndarray  # (count,) bool
    truncated: np.ndarray  # (count,) bool
    # (count, ...): what the actions led to; differs from the next observations where SAME_STEP has restarted already.
    final_observations: np.ndarray


class Environments:
    """`count` copies of one Gymnasium environment, stepped side by side and restarted by themselves.

    Environment i gets the seed `seed + i`, except where all share one generator (the vector entry point of CartPole).
    Actions out of a Box's bounds are the caller's to clip.

    Atari ids (ALE/...) come as four 84x84 grey frames, with sticky actions as their id says. `training` clips their
    rewards to -1, 0, 1 and makes a lost life the end of an episode. The whole game then restarts, unlike in SB3's
    AtariWrapper: training never gets past a first life, so only training=False gives a game's score.
    Other environments ignore `training`.

    Episodes of an environment that was registered without a time limit are truncated after EPISODE_STEPS.
    """

    def __init__(
        self,
        id: str,
        count: int,
        seed: int = 0,
        training: bool = False,
        autoreset: AutoresetMode | None = None,
        **env_kwargs: Any,
    ) -> None:
        if count < 1:
            raise UserError(f"the number of environments must be 1 or more, not {count}")
        self.id, self.count = id, count
        self.autoreset = autoreset or AutoresetMode.NEXT_STEP  # the default of all vector environments of Gymnasium
        spec = find_spec(id)
        if spec.namespace == "ALE":
            env_kwargs = _atari_kwargs(training, env_kwargs)
        try:
            self.vector = _make(spec, count, self.autoreset, env_kwargs)
        except Exception as error:  # foreign code: whatever it raises is about the id, the arguments or a package
            raise _unusable(id, error) from error
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        if fault := _unsupported(self.observation_space, self.action_space):
            self.close()
            raise UserError(f"environment {id} has {fault}; {SUPPORTED}")
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Starts all anew; without a seed, their random generators go on where they are."""
        self.observations: np.ndarray = self.vector.reset(seed=seed)[0]  # (count, ...), on which the next actions act
        self.acting = np.ones(self.count, dtype=bool)  # False where the next step only restarts, ignoring the action

    def step(self, actions: np.ndarray) -> Step:
        """Acts in all environments, (count,) or (count, actions), and updates `observations` and `acting`."""
        actions = np.asarray(actions, dtype=self.vector.action_space.dtype)
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
        return Step(np.asarray(rewards, dtype=np.float64), terminated, truncated, final)

    def close(self) -> None:
        self.vector.close()


def time_limit(spec: EnvSpec) -> dict[str, Any]:
    """The argument that limits the episodes of an environment that does not end them by itself after some time."""
    limited = spec.max_episode_steps is not None or "max_episode_steps" in spec.kwargs or spec.namespace == "ALE"
    return {} if limited else {"max_episode_steps": EPISODE_STEPS}


def time_limit_warning(id: str) -> str | None:
    if not time_limit(find_spec(id)):
        return None
    return (
        f"environment {id} has no time limit: its episodes are cut after {EPISODE_STEPS:,} steps; register it with "
        "max_episode_steps for another limit"
    )


def registering(id: str) -> str:
    """The line of code that makes Gymnasium know an id which it does not know by itself, or nothing."""
    module = _registers(id)
    return f"import {module}  # registers the environment\n" if module else ""


def _registers(id: str) -> str:
    return next((module for start, module in MODULES.items() if id.startswith(start)), "")


def find_spec(id: str) -> EnvSpec:
    """The registered environment; `module:id` imports the module first, as in gym.make."""
    module, _, name = id.rpartition(":")
    module = module or _registers(name)
    try:
        if module:
            import_module(module)
    except ImportError as error:
        raise _unusable(id, error) from error
    if name not in gym.registry:
        raise UserError(f"unknown environment {id}{_nearest(name)}")
    return gym.registry[name]


def _atari_kwargs(training: bool, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    if env_kwargs.get("life_loss_info"):  # the step after would act; ale_py's SAME_STEP leaves final_obs undefined
        raise UserError("life_loss_info ends episodes without a restart; use episodic_life=True, which restarts")
    return {"num_threads": 1, "reward_clipping": training, "episodic_life": training} | env_kwargs


def _make(spec: EnvSpec, count: int, autoreset: AutoresetMode, env_kwargs: dict[str, Any]) -> VectorEnv:
    """From the environment's own vector entry point, unless there is none or it does not know the autoreset mode."""
    env_kwargs = time_limit(spec) | env_kwargs
    own = spec.vector_entry_point
    if own is not None and "max_episode_steps" in env_kwargs and "max_episode_steps" not in _parameters(own):
        own = None
    vector_kwargs: dict[str, Any] = {}
    if own is not None and "autoreset_mode" in _parameters(own):
        env_kwargs = env_kwargs | {"autoreset_mode": autoreset}
    elif own is None or autoreset != AutoresetMode.NEXT_STEP:
        own, vector_kwargs = None, {"autoreset_mode": autoreset}
    if "render_mode" in _parameters(own or spec.entry_point):
        env_kwargs = {"render_mode": None} | env_kwargs  # being ready to draw halves the speed of LunarLander
    with _quiet_mujoco():
        mode = "vector_entry_point" if own is not None else "sync"
        # The spec, not the id: an id makes Gymnasium warn about each version that is not the newest.
        return gym.make_vec(spec, count, mode, vector_kwargs, **env_kwargs)


def _parameters(entry_point: Any) -> set[str]:
    """Names of the arguments of an environment's constructor, given as it is or as `module:name`."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    return set(inspect.signature(creator).parameters)


@contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """MuJoCo 4 complains about `settotalmass` in HalfCheetah's model, per copy and in ./MUJOCO_LOG.TXT: not here."""
    mujoco = sys.modules.get("mujoco")  # loaded by now, if the environment uses it
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
    """What is wrong with the spaces, or nothing."""
    if not isinstance(observation_space, Box):
        return f"{type(observation_space).__name__} observations"
    if is_image_space(observation_space) and not is_image_space_channels_first(observation_space):
        return f"frames of shape {observation_space.shape}, whose channels come last"
    if isinstance(action_space, Discrete):
        return "" if action_space.start == 0 else f"Discrete actions from {action_space.start}"
    if not isinstance(action_space, Box):
        return f"{type(action_space).__name__} actions"
    if len(action_space.shape) != 1:
        return f"Box actions of shape {action_space.shape}"
    return "" if action_space.is_bounded() else "unbounded Box actions"


def _unusable(id: str, error: Exception) -> UserError:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"; try pip install {error.name.split('.')[0]}"
    elif isinstance(error, ImportError):  # Hopper-v3 and the like are registered only to say that they have moved
        hint = _nearest(id)
    elif isinstance(error, OSError) and id.startswith("ALE/"):
        hint = "; the ROM files are part of pip install ale_py"
    reason = f"{error or type(error).__name__}{hint}"
    return UserError(" ".join(f"environment {id} cannot be made: {reason}".split()))


def _nearest(name: str) -> str:
    """`; did you mean ...?` with the most similar id, of equally similar ones the highest version."""
    matches = get_close_matches(name, [other for other in gym.registry if other != name], n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
