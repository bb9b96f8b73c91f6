"""Compares distilling a CartPole-v1 policy with this project, `imitation` (BC and DAgger) and Stable-Baselines3.

    python benchmarks/policy_distillation.py --imitation_python imitation-venv/bin/python --json figures.json

First table: CPU time until a 16-16 student's mean greedy return over 20 episodes reaches 475. It includes creating
environments and student, collecting and fitting, but not the evaluation after each round (BC: after each epoch).
Second table: collected steps per CPU-second, with the teacher's outputs. All implementations use the same
teacher and one thread, take turns within one run, and are warmed up. `imitation` needs older packages, so
imitation_worker.py runs it in a separate environment; without --imitation_python its rows are left out.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from kd.common.cli import Parser, run
from kd.common.reporting.tables import number, print_rich
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, training_environments
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, Observations, Recorder, returns_of
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, greedy, sampling
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd.reinforcement_learning.teacher_model.teacher import load_agent
from kd.reinforcement_learning.teacher_model.training import new_teacher

CARTPOLE, LANDER = "CartPole-v1", "LunarLander-v3"
TEACHER = "runs/reinforcement-learning/teacher_CartPole-v1_ppo"  # the default folder of train_teacher.py
EPISODES = 20
RECIPES = {id: training_recipe("ppo", id) for id in (CARTPOLE, LANDER)}
INSTALL_IMITATION = (
    "install imitation with `python3.11 -m venv imitation-venv && imitation-venv/bin/pip install -r "
    "benchmarks/imitation_requirements.txt`, then --imitation_python imitation-venv/bin/python"
)

Figures = dict[str, Any]
Distill = Callable[..., Figures]  # (seed, goal) -> seconds, return, observations
Collect = Callable[..., float]  # (repetition, steps) -> steps per second


def untrained_student(id: str, seed: int) -> ActorCriticPolicy:
    recipe = RECIPES[id]
    environments = training_environments(id, recipe.environments, seed)
    policy = new_student(environments, StudentArguments(), recipe, seed).policy
    environments.close()
    return policy


class Reached(Exception):
    """The student reached the goal."""


class ThisProject:
    """The Distiller with default arguments except for the number of environments."""

    def __init__(self, teacher: ActorCriticPolicy, num_envs: int) -> None:
        self.teacher, self.args = PolicyNetwork(teacher).eval(), DistillArguments(num_envs=num_envs)

    def __call__(self, seed: int, goal: float) -> Figures:
        figures, since = {"seconds": 0.0, "return": 0.0, "observations": 0}, time.process_time()
        self.student = untrained_student(CARTPOLE, seed)
        network = StudentNetwork(self.student, None)
        environments = Environments(CARTPOLE, self.args.num_envs, seed)
        rows = self.args.steps + self.args.num_envs * self.args.rounds
        buffer = Observations(rows, environments.observation_space.shape or (), torch.float32)

        def evaluate() -> dict[str, float]:
            nonlocal since
            figures["seconds"] += time.process_time() - since
            returns, _ = returns_of(greedy(network), CARTPOLE, EPISODES, VALIDATION_SEED)
            figures.update({"return": float(returns.mean()), "observations": buffer.seen})
            if figures["return"] >= goal:
                raise Reached
            since = time.process_time()
            return {}

        task = DistillationTask(Recorder(environments), self.teacher, network, buffer)
        with tempfile.TemporaryDirectory() as folder, suppress(Reached):
            Distiller([task], self.args, Path(folder), seed).learn(evaluate)
        environments.close()
        return figures


class Imitation:
    """Runs imitation_worker.py with another interpreter and the weights of this teacher."""

    def __init__(self, python: str, teacher: ActorCriticPolicy) -> None:
        arrays: dict[str, Any] = {name: weight.numpy() for name, weight in teacher.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder, "teacher.npz"), **arrays)
            command = [python, str(Path(__file__).with_name("imitation_worker.py")), "--environment", CARTPOLE]
            self.process = subprocess.Popen(
                [*command, "--teacher", str(Path(folder, "teacher.npz"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
            )  # fmt: skip
            self.about = self._read()  # it has loaded the teacher

    def __call__(self, seed: int, goal: float, method: str, arguments: Figures | None) -> Figures:
        assert self.process.stdin is not None
        request = {"seed": seed, "goal": goal, "method": method, "arguments": arguments}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> Figures:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError("imitation_worker.py has stopped: see above")
        response: Figures = json.loads(line)
        return response

    def close(self) -> None:
        self.process.communicate()  # closes its stdin


def kd_collection(id: str, count: int, teacher: BasePolicy, student: BasePolicy) -> Collect:
    """Collects with this project, which stores the teacher's logits and values."""
    networks = PolicyNetwork(teacher).eval(), PolicyNetwork(student).eval()
    environments = Environments(id, count)
    recorder, act = Recorder(environments), sampling(networks[1], torch.Generator().manual_seed(0))

    def collect(repetition: int, steps: int) -> float:
        buffer = Observations(steps + count, environments.observation_space.shape or (), torch.float32)
        started = time.process_time()
        buffer.append(recorder.collect(act, steps), networks[0])
        return buffer.seen / (time.process_time() - started)

    return collect


def plain_collection(id: str, teacher: BasePolicy, student: BasePolicy, **env_kwargs: Any) -> Collect:
    """Collects with `make_vec_env` and `predict`, which stores the teacher's action."""
    environments = make_vec_env(id, 8, seed=0, env_kwargs=env_kwargs)

    def collect(repetition: int, steps: int) -> float:
        kept, started = [], time.process_time()
        observations: Any = environments.reset()
        for _ in range(steps // 8):
            actions, _ = student.predict(observations)
            kept.append((observations, teacher.predict(observations, deterministic=True)[0]))
            observations = environments.step(actions)[0]
        return len(kept) * 8 / (time.process_time() - started)

    return collect


def take_turns(
    implementations: dict[str, Callable[..., Any]], repetitions: int, **kwargs: Any
) -> dict[str, list[Any]]:
    measured: dict[str, list[Any]] = {name: [] for name in implementations}
    for repetition in range(repetitions):
        for name, implementation in implementations.items():
            measured[name].append(implementation(repetition, **kwargs))
    return measured


def rows_of(measure: str, figures: dict[str, list[float]]) -> list[list[str]]:
    """Table rows with the ratio to the first implementation."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    first = next(iter(medians.values()))
    return [
        [measure, name, *map(number, (medians[name], min(values), max(values))), f"{medians[name] / first:.2f}"]
        for name, values in figures.items()
    ]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", default=TEACHER, help="Zip file or folder of a PPO.")
    parser.add_argument("--imitation_python", help="Python interpreter with imitation_requirements.txt installed.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of repetitions, each with another seed.")
    parser.add_argument("--goal", type=float, default=475.0, help="Mean return that ends the measured time.")
    parser.add_argument("--steps", type=int, default=20_000, help="Environment steps per collection.")
    parser.add_argument("--json", help="File to which all figures are also written.")
    args = parser.parse_args()
    torch.set_num_threads(1)

    agent = load_agent(args.teacher, CARTPOLE)
    teacher = agent.policy
    if not isinstance(teacher, ActorCriticPolicy) or agent.statistics is not None:
        raise UserError("the teacher must be a PPO without observation normalization: pass another --teacher")
    returns, _ = returns_of(greedy(PolicyNetwork(teacher).eval()), CARTPOLE, EPISODES, VALIDATION_SEED)
    versions = {name: version(name) for name in ("stable-baselines3", "gymnasium", "torch", "numpy")}
    figures: Figures = {"about": {"teacher": float(returns.mean()), "versions": versions}}
    project = ThisProject(teacher, 8)
    distill: dict[str, Distill] = {"this project": project, "this project, 64 environments": ThisProject(teacher, 64)}
    peer = Imitation(args.imitation_python, teacher) if args.imitation_python else None
    if peer is not None:
        figures["about imitation"] = peer.about
        arguments = {name: getattr(project.args, name) for name in ("updates", "batch_size", "learning_rate")}
        arguments["steps"] = project.args.steps // project.args.rounds
        for method in ("DAgger", "BC"):
            for label, used in (("its defaults", None), ("this project's arguments", arguments)):
                distill[f"imitation {method}, {label}"] = partial(peer, method=method.lower(), arguments=used)
    if min(about["teacher"] for about in figures.values()) < args.goal:
        raise UserError(f"the teacher does not reach --goal {args.goal:.0f}: {figures}")
    take_turns(distill, 1, goal=float("-inf"))  # a warm-up of one round
    distilled = take_turns(distill, args.repetitions, goal=args.goal)
    if peer is not None:
        peer.close()

    cartpole = teacher, project.student
    lander = (
        new_teacher(LANDER, RECIPES[LANDER], seed=0).policy,
        untrained_student(LANDER, 0),
    )
    collect: dict[str, dict[str, Collect]] = {
        CARTPOLE: {
            "predict twice, make_vec_env, 8 environments": plain_collection(CARTPOLE, *cartpole),
            "this project, 8 environments": kd_collection(CARTPOLE, 8, *cartpole),
            "this project, 64 environments": kd_collection(CARTPOLE, 64, *cartpole),
        },
        LANDER: {
            "predict twice, make_vec_env, 8 environments": plain_collection(LANDER, *lander),
            "predict twice, render_mode=None": plain_collection(LANDER, *lander, render_mode=None),
            "this project, 8 environments": kd_collection(LANDER, 8, *lander),
        },
    }
    for implementations in collect.values():
        take_turns(implementations, 1, steps=args.steps // 10)
    collected = {id: take_turns(found, args.repetitions, steps=args.steps) for id, found in collect.items()}

    rows = rows_of(
        f"CPU-s to {args.goal:.0f}", {name: [run["seconds"] for run in runs] for name, runs in distilled.items()}
    )
    for row, runs in zip(rows, distilled.values(), strict=True):
        reached = sum(run["return"] >= args.goal for run in runs)
        row += [f"{reached} of {len(runs)}", number(statistics.median(run["observations"] for run in runs))]
    for id, rates in collected.items():
        rows += [[*row, "", ""] for row in rows_of(f"steps per CPU-s, {id}", rates)]
    header = ["measured", "implementation", "median", "lowest", "highest", "ratio to first", "reached", "observations"]
    below = "\n".join(f"{name}: {json.dumps(about)}" for name, about in figures.items())
    print_rich(
        header, rows, "Policy distillation, one thread", below if peer is not None else f"{below}\n{INSTALL_IMITATION}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(figures | {"distilled": distilled, "collected": collected}, indent=1))


if __name__ == "__main__":
    run(main)
