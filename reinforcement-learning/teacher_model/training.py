"""Trains a Stable-Baselines3 model from reward, in segments: a killed training goes on and ends as if never killed.

At the start of each segment the model is saved, every source of randomness is seeded anew and all environments are
restarted, in training that was interrupted and in training that was not. So the file of a segment's start is all that
the rest depends on; environments themselves need not be saved, which most cannot be.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, recursive_setattr
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from tqdm.auto import tqdm

from kd.common.utils.files import read_json, write_json
from kd.common.utils.finite import check_finite_weights
from kd.reinforcement_learning.teacher_model.checkpoints import Checkpoints

SEGMENTS = 10
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate")
REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

History = list[dict[str, Any]]
Watch = Callable[[BaseAlgorithm], dict[str, float]]


def train(model: BaseAlgorithm, steps: int, folder: Path, seed: int, watch: Watch, description: str = "") -> History:
    """Trains `model` for `steps` environment steps, from the last segment in `folder` on if there is one.

    Returns the log: at the end of each segment what `watch(model)` tells, with the `environment_steps` so far.
    """
    segments = Segments(steps, folder, seed, watch, description)
    checkpoint = segments.checkpoints.newest()
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

    def __init__(self, steps: int, folder: Path, seed: int, watch: Watch, description: str) -> None:
        super().__init__()
        self.length, self.seed, self.watch = max(1, -(-steps // SEGMENTS)), seed, watch
        self.checkpoints = Checkpoints(folder)
        self.bar = tqdm(total=steps, desc=description, unit="step", unit_scale=True, leave=False)
        self.begun, self.history, self.arrays = -1, History(), dict[str, np.ndarray]()

    def _on_training_start(self) -> None:
        if self.arrays:
            _put_arrays(self.model, self.arrays)  # only now, since `learn` has begun with a reset, which counts

    def _on_step(self) -> bool:
        self.bar.update(self.model.num_timesteps - self.bar.n)
        return True

    def _on_rollout_start(self) -> None:
        segment = self.model.num_timesteps // self.length
        if segment == self.begun:
            return
        if self.begun >= 0:
            self.log()
            self.checkpoints.save(self.model.num_timesteps, self.write)
        self.begun = segment
        self.restart(self.seed + 1000 * segment)

    def check(self) -> None:
        check_finite_weights(self.model.policy, when=f"after {self.model.num_timesteps} environment steps")

    def log(self) -> None:
        self.check()
        self.history.append({"environment_steps": self.model.num_timesteps} | self.watch(self.model))

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
        arrays = _arrays(self.model)
        np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
        write_json(folder / "state.json", {"counters": counters, "history": self.history})

    def restore(self, model: BaseAlgorithm, folder: Path) -> int:
        """Puts the state of the last segment's start into `model`; the number of steps until then."""
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
    """What a model's zip lacks: VecNormalize's running means and the replay buffer's rows."""
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
