"""Compares collecting observations with this project, the usual Stable-Baselines3 loop and the environment alone.

    python benchmarks/policy_collection.py --json figures.json

Steps per CPU-second of one thread. This project stores observations, and the logits or the distribution and the value
of the teacher, and acts with the student; the usual loop, `make_vec_env` with two calls of `predict`, stores the
teacher's action. The vector environment alone repeats prepared random actions and stores nothing: collecting cannot be
faster. The teachers are untrained PPOs of 64-64 (HalfCheetah 256-256), the students have 16-16. Implementations take
turns and are warmed up; the ratio is to the environment alone.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from kd.common.cli import Parser, run
from kd.common.reporting.tables import number, print_rich
from kd.reinforcement_learning.data.environments import Environments, quiet_mujoco, training_environments
from kd.reinforcement_learning.data.rollouts import Observations, Recorder
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.student import new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, sampling
from kd.reinforcement_learning.teacher_model.recipes import training_recipe

WIDTHS = {"CartPole-v1": 64, "LunarLander-v3": 64, "HalfCheetah-v4": 256}  # of the teachers
Collect = Callable[[int], float]  # steps -> steps per CPU-second


def untrained(environment: str, width: int) -> ActorCriticPolicy:
    environments = training_environments(environment, 1, 0)
    sizes = StudentArguments(student=[width, width])
    policy = new_student(environments, sizes, training_recipe("ppo", "any"), 0).policy
    environments.close()
    return policy


def environment_alone(environment: str, count: int) -> Collect:
    vector = Environments(environment, count).vector
    actions = [vector.action_space.sample() for _ in range(1000)]

    def collect(steps: int) -> float:
        vector.reset(seed=0)
        ended, started = 0, time.process_time()
        for step in range(steps // count):
            _, _, terminated, truncated, _ = vector.step(actions[step % len(actions)])
            ended += int((terminated | truncated).sum())  # the next step of these only restarts
        return (steps // count * count - ended) / (time.process_time() - started)

    return collect


def this_project(environment: str, count: int, teacher: ActorCriticPolicy, student: ActorCriticPolicy) -> Collect:
    teacher_network, student_network = PolicyNetwork(teacher).eval(), PolicyNetwork(student).eval()
    recorder = Recorder(Environments(environment, count))
    act, shape = sampling(student_network, torch.Generator().manual_seed(0)), teacher.observation_space.shape

    def collect(steps: int) -> float:
        buffer = Observations(steps + count, shape or (), torch.float32)
        started = time.process_time()
        buffer.append(recorder.collect(act, steps), teacher_network)
        return buffer.seen / (time.process_time() - started)

    return collect


def usual_loop(
    environment: str, count: int, teacher: ActorCriticPolicy, student: ActorCriticPolicy, **env_kwargs: Any
) -> Collect:
    with quiet_mujoco():
        environments = make_vec_env(environment, count, seed=0, env_kwargs=env_kwargs)

    def collect(steps: int) -> float:
        kept, started = [], time.process_time()
        observations: Any = environments.reset()
        for _ in range(steps // count):
            actions, _ = student.predict(observations)
            kept.append((observations, teacher.predict(observations, deterministic=True)[0]))
            observations = environments.step(actions)[0]
        return len(kept) * count / (time.process_time() - started)

    return collect


def implementations(environment: str, count: int) -> dict[str, Collect]:
    both = untrained(environment, WIDTHS[environment]), untrained(environment, 16)
    found = {
        "environment alone": environment_alone(environment, count),
        "this project": this_project(environment, count, *both),
        "usual loop": usual_loop(environment, count, *both),
    }
    if environment == "LunarLander-v3":
        found["usual loop, render_mode=None"] = usual_loop(environment, count, *both, render_mode=None)
    return found


def measure(environment: str, count: int, steps: int, repetitions: int) -> dict[str, list[float]]:
    found = implementations(environment, count)
    for collect in found.values():
        collect(max(steps // 10, count))
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repetitions):
        for name, collect in found.items():
            rates[name].append(collect(steps))
    return rates


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="Number of repetitions.")
    parser.add_argument("--steps", type=int, default=20_000, help="Environment steps per collection.")
    parser.add_argument("--json", help="File to which all figures are also written.")
    args = parser.parse_args()
    torch.set_num_threads(1)

    figures: dict[str, dict[str, list[float]]] = {}
    rows = []
    for environment, counts in (("CartPole-v1", (8, 64)), ("LunarLander-v3", (8, 32)), ("HalfCheetah-v4", (8, 32))):
        for count in counts:
            name = f"{environment}, {count} environments"
            figures[name] = rates = measure(environment, count, args.steps, args.repetitions)
            alone = rates["environment alone"]
            for implementation, values in rates.items():
                ratio = statistics.median(one / other for one, other in zip(values, alone, strict=True))
                cells = [number(value) for value in (statistics.median(values), min(values), max(values), ratio)]
                rows.append([name, implementation, *cells])
    header = ["environments", "implementation", "steps per CPU-s, median", "lowest", "highest", "ratio"]
    print_rich(header, rows, "Collecting, one thread")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run(main)
