"""Training from reward by the algorithm of a Stable-Baselines3 model: of a teacher, a control, a PPD student.

Training runs in segments, and a killed training ends as if never killed. At the start of each segment the model is
saved, every random generator is seeded anew and all environments restart, whether training was interrupted or not. So
the checkpoint of a segment's start is all that the rest depends on; environments, most of which cannot be saved, need
not be.
"""

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
from torch import nn
from tqdm.auto import tqdm

from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.training.run import Run
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json
from kd.common.utils.finite import check_finite_weights
from kd.reinforcement_learning.data.environments import folder_name, training_environments
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.teacher_model.agent import Agent
from kd.reinforcement_learning.teacher_model.policies import greedy
from kd.reinforcement_learning.teacher_model.recipes import ALGORITHMS, TrainingRecipe, check_steps
from kd.reinforcement_learning.teacher_model.statistics import ObservationStatistics

SEGMENTS = 10
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")
REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

History = list[dict[str, Any]]
Evaluate = Callable[[BaseAlgorithm], dict[str, float]]


# ---- a training in a run ----


def recipe_environments(
    environment: str,
    recipe: TrainingRecipe,
    seed: int,
    norm_obs: bool = True,
    fixed: ObservationStatistics | None = None,
) -> VecEnv:
    """The environments of a recipe, in VecNormalize if it normalizes; without `norm_obs` of rewards only.

    With `fixed` observations are normalized by these statistics, whatever the recipe.
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
        normalizer.epsilon, normalizer.clip_obs = fixed.epsilon, fixed.clip
    return normalizer


class _FixedMoments(RunningMeanStd):
    def __init__(self, statistics: ObservationStatistics) -> None:
        super().__init__(shape=statistics.mean.shape)
        self.mean, self.var = statistics.mean, statistics.var

    def update(self, arr: Any) -> None:
        """Keeps the moments."""


def new_teacher(environment: str, recipe: TrainingRecipe, seed: int) -> BaseAlgorithm:
    """An untrained teacher in its environments, with the default networks of its algorithm. Raises UserError for
    hyper-parameters that the algorithm refuses.
    """
    try:
        check_steps(recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    environments = recipe_environments(environment, recipe, seed)
    frames = is_image_space(environments.observation_space)
    algorithm: Any = ALGORITHMS[recipe.algorithm]
    device = "cpu" if recipe.algorithm == "ppo" and not frames else "auto"  # small networks are faster on the CPU
    policy = "CnnPolicy" if frames else "MlpPolicy"
    try:
        model: BaseAlgorithm = algorithm(policy, environments, seed=seed, device=device, **recipe.keywords)
    except Exception as error:  # of Stable-Baselines3 and torch, for values and keywords of any kind
        environments.close()
        raise UserError(f"{recipe.algorithm} refuses these hyper-parameters: {error}") from error
    return model


def train_from_reward(
    run: Run, stage: str, environment: str, model: BaseAlgorithm, steps: int, eval_episodes: int
) -> None:
    """Trains a model by its algorithm inside a stage of `run`, and adds its log to the history of the stage."""

    def evaluate(model: BaseAlgorithm) -> dict[str, float]:
        return mean_returns(run, {environment: Agent.trained(stage, model).network()}, eval_episodes)

    folder = run.folder / "checkpoints" / stage / folder_name(environment)
    log = train(model, steps, folder, run.args.seed, evaluate, description=f"{stage} {environment}")
    run.history[stage] = run.history.get(stage, []) + log


def mean_returns(run: Run, networks: dict[str, nn.Module], episodes: int) -> dict[str, float]:
    """Mean returns of greedy actions by environment, for the curves. Their time is not counted for the stage."""
    with run.timed("evaluation"):
        return {
            curve(environment): float(returns_of(greedy(network), environment, episodes, VALIDATION_SEED)[0].mean())
            for environment, network in networks.items()
        }


def curve(environment: str) -> str:
    """The name of an environment's mean return in the log of a stage."""
    return f"eval_return_mean {environment}"


# ---- segments ----


def train(
    model: BaseAlgorithm, steps: int, folder: Path, seed: int, evaluate: Evaluate, description: str = ""
) -> History:
    """Trains `model` for `steps` environment steps, from the last segment in `folder` on if there is one.

    Returns the log: at the end of each segment `evaluate(model)` and the `environment_steps` so far.
    """
    segments = Segments(steps, folder, seed, evaluate, description)
    checkpoint = newest_checkpoint(folder)
    done = 0 if checkpoint is None else segments.restore(model, checkpoint)
    try:
        model.learn(steps - done, callback=segments, reset_num_timesteps=False)
    except ValueError:  # of torch.distributions, for parameters that are not finite
        segments.check()
        raise
    finally:
        segments.bar.close()
    segments.log()
    return segments.history


class Segments(BaseCallback):
    """Saves and restarts at the beginning of each segment; keeps the log."""

    def __init__(self, steps: int, folder: Path, seed: int, evaluate: Evaluate, description: str) -> None:
        super().__init__()
        self.length, self.folder, self.seed, self.evaluate = max(1, -(-steps // SEGMENTS)), folder, seed, evaluate
        self.bar = tqdm(total=steps, desc=description, unit="step", unit_scale=True, leave=False)
        self.begun, self.history, self.arrays = -1, History(), dict[str, np.ndarray]()

    def _on_training_start(self) -> None:
        if self.arrays:
            _put_arrays(self.model, self.arrays)  # after the reset at the start of `learn`, which counts

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

    def check(self) -> None:
        check_finite_weights(self.model.policy, when=f"after {self.model.num_timesteps} environment steps")

    def log(self) -> None:
        self.check()
        self.history.append({"environment_steps": self.model.num_timesteps} | self.evaluate(self.model))

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
        """Restores the state of the last segment's start into `model`; the number of steps until then."""
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
        return int(state["counters"]["num_timesteps"])


def _running_means(model: BaseAlgorithm) -> dict[str, Any]:
    environment = model.get_vec_normalize_env()
    if environment is None:
        return {}
    return {"returns": environment.ret_rms} | ({"observations": environment.obs_rms} if environment.norm_obs else {})


def _replay(model: BaseAlgorithm) -> ReplayBuffer | None:
    return model.replay_buffer if isinstance(model, OffPolicyAlgorithm) else None


def _arrays(model: BaseAlgorithm) -> dict[str, np.ndarray]:
    """What a model's zip lacks: the running means of VecNormalize and the rows of the replay buffer."""
    arrays: dict[str, np.ndarray] = {}
    for name, means in _running_means(model).items():
        arrays |= {f"{name}_{part}": np.asarray(getattr(means, part)) for part in ("mean", "var", "count")}
    replay = _replay(model)
    if replay is not None:
        rows = replay.buffer_size if replay.full else replay.pos
        arrays |= {f"replay_{name}": getattr(replay, name)[:rows] for name in REPLAY}
        arrays["replay_place"] = np.array([replay.pos, replay.full])
    return arrays


def _put_arrays(model: BaseAlgorithm, arrays: dict[str, np.ndarray]) -> None:
    for name, means in _running_means(model).items():
        means.mean, means.var = arrays[f"{name}_mean"], arrays[f"{name}_var"]
        means.count = float(arrays[f"{name}_count"])
    replay = _replay(model)
    if replay is not None:
        for name in REPLAY:
            rows = arrays[f"replay_{name}"]
            getattr(replay, name)[: len(rows)] = rows
        replay.pos, replay.full = int(arrays["replay_place"][0]), bool(arrays["replay_place"][1])
