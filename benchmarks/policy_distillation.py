"""Compares distilling a policy with this project, the usual Stable-Baselines3 loop and `imitation` (BC and DAgger).

    python benchmarks/policy_distillation.py --imitation_python imitation-venv/bin/python --json figures.json
    python benchmarks/policy_distillation.py --halfcheetah_teacher rl-trained-agents/ppo/HalfCheetah-v3_1

CPU time until a student's mean greedy return reaches 95 % of its teacher's. It includes creating environments and
student, collecting and fitting, but not the evaluation after each round (BC: after each epoch). All implementations
use the same teacher and one thread, take turns within one run, and are warmed up. The usual loop collects with
`make_vec_env` and `predict` and trains on the teacher's greedy actions, with this project's rounds, updates, batches
and learning rate. `imitation` needs older packages, so imitation_worker.py runs it in a separate environment; without
--imitation_python its rows are left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd.common.cli import Parser, run
from kd.common.reporting.tables import number, print_rich
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, quiet_mujoco, training_environments
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, Observations, Recorder, returns_of
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import StudentNetwork, fold_input, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, greedy
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd.reinforcement_learning.teacher_model.teacher import Agent, load_agent

TEACHER = "runs/reinforcement-learning/teacher_CartPole-v1_ppo"  # the default folder of train_teacher.py
SHARE = 0.95  # of the teacher's mean return
INSTALL_IMITATION = (
    "install imitation with `python3.11 -m venv imitation-venv && imitation-venv/bin/pip install -r "
    "benchmarks/imitation_requirements.txt`, then --imitation_python imitation-venv/bin/python"
)

Figures = dict[str, Any]
Distill = Callable[..., Figures]  # (seed, goal) -> seconds, return, observations


@dataclass(frozen=True)
class Task:
    """An environment, the widths of the student, this project's arguments, and the episodes of an evaluation. In
    HalfCheetah the student has 5 % of the parameters of the teacher's actor, and the arguments are those of
    distill_zoo.sh with eight environments.
    """

    environment: str
    student: list[int]
    args: DistillArguments
    episodes: int


CARTPOLE = Task("CartPole-v1", [16, 16], DistillArguments(), 20)
HALFCHEETAH = Task("HalfCheetah-v4", [48, 48], DistillArguments(steps=50_000, updates=800, greedy_share=0.5), 10)


class Reached(Exception):
    """The student reached the goal."""


class Clock:
    """CPU time until a student's mean return reaches `goal`, without the time of evaluations."""

    def __init__(self, task: Task, goal: float) -> None:
        self.task, self.goal = task, goal
        self.figures: Figures = {"seconds": 0.0, "return": 0.0, "observations": 0}
        self.since = time.process_time()

    def check(self, network: nn.Module, observations: int) -> None:
        self.figures["seconds"] += time.process_time() - self.since
        returns, _ = returns_of(greedy(network), self.task.environment, self.task.episodes, VALIDATION_SEED)
        self.figures |= {"return": float(returns.mean()), "observations": observations}
        if self.figures["return"] >= self.goal:
            raise Reached
        self.since = time.process_time()


def untrained_student(task: Task, seed: int) -> ActorCriticPolicy:
    environments = training_environments(task.environment, 1, seed)
    recipe = training_recipe("ppo", "any")
    policy = new_student(environments, StudentArguments(student=task.student), recipe, seed).policy
    environments.close()
    return policy


def this_project(seed: int, goal: float, task: Task, teacher: Agent, num_envs: int = 8) -> Figures:
    """The Distiller."""
    clock, args = Clock(task, goal), task.args
    student = StudentNetwork(untrained_student(task, seed), None)
    environments = Environments(task.environment, num_envs, seed)
    buffer = Observations(
        args.steps + num_envs * args.rounds, environments.observation_space.shape or (), torch.float32
    )

    def evaluate() -> dict[str, float]:
        clock.check(student, buffer.seen)
        return {}

    one = DistillationTask(Recorder(environments), teacher.network(), student, buffer)
    with tempfile.TemporaryDirectory() as folder, suppress(Reached):
        Distiller([one], args, Path(folder), seed).learn(evaluate)
    environments.close()
    return clock.figures


def usual_loop(seed: int, goal: float, task: Task, teacher: Agent) -> Figures:
    """DAgger with Stable-Baselines3: the teacher acts in the first round and the student afterwards."""
    clock, args = Clock(task, goal), task.args
    student = untrained_student(task, seed)
    optimizer = torch.optim.Adam(student.parameters(), args.learning_rate)
    with quiet_mujoco():
        environments, kept = make_vec_env(task.environment, args.num_envs, seed=seed), list[tuple[Any, Any]]()
    observations: Any = environments.reset()
    network = PolicyNetwork(student).eval()
    with suppress(Reached):
        for round_number in range(args.rounds):
            for _ in range(args.steps // args.rounds // args.num_envs):
                targets, _ = teacher.policy.predict(observations, deterministic=True)
                kept.append((observations, targets))
                actions = targets if round_number == 0 else student.predict(observations)[0]
                observations = environments.step(actions)[0]
            rows, labels = (torch.as_tensor(np.concatenate(part)) for part in zip(*kept, strict=True))
            loader = DataLoader(TensorDataset(rows.float(), labels), args.batch_size, shuffle=True)
            for batch, target in islice(chain.from_iterable(repeat(loader)), args.updates):
                loss = -student.evaluate_actions(batch, target)[1].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            clock.check(network, len(rows))
    environments.close()
    return clock.figures


class Imitation:
    """Runs imitation_worker.py with another interpreter and the weights of this teacher."""

    def __init__(self, python: str, task: Task, teacher: Agent) -> None:
        arrays: dict[str, Any] = {name: weight.numpy() for name, weight in teacher.policy.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder, "teacher.npz"), **arrays)
            words = [str(Path(__file__).with_name("imitation_worker.py")), "--environment", task.environment]
            words += ["--teacher", str(Path(folder, "teacher.npz")), "--episodes", str(task.episodes)]
            if isinstance(teacher.policy, ActorCriticPolicy):
                words += ["--activation", teacher.policy.activation_fn.__name__]
            self.process = subprocess.Popen(
                [python, *words, "--student", *map(str, task.student)],
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


def implementations(task: Task, teacher: Agent, peer: Imitation | None) -> dict[str, Distill]:
    found: dict[str, Distill] = {"this project": partial(this_project, task=task, teacher=teacher)}
    if task is CARTPOLE:  # NumPy steps all its copies at once
        found["this project, 64 environments"] = partial(this_project, task=task, teacher=teacher, num_envs=64)
    found["usual loop, this project's arguments"] = partial(usual_loop, task=task, teacher=teacher)
    if peer is not None:
        arguments = {name: getattr(task.args, name) for name in ("updates", "batch_size", "learning_rate")}
        arguments["steps"] = task.args.steps // task.args.rounds
        for method in ("DAgger", "BC"):
            for label, used in (("its defaults", None), ("this project's arguments", arguments)):
                found[f"imitation {method}, {label}"] = partial(peer, method=method.lower(), arguments=used)
    return found


def for_raw_observations(teacher: Agent) -> Agent:
    """The teacher with its normalization of observations, without clipping, in the first layers: all implementations
    observe what the environment returns.
    """
    if teacher.statistics is None:
        return teacher
    if not isinstance(teacher.policy, ActorCriticPolicy):
        raise UserError(f"{teacher.name} has statistics of observations and is no actor-critic: pass another teacher")
    fold_input(teacher.policy, *(torch.as_tensor(part) for part in (teacher.statistics.mean, teacher.statistics.std)))
    return replace(teacher, statistics=None)


def measure(task: Task, teacher: Agent, python: str | None, repetitions: int) -> Figures:
    """Figures of each implementation: a list of runs, each with another seed."""
    teacher = for_raw_observations(teacher)
    returns, _ = returns_of(greedy(teacher.network()), task.environment, task.episodes, VALIDATION_SEED)
    peer = Imitation(python, task, teacher) if python else None
    goal, found = SHARE * float(returns.mean()), implementations(task, teacher, peer)
    about = {"teacher": float(returns.mean()), "goal": goal} | ({"imitation": peer.about} if peer else {})
    if task is CARTPOLE:  # a warm-up of one round
        take_turns(found, 1, goal=float("-inf"))
    measured = take_turns(found, repetitions, goal=goal)
    if peer is not None:
        peer.close()
    return {"about": about, "runs": measured}


def take_turns(found: dict[str, Distill], repetitions: int, goal: float) -> dict[str, list[Figures]]:
    measured: dict[str, list[Figures]] = {name: [] for name in found}
    for repetition in range(repetitions):
        for name, distill in found.items():
            measured[name].append(distill(repetition, goal))
            print(f"{name}, seed {repetition}: {json.dumps(measured[name][-1])}", file=sys.stderr)
    return measured


def rows_of(environment: str, goal: float, runs: dict[str, list[Figures]]) -> list[list[str]]:
    """Table rows with the ratio to the first implementation."""
    seconds = {name: [run["seconds"] for run in of_one] for name, of_one in runs.items()}
    first, rows = statistics.median(next(iter(seconds.values()))), []
    for name, of_one in runs.items():
        median = statistics.median(seconds[name])
        reached = sum(run["return"] >= goal for run in of_one)
        observations = number(statistics.median(run["observations"] for run in of_one))
        cells = [number(value) for value in (median, min(seconds[name]), max(seconds[name]))]
        rows.append([environment, name, *cells, f"{median / first:.2f}", f"{reached} of {len(of_one)}", observations])
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", default=TEACHER, help="Zip file or folder of a CartPole PPO, or none.")
    parser.add_argument("--halfcheetah_teacher", help="Zip file or folder of a HalfCheetah agent.")
    parser.add_argument("--imitation_python", help="Python interpreter with imitation_requirements.txt installed.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of repetitions, each with another seed.")
    parser.add_argument("--json", help="File to which all figures are also written.")
    args = parser.parse_args()
    torch.set_num_threads(1)

    names = ("stable-baselines3", "gymnasium", "torch", "numpy")
    figures: Figures = {"versions": {name: version(name) for name in names}}
    rows: list[list[str]] = []
    for task, name in ((CARTPOLE, args.teacher), (HALFCHEETAH, args.halfcheetah_teacher)):
        if name and name != "none":
            teacher = load_agent(name, task.environment)
            found = figures[task.environment] = measure(task, teacher, args.imitation_python, args.repetitions)
            rows += rows_of(task.environment, found["about"]["goal"], found["runs"])
            if args.json:
                Path(args.json).write_text(json.dumps(figures, indent=1))
    header = ["environment", "implementation", "median", "lowest", "highest", "ratio", "reached", "observations"]
    below = [json.dumps({"versions": figures["versions"]})]
    below += [json.dumps({name: one["about"]}) for name, one in figures.items() if name != "versions"]
    below += [] if args.imitation_python else [INSTALL_IMITATION]
    title = f"CPU-seconds to {SHARE:.0%} of the teacher's return, one thread"
    print_rich(header, rows, title, "\n".join(below))


if __name__ == "__main__":
    run(main)
