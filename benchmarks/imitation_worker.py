"""Distills students with `imitation` for policy_distillation.py, which runs this script in a separate environment.

    python imitation_worker.py --teacher WEIGHTS.npz --environment CartPole-v1

`WEIGHTS.npz` is the state dict of a policy of Stable-Baselines3, PPO or SAC, with two hidden layers. The script first
prints a line of JSON with the teacher's return and the installed versions. For each request on stdin,
`{"method": "dagger" or "bc", "seed": 0, "goal": 475, "arguments": null or {"steps": 2000, "updates": 200, ...}}`,
it prints the CPU time until a student's mean greedy return reaches the goal. `null` selects imitation's defaults.
DAgger is evaluated after each round. BC trains on whole episodes of the teacher, 2,000 steps or more, and is evaluated
after each epoch.
"""

import argparse
import contextlib
import importlib.metadata
import json
import re
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
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac.policies import SACPolicy

ENVIRONMENTS, EVALUATION_SEED = 8, 20_000_000
MAX_ROUNDS = {"dagger": 10, "bc": 40}  # BC: epochs


class Reached(Exception):
    """The student reached the goal."""


class Clock:
    """CPU time until a student reaches `goal`, without the time of evaluations."""

    def __init__(self, environments: VecEnv, goal: float) -> None:
        self.environments, self.goal, self.seconds, self.best = environments, goal, 0.0, 0.0
        self.episodes = environments.num_envs
        self.since = time.process_time()

    def check(self, policy: ActorCriticPolicy) -> None:
        self.seconds += time.process_time() - self.since
        self.best = float(evaluate_policy(policy, self.environments, self.episodes, deterministic=True, warn=False)[0])
        if self.best >= self.goal:
            raise Reached
        self.since = time.process_time()


def new_policy(
    environments: VecEnv, policy: list[int], value: list[int], activation: type[torch.nn.Module] = torch.nn.Tanh
) -> ActorCriticPolicy:
    spaces, widths = (environments.observation_space, environments.action_space), {"pi": policy, "vf": value}
    return ActorCriticPolicy(*spaces, lr_schedule=lambda _: 0.0, net_arch=widths, activation_fn=activation)


def load_teacher(path: str, activation: str, environments: VecEnv) -> BasePolicy:
    weights = {name: torch.as_tensor(array) for name, array in np.load(path).items()}
    actor = {name.removeprefix("actor."): weight for name, weight in weights.items() if name.startswith("actor.")}
    parts = ("latent_pi",) if actor else ("mlp_extractor.policy_net", "mlp_extractor.value_net")
    widths: list[list[int]] = [
        [len(weight) for name, weight in (actor or weights).items() if re.match(rf"{part}\.\d+\.weight", name)]
        for part in parts
    ]
    if not actor:
        policy = new_policy(environments, *widths, getattr(torch.nn, activation))
        policy.load_state_dict(weights)
        return policy
    spaces = environments.observation_space, environments.action_space
    gaussian = SACPolicy(*spaces, lr_schedule=lambda _: 0.0, net_arch={"pi": widths[0], "qf": [1]})
    gaussian.actor.load_state_dict(actor)
    return gaussian


class Distillation:
    """Distills one student. `observations` is the number of observations that the teacher has labelled."""

    def __init__(
        self, name: str, teacher: BasePolicy, widths: list[int], seed: int, arguments: dict[str, Any] | None
    ) -> None:
        torch.manual_seed(seed)
        self.teacher, self.rng, self.arguments, self.observations = teacher, np.random.default_rng(seed), arguments, 0
        self.environments = make_vec_env(name, ENVIRONMENTS, seed=seed)
        self.student = new_policy(self.environments, widths, widths)

    def trainer(self, folder: str) -> tuple[BC, HierarchicalLogger]:
        logger, kwargs = configure(folder, []), {}
        if self.arguments:
            kwargs = {"batch_size": self.arguments["batch_size"]}
            kwargs["optimizer_kwargs"] = {"lr": self.arguments["learning_rate"]}
        spaces = {"observation_space": self.student.observation_space, "action_space": self.student.action_space}
        return BC(**spaces, rng=self.rng, policy=self.student, device="cpu", custom_logger=logger, **kwargs), logger

    def dagger(self, clock: Clock, folder: str) -> None:
        bc_trainer, logger = self.trainer(folder)
        kwargs: dict[str, Any] = {"beta_schedule": lambda number: float(number == 0)} if self.arguments else {}
        trainer = SimpleDAggerTrainer(
            venv=self.environments, scratch_dir=folder, expert_policy=self.teacher, rng=self.rng,
            bc_trainer=bc_trainer, custom_logger=logger, **kwargs,
        )  # fmt: skip
        training: dict[str, Any] = {"log_rollouts_venv": None, "progress_bar": False}
        rollout = {}
        if self.arguments:
            training["n_batches"] = self.arguments["updates"]
            rollout = {"rollout_round_min_episodes": 1, "rollout_round_min_timesteps": self.arguments["steps"]}
        for _ in range(MAX_ROUNDS["dagger"]):
            trainer.train(1, bc_train_kwargs=training, **rollout)  # one round
            self.observations = sum(map(len, trainer._all_demos))
            clock.check(self.student)

    def bc(self, clock: Clock, folder: str) -> None:
        until = make_sample_until(min_timesteps=self.arguments["steps"] if self.arguments else 2000)
        episodes = generate_trajectories(self.teacher, self.environments, until, self.rng, deterministic_policy=True)
        self.observations = sum(map(len, episodes))
        trainer, _ = self.trainer(folder)
        trainer.set_demonstrations(episodes)
        trainer.train(n_epochs=MAX_ROUNDS["bc"], progress_bar=False, on_epoch_end=lambda: clock.check(self.student))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="npz file with the state dict of the teacher.")
    parser.add_argument("--environment", default="CartPole-v1", help="Gymnasium environment.")
    parser.add_argument("--activation", default="Tanh", help="Activation of the teacher, if it is a PPO.")
    parser.add_argument("--student", type=int, nargs="+", default=[16, 16], help="Hidden widths of the student.")
    parser.add_argument("--episodes", type=int, default=20, help="Number of episodes of an evaluation.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    responses = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        evaluation = make_vec_env(args.environment, args.episodes, seed=EVALUATION_SEED)
        teacher = load_teacher(args.teacher, args.activation, evaluation)
        mean_return = float(evaluate_policy(teacher, evaluation, args.episodes, deterministic=True, warn=False)[0])
        packages = ("imitation", "stable-baselines3", "gymnasium", "torch", "numpy")
        versions = {name: importlib.metadata.version(name) for name in packages}
        print(json.dumps({"teacher": mean_return, "versions": versions}), file=responses, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            clock = Clock(evaluation, request["goal"])
            distillation = Distillation(args.environment, teacher, args.student, request["seed"], request["arguments"])
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
                getattr(distillation, request["method"])(clock, folder)
            response = {"seconds": clock.seconds, "return": clock.best, "observations": distillation.observations}
            print(json.dumps(response), file=responses, flush=True)


if __name__ == "__main__":
    main()
