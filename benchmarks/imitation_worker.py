"""Students distilled by `imitation` for policy_distillation.py, which starts this in an environment of its own.

    python imitation_worker.py --teacher WEIGHTS.npz --environment CartPole-v1

`WEIGHTS.npz` is the state dict of an ActorCriticPolicy of Stable-Baselines3. Prints first, as a line of JSON, what the
teacher reaches here and what is installed; then answers each line on stdin,
`{"method": "dagger" or "bc", "seed": 0, "goal": 475, "settings": null or {"steps": 2000, "updates": 200, ...}}`,
with the processor time until a student's mean greedy return was at least the goal. No settings: imitation's defaults.
DAgger is judged after each round, BC, on whole episodes of the teacher of 2,000 steps or more, after each pass.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import torch
from imitation.algorithms.bc import BC
from imitation.algorithms.dagger import SimpleDAggerTrainer
from imitation.data.rollout import generate_trajectories, make_sample_until
from imitation.util.logger import HierarchicalLogger, configure
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

ENVIRONMENTS, EPISODES, EVALUATION_SEED = 8, 20, 20_000_000
MOST_ROUNDS = {"dagger": 20, "bc": 40}  # of BC: passes over the teacher's episodes


class Reached(Exception):
    """A student is good enough."""


class Clock:
    """Processor time until a student reaches `goal`; judging it is not counted."""

    def __init__(self, environments: VecEnv, goal: float) -> None:
        self.environments, self.goal, self.seconds, self.best = environments, goal, 0.0, 0.0
        self.since = time.process_time()

    def check(self, policy: ActorCriticPolicy) -> None:
        self.seconds += time.process_time() - self.since
        self.best = float(evaluate_policy(policy, self.environments, EPISODES, deterministic=True, warn=False)[0])
        if self.best >= self.goal:
            raise Reached
        self.since = time.process_time()


def new_policy(environments: VecEnv, policy: list[int], value: list[int]) -> ActorCriticPolicy:
    spaces = environments.observation_space, environments.action_space
    return ActorCriticPolicy(*spaces, lr_schedule=lambda _: 0.0, net_arch={"pi": policy, "vf": value})


def load_teacher(path: str, environments: VecEnv) -> ActorCriticPolicy:
    weights = {name: torch.as_tensor(array) for name, array in np.load(path).items()}
    widths: list[list[int]] = [
        [len(weight) for name, weight in weights.items() if name.startswith(part) and name.endswith(".weight")]
        for part in ("mlp_extractor.policy_net", "mlp_extractor.value_net")
    ]
    policy = new_policy(environments, *widths)
    policy.load_state_dict(weights)
    return policy


class Distillation:
    """One student of one teacher. `observations` are those that the teacher has labelled."""

    def __init__(self, name: str, teacher: ActorCriticPolicy, seed: int, settings: dict[str, Any] | None) -> None:
        torch.manual_seed(seed)
        self.teacher, self.rng, self.settings, self.observations = teacher, np.random.default_rng(seed), settings, 0
        self.environments = make_vec_env(name, ENVIRONMENTS, seed=seed)
        self.student = new_policy(self.environments, [16, 16], [16, 16])

    def trainer(self, folder: str) -> tuple[BC, HierarchicalLogger]:
        logger, own = configure(folder, []), {}
        if self.settings:
            own = {"batch_size": self.settings["batch_size"]}
            own["optimizer_kwargs"] = {"lr": self.settings["learning_rate"]}
        spaces = {"observation_space": self.student.observation_space, "action_space": self.student.action_space}
        return BC(**spaces, rng=self.rng, policy=self.student, device="cpu", custom_logger=logger, **own), logger

    def dagger(self, clock: Clock, folder: str) -> None:
        bc_trainer, logger = self.trainer(folder)
        own: dict[str, Any] = {"beta_schedule": lambda number: float(number == 0)} if self.settings else {}
        trainer = SimpleDAggerTrainer(
            venv=self.environments, scratch_dir=folder, expert_policy=self.teacher, rng=self.rng,
            bc_trainer=bc_trainer, custom_logger=logger, **own,
        )  # fmt: skip
        training: dict[str, Any] = {"log_rollouts_venv": None, "progress_bar": False}
        rollout = {}
        if self.settings:
            training["n_batches"] = self.settings["updates"]
            rollout = {"rollout_round_min_episodes": 1, "rollout_round_min_timesteps": self.settings["steps"]}
        for _ in range(MOST_ROUNDS["dagger"]):
            trainer.train(1, bc_train_kwargs=training, **rollout)  # one round
            self.observations = sum(map(len, trainer._all_demos))
            clock.check(self.student)

    def bc(self, clock: Clock, folder: str) -> None:
        until = make_sample_until(min_timesteps=self.settings["steps"] if self.settings else 2000)
        episodes = generate_trajectories(self.teacher, self.environments, until, self.rng)
        self.observations = sum(map(len, episodes))
        trainer, _ = self.trainer(folder)
        trainer.set_demonstrations(episodes)
        trainer.train(n_epochs=MOST_ROUNDS["bc"], progress_bar=False, on_epoch_end=lambda: clock.check(self.student))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--environment", default="CartPole-v1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        judging = make_vec_env(args.environment, EPISODES, seed=EVALUATION_SEED)
        teacher = load_teacher(args.teacher, judging)
        reached = float(evaluate_policy(teacher, judging, EPISODES, deterministic=True, warn=False)[0])
        packages = ("imitation", "stable-baselines3", "gymnasium", "torch", "numpy")
        versions = {name: importlib.metadata.version(name) for name in packages}
        print(json.dumps({"teacher": reached, "versions": versions}), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            clock = Clock(judging, order["goal"])
            work = Distillation(args.environment, teacher, order["seed"], order["settings"])
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
                getattr(work, order["method"])(clock, folder)
            answer = {"seconds": clock.seconds, "return": clock.best, "observations": work.observations}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
