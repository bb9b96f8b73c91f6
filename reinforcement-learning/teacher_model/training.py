"""Trains a Stable-Baselines3 model from reward by its algorithm: a teacher, a control or a PPD student.

Training runs in segments, so that an interrupted training gives the same result as an uninterrupted one. In both, each
segment starts with a checkpoint of the model, new seeds for all random generators and a reset of all environments,
because the state of most environments cannot be saved. The rest of the training depends only on that checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import load_from_zip_file, recursive_setattr
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm.auto import tqdm

from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.training.trackers import Trackers, tracked
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json
from kd.common.utils.finite import check_finite_weights
from kd.reinforcement_learning.data.environments import training_environments
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics
from kd.reinforcement_learning.teacher_model.recipes import TrainingRecipe, algorithm_class, check_steps

SEGMENTS = 10
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")
REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

History = list[dict[str, Any]]
Evaluate = Callable[[BaseAlgorithm], dict[str, float]]


# ---- environments and models ----


def recipe_environments(
    environment: str,
    recipe: TrainingRecipe,
    seed: int,
    norm_obs: bool = True,
    fixed: ObservationStatistics | None = None,
) -> VecEnv:
    """The environments of a recipe, with VecNormalize if the recipe normalizes; `norm_obs=False` normalizes only
    rewards. With `fixed`, observations are normalized by these statistics, which do not change.
    """
    environments: VecEnv = training_environments(environment, recipe.environments, seed)
    if not recipe.normalize and fixed is None:
        return environments
    gamma = recipe.keywords.get("gamma", 0.99)
    normalizer = VecNormalize(
        environments, norm_obs=norm_obs or fixed is not None, norm_reward=recipe.normalize, gamma=gamma
    )
    if fixed is not None:
        normalizer.obs_rms = _FixedMoments(fixed)  # type: ignore[assignment]
        normalizer.epsilon = fixed.epsilon
        normalizer.clip_obs = fixed.clip  # type: ignore[assignment]  # numpy clips by arrays, too
    return normalizer


class _FixedMoments(RunningMeanStd):
    def __init__(self, statistics: ObservationStatistics) -> None:
        super().__init__(shape=statistics.mean.shape)
        self.mean, self.var = statistics.mean, statistics.var

    def update(self, arr: Any) -> None:
        """Does nothing: the moments are fixed."""


def new_teacher(environment: str, recipe: TrainingRecipe, seed: int) -> BaseAlgorithm:
    """An untrained teacher in its environments, with the default networks of its algorithm. Raises UserError for
    invalid hyper-parameters.
    """
    check_steps(recipe)
    environments = recipe_environments(environment, recipe, seed)
    frames = is_image_space(environments.observation_space)
    algorithm: Any = algorithm_class(recipe.algorithm)
    # Small networks are faster on the CPU.
    device = "cpu" if recipe.algorithm == "ppo" and not frames else "auto"
    policy = "CnnPolicy" if frames else "MlpPolicy"
    try:
        model: BaseAlgorithm = algorithm(policy, environments, seed=seed, device=device, **recipe.keywords)
    except Exception as error:  # Stable-Baselines3 and torch raise any exception
        environments.close()
        raise UserError(f"invalid hyper-parameters of {recipe.algorithm}: {error}") from error
    return model


# ---- segments ----


def train(
    model: BaseAlgorithm,
    steps: int,
    folder: Path,
    seed: int,
    evaluate: Evaluate,
    description: str = "",
    trackers: Trackers | None = None,
) -> History:
    """Trains `model` for `steps` environment steps, and continues from the last checkpoint in `folder`, if any.
    Returns the log: `environment_steps`, `cpu_seconds` of the training alone, and `evaluate(model)` at the end of each
    segment. `trackers` get it too.
    """
    segments = Segments(steps, folder, seed, evaluate, description, trackers)
    checkpoint = newest_checkpoint(folder)
    done = 0 if checkpoint is None else segments.restore(model, checkpoint)
    try:
        model.learn(steps - done, callback=segments, reset_num_timesteps=False)
    except ValueError:  # torch.distributions raises it for parameters that are not finite
        segments.check()
        raise
    finally:
        segments.bar.close()
    segments.log()
    return segments.history


class Segments(BaseCallback):
    """Writes a checkpoint and resets seeds and environments at the beginning of each segment; records the log."""

    def __init__(
        self,
        steps: int,
        folder: Path,
        seed: int,
        evaluate: Evaluate,
        description: str = "",
        trackers: Trackers | None = None,
    ) -> None:
        super().__init__()
        self.trackers = trackers or Trackers()
        self.length, self.folder, self.seed, self.evaluate = max(1, -(-steps // SEGMENTS)), folder, seed, evaluate
        self.bar = tqdm(total=steps, desc=description, unit="step", unit_scale=True, leave=False)
        self.begun, self.history, self.arrays = -1, History(), dict[str, np.ndarray]()
        self.cpu_seconds = 0.0

    def _on_training_start(self) -> None:
        if self.arrays:
            _restore_arrays(self.model, self.arrays)  # the reset at the start of `learn` has changed them
        self.started = time.process_time()

    def _on_step(self) -> bool:
        self.bar.update(self.model.num_timesteps - self.bar.n)
        return True

    def _on_rollout_start(self) -> None:
        segment = self.model.num_timesteps // self.length
        if segment == self.begun:
            return
        if self.begun >= 0:
            self.log()
            save_checkpoint(self.folder, self.model.num_timesteps, self.write)
        self.begun = segment
        self.restart(self.seed + 1000 * segment)
        self.started = time.process_time()

    def check(self) -> None:
        check_finite_weights(self.model.policy, when=f"after {self.model.num_timesteps} environment steps")

    def log(self) -> None:
        self.cpu_seconds += time.process_time() - self.started
        self.check()
        measured = self.evaluate(self.model)
        work = {"environment_steps": self.model.num_timesteps, "cpu_seconds": self.cpu_seconds}
        self.history.append(work | measured)
        self.trackers.log(tracked(measured), self.model.num_timesteps)

    def restart(self, seed: int) -> None:
        model, environment = self.model, self.training_env
        set_random_seed(seed)
        model.action_space.seed(seed)
        environment.seed(seed)
        model._last_obs = environment.reset()  # type: ignore[assignment]
        model._last_episode_starts = np.ones(environment.num_envs, dtype=bool)
        if isinstance(environment, VecNormalize):
            model._last_original_obs = environment.get_original_obs()

    def write(self, folder: Path) -> None:
        self.model.save(folder / "model.zip")
        counters = {name: getattr(self.model, name) for name in COUNTERS if hasattr(self.model, name)}
        np.savez(folder / "arrays.npz", **_arrays(self.model))  # type: ignore[arg-type]
        write_json(folder / "state.json", {"counters": counters, "history": self.history})

    def restore(self, model: BaseAlgorithm, folder: Path) -> int:
        """Restores a checkpoint into `model`; returns its number of environment steps."""
        state = read_json(folder / "state.json")
        _, parameters, variables = load_from_zip_file(folder / "model.zip", device=model.device, load_data=False)
        model.set_parameters(parameters, exact_match=True, device=model.device)
        for name, value in (variables or {}).items():
            recursive_setattr(model, f"{name}.data", value.data)
        for name, value in state["counters"].items():
            setattr(model, name, value)
        with np.load(folder / "arrays.npz") as arrays:
            self.arrays = dict(arrays)
        self.history = state["history"]
        self.cpu_seconds = self.history[-1]["cpu_seconds"]
        return int(state["counters"]["num_timesteps"])


def _running_means(model: BaseAlgorithm) -> dict[str, Any]:
    environment = model.get_vec_normalize_env()
    if environment is None:
        return {}
    return {"returns": environment.ret_rms} | ({"observations": environment.obs_rms} if environment.norm_obs else {})


def _replay(model: BaseAlgorithm) -> ReplayBuffer | None:
    return model.replay_buffer if isinstance(model, OffPolicyAlgorithm) else None


def _arrays(model: BaseAlgorithm) -> dict[str, np.ndarray]:
    """The state that the zip of a model does not contain: running means of VecNormalize and the replay buffer."""
    arrays: dict[str, np.ndarray] = {}
    for name, means in _running_means(model).items():
        arrays |= {f"{name}_{part}": np.asarray(getattr(means, part)) for part in ("mean", "var", "count")}
    replay = _replay(model)
    if replay is not None:
        rows = replay.buffer_size if replay.full else replay.pos
        arrays |= {f"replay_{name}": getattr(replay, name)[:rows] for name in REPLAY}
        arrays["replay_place"] = np.array([replay.pos, replay.full])
    return arrays


def _restore_arrays(model: BaseAlgorithm, arrays: dict[str, np.ndarray]) -> None:
    for name, means in _running_means(model).items():
        means.mean, means.var = arrays[f"{name}_mean"], arrays[f"{name}_var"]
        means.count = float(arrays[f"{name}_count"])
    replay = _replay(model)
    if replay is not None:
        for name in REPLAY:
            rows = arrays[f"replay_{name}"]
            getattr(replay, name)[: len(rows)] = rows
        replay.pos, replay.full = int(arrays["replay_place"][0]), bool(arrays["replay_place"][1])
