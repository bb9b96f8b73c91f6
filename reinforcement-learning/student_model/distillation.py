"""Distillation of policies: the loop that collects observations and trains students, and the stages of a run.

Each round collects observations and trains on all observations so far (DAgger, arXiv:1011.0686). The target is the
teacher's action distribution (Rusu et al., arXiv:1511.06295); the teacher runs once on each observation. The rollout
policy selects the actions while observations are collected. It is the teacher, the student, the teacher in the first
round and the student afterwards (dagger), or a mixture in which the share of the teacher falls from 1 to 0 (mixed).
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor, nn
from tqdm.auto import tqdm

from kd.common.objective import Objective
from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.training.trackers import Trackers, tracked
from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights
from kd.reinforcement_learning.data.environments import Environments
from kd.reinforcement_learning.data.rollouts import Act, Observations, Recorder, in_parts, mixture
from kd.reinforcement_learning.student_model.arguments import DistillArguments
from kd.reinforcement_learning.student_model.matching import policy_and_value
from kd.reinforcement_learning.student_model.ppd import PPD, ppd_environments
from kd.reinforcement_learning.student_model.student import StudentNetwork, StudentSpec, share_bodies
from kd.reinforcement_learning.teacher_model.policies import greedy, memory_of, sampling
from kd.reinforcement_learning.teacher_model.recipes import folder_name
from kd.reinforcement_learning.teacher_model.run import PolicyRun
from kd.reinforcement_learning.teacher_model.teacher import Agent, Agents, train_from_reward
from kd.reinforcement_learning.teacher_model.training import recipe_environments

STATE = "state.pt"  # file in a checkpoint
Evaluate = Callable[[], dict[str, float]]


# ---- the loop ----


@dataclass
class DistillationTask:
    """The distillation in one environment."""

    recorder: Recorder
    teacher: nn.Module
    student: StudentNetwork
    buffer: Observations
    round_ends: list[int] = field(default_factory=lambda: [0])  # recorded steps at the end of each round


class Distiller:
    """Distills one task, or several whose students share layers; each update uses one minibatch of every task.

    Checkpoints in `folder` contain the weights, the optimizer, the random state and the recorded actions, from which
    environments and buffers are restored. An interrupted distillation therefore gives the same student.
    """

    def __init__(self, tasks: list[DistillationTask], args: DistillArguments, folder: Path, seed: int) -> None:
        self.tasks, self.args, self.folder = tasks, args, folder
        self.generator = torch.Generator().manual_seed(seed)
        self.students = nn.ModuleList(task.student for task in tasks)
        self.optimizer = torch.optim.Adam(self.students.parameters(), lr=args.learning_rate, fused=True)
        self.cpu_seconds, self.history = 0.0, list[dict[str, Any]]()

    def learn(
        self, evaluate: Evaluate, description: str = "", trackers: Trackers | None = None
    ) -> list[dict[str, Any]]:
        """Runs the remaining rounds. Returns the log: the mean losses and `evaluate()` of each round. `trackers` get
        it too.
        """
        trackers = trackers or Trackers()
        if (checkpoint := newest_checkpoint(self.folder)) is not None:
            self._restore(checkpoint / STATE)
        for number in tqdm(range(len(self.history), self.args.rounds), description, unit="round", leave=False):
            started = time.process_time()
            for task in self.tasks:
                self._collect(task, number)
            means = self._fit(number)
            check_finite_weights(self.students, when=f"after round {number + 1}")
            self.cpu_seconds += time.process_time() - started
            work = {"observations": sum(task.buffer.seen for task in self.tasks), "cpu_seconds": self.cpu_seconds}
            measured = means | {"learning_rate": self.optimizer.param_groups[0]["lr"]} | evaluate()
            self.history.append({"environment_steps": self._steps(number + 1)} | work | measured)
            trackers.log(tracked(measured), self._steps(number + 1))
            save_checkpoint(self.folder, number + 1, self._write)
        return self.history

    def _steps(self, rounds: int) -> int:
        """Environment steps of all tasks after `rounds` rounds."""
        return self.args.steps * rounds // self.args.rounds

    def _collect(self, task: DistillationTask, number: int) -> None:
        """Collects the observations of a round and adds them, with the teacher's outputs, to the buffer."""
        steps = (self._steps(number + 1) - self._steps(number)) // len(self.tasks)
        observations = task.recorder.collect(self._rollout_policy(task, number), steps)
        if number == 0:
            task.student.prepare(observations)
        task.buffer.append(observations, task.teacher)
        task.round_ends.append(len(task.recorder.actions))
        values = task.buffer.values()
        if values is not None:
            task.student.set_value_scale(values, preserve=number > 0)

    def _rollout_policy(self, task: DistillationTask, number: int) -> Act:
        teacher, student = sampling(task.teacher, self.generator), sampling(task.student, self.generator)
        if number_of_greedy := round(self.args.greedy_share * self.args.num_envs):
            student = in_parts(greedy(task.student), student, number_of_greedy)
        teacher_share = {
            "teacher": 1.0,
            "student": 0.0,
            "dagger": float(number == 0),
            "mixed": 1 - number / max(self.args.rounds - 1, 1),
        }[self.args.rollout_policy]
        if teacher_share in (0.0, 1.0):
            return teacher if teacher_share else student
        return mixture(teacher, student, teacher_share, self.generator)

    def _fit(self, number: int) -> dict[str, float]:
        """Trains the students for one round. Returns the means of the loss and its terms."""
        args, updates, tasks = self.args, self.args.updates, self.tasks
        batches = [t.buffer.batches(args.batch_size, updates, self.generator, t.student.device) for t in tasks]
        objectives = [self._objective(task) for task in tasks]
        sums: dict[str, Tensor] = {}
        for update in range(updates):
            share_done = (number * updates + update) / (updates * args.rounds)
            self.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - share_done)
            self.optimizer.zero_grad()
            for task, objective, (observations, teacher) in zip(tasks, objectives, map(next, batches), strict=True):
                student = task.student(observations)
                parts = objective(student, teacher, None)
                loss = torch.stack(list(parts.values())).sum()
                loss.backward()
                logged = {f"loss_{name}": part for name, part in parts.items()} | {"loss": loss}
                for name, value in (logged | objective.watch(student, teacher, None)).items():
                    sums[name] = sums.get(name, 0) + value.detach() / (updates * len(tasks))
            self.optimizer.step()
        means = {name: value.item() for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is not finite in round {number + 1} ({means}): lower --learning_rate")
        return means

    def _objective(self, task: DistillationTask) -> Objective:
        value_weight = self.args.value_weight if task.buffer.values() is not None else 0.0
        std, actions = task.student.value_std.item(), task.student.policy.action_space
        return policy_and_value(self.args.loss, value_weight, std, actions).objective

    def _write(self, folder: Path) -> None:
        state = {
            "cpu_seconds": self.cpu_seconds,
            "history": self.history,
            "students": self.students.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "actions": [torch.as_tensor(np.stack(task.recorder.actions)) for task in self.tasks],
            "round_ends": [task.round_ends for task in self.tasks],
        }
        torch.save(state, folder / STATE)

    def _restore(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.cpu_seconds, self.history = state["cpu_seconds"], state["history"]
        self.students.load_state_dict(state["students"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for task, actions, ends in zip(self.tasks, state["actions"], state["round_ends"], strict=True):
            task.round_ends = ends
            for start, end in pairwise(ends):  # in the same batches, so that teacher outputs are bitwise equal
                task.buffer.append(task.recorder.replay(actions[start:end].numpy()), task.teacher)


# ---- the stages of a run ----


@dataclass(frozen=True)
class Distillation:
    """Trains students as stages of `run`, one per environment. The students of several environments share their body.

    Every method loads the agents of its stage if the stage is finished.
    """

    run: PolicyRun
    specs: list[StudentSpec]
    args: DistillArguments

    def control(self) -> Agents:
        """Trains the control, the same network, by PPO from reward alone, with as many environment steps, rounded up
        to whole rollouts.
        """
        return self._from_reward("control", "PPO from reward", self._untrained_control)

    def control_of_equal_cpu_time(self) -> Agents:
        """Trains a control with as many environment steps as PPO takes in the CPU time of the student. The times are
        those in the logs of student and control, without evaluations.
        """
        log = self.run.history["control"]
        names = [spec.environment for spec in self.specs]
        control = {
            name: next(entry for entry in reversed(log) if self.run.curve_name(name) in entry) for name in names
        }
        share = self.run.history["student"][-1]["cpu_seconds"] / sum(one["cpu_seconds"] for one in control.values())
        steps = {name: max(1, round(share * one["environment_steps"])) for name, one in control.items()}
        return self._from_reward("control_cpu_time", "PPO from reward, equal CPU time", self._untrained_control, steps)

    def ppd_student(self, teacher_weight: float) -> Agents:
        """Trains a student by proximal policy distillation."""

        def build(spec: StudentSpec) -> PPO:
            environments, teacher = ppd_environments(spec, self._seed)
            return spec.new(self._seed, environments, algorithm=PPD, teacher=teacher, teacher_weight=teacher_weight)

        return self._from_reward("student", "student (PPD)", build)

    def student(self) -> Agents:
        """Trains a student with the Distiller."""
        return self._distilled("student", "student", self.args)

    def behaviour_cloning(self) -> Agents:
        """Trains a baseline: the teacher is the rollout policy, and its greedy actions are the targets."""
        discrete = not any(isinstance(spec.teacher.agent.policy.action_space, spaces.Box) for spec in self.specs)
        args = replace(
            self.args,
            rollout_policy="teacher",
            loss="nll" if discrete else "mse",
            value_weight=0.0,
        )
        return self._distilled("behaviour_cloning", "behaviour cloning", args)

    def _untrained_control(self, spec: StudentSpec) -> PPO:
        raw = spec.args.codebooks > 0
        environments = recipe_environments(spec.environment, spec.recipe, self._seed, norm_obs=not raw)
        return spec.new(self._seed, environments)

    @property
    def _seed(self) -> int:
        return self.run.args.seed

    @property
    def _steps(self) -> int:
        """Environment steps in each environment."""
        return self.args.steps // len(self.specs)

    def _stage(self, stage: str, name: str, build: Callable[[], Agents]) -> Agents:
        def load(folder: str) -> Agents:
            agents = Agents()
            for spec in self.specs:
                folder_of_one = Path(folder, folder_name(spec.environment))
                agents[spec.environment] = spec.load(name, folder_of_one, self._seed)
            return agents

        return self.run.stage(stage, build, load)

    def _from_reward(
        self,
        stage: str,
        name: str,
        untrained: Callable[[StudentSpec], PPO],
        steps: Mapping[str, int] | None = None,  # by environment
    ) -> Agents:
        def build() -> Agents:
            agents = Agents()
            for spec in self.specs:
                model = untrained(spec)
                self._fit_bottleneck(spec, model)
                count = self._steps if steps is None else steps[spec.environment]
                train_from_reward(self.run, stage, spec.environment, model, count)
                statistics = Agent.trained(name, model).statistics
                agents[spec.environment] = spec.with_policy(name, self._seed, model.policy, statistics)
            return agents

        return self._stage(stage, name, build)

    def _fit_bottleneck(self, spec: StudentSpec, model: PPO) -> None:
        """Fits the keys of a bottleneck to observations of the teacher, as many as in one round of distillation."""
        if spec.args.codebooks:
            rollout_policy = sampling(spec.teacher.network, torch.Generator().manual_seed(self._seed))
            with closing(self._environments(spec)) as environments:
                observations = Recorder(environments).collect(rollout_policy, self._steps // self.args.rounds)
            StudentNetwork(model.policy, None, spec.columns).prepare(observations)

    def _distilled(self, stage: str, name: str, args: DistillArguments) -> Agents:
        def build() -> Agents:
            models = [spec.new(self._seed) for spec in self.specs]
            share_bodies([model.policy for model in models])
            tasks = {
                spec.teacher.shared: self._task(spec, model) for spec, model in zip(self.specs, models, strict=True)
            }
            networks: dict[str, nn.Module] = {environment: task.student for environment, task in tasks.items()}

            distiller = Distiller(list(tasks.values()), args, self.run.folder / "checkpoints" / stage, self._seed)
            with self.run.trackers(stage) as trackers:
                evaluate = partial(self.run.mean_returns, networks)
                self.run.history[stage] = distiller.learn(evaluate, stage, trackers)
            agents = Agents()
            for spec, task in zip(self.specs, tasks.values(), strict=True):
                task.recorder.environments.close()
                agents[spec.environment] = spec.with_policy(name, self._seed, task.student.folded_policy())
            return agents

        return self._stage(stage, name, build)

    def _environments(self, spec: StudentSpec) -> Environments:
        teacher = spec.teacher
        return Environments(teacher.shared, self.args.num_envs, self._seed, memory=memory_of(teacher.network))

    def _task(self, spec: StudentSpec, model: PPO) -> DistillationTask:
        environments = self._environments(spec)
        space = environments.observation_space
        dtype = torch.uint8 if space.dtype == "uint8" else torch.float32
        rows = min(self.args.buffer_size, self._steps + self.args.num_envs * self.args.rounds)
        return DistillationTask(
            Recorder(environments),
            spec.teacher.network,
            StudentNetwork(model.policy, spec.teacher.agent.statistics, spec.columns).to(model.device),
            Observations(rows, space.shape or (), dtype),
        )
