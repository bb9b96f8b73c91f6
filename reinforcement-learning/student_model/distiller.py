"""Policy distillation as a plain loop: collect observations, ask the teacher once about each, fit the student.

Rounds of collecting and fitting over all that has been collected (DAgger, arXiv:1011.0686), with the teacher's whole
action distribution as target (Rusu et al., arXiv:1511.06295). Who acts while observations are collected is the
driver: the teacher, the student, the teacher in the first round and then the student (dagger), or a mixture that
passes from the one to the other (mixed).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kd.common.objective import Objective
from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights
from kd.common.utils.ranges import Count, NotNegative, Positive
from kd.reinforcement_learning.data.observations import Observations
from kd.reinforcement_learning.data.playing import Act, Recorder, mixture, sampling
from kd.reinforcement_learning.student_model.matching import Loss, policy_and_value
from kd.reinforcement_learning.student_model.student import StudentNetwork
from kd.reinforcement_learning.teacher_model.checkpoints import Checkpoints

STATE = "state.pt"  # of a checkpoint
Driver = Literal["teacher", "student", "dagger", "mixed"]
Watch = Callable[[], dict[str, float]]


@dataclass
class DistillArguments:
    """How a student is distilled."""

    driver: Driver = field(default="dagger", metadata={"help": "who acts while observations are collected"})
    loss: Loss = field(default="kl", metadata={"help": "between the action distributions of student and teacher"})
    steps: Count = field(default=20_000, metadata={"help": "environment steps in all"})
    rounds: Count = field(default=10, metadata={"help": "of collecting and fitting"})
    updates: Count = field(default=200, metadata={"help": "minibatches per round"})
    batch_size: Count = 256
    learning_rate: Positive = field(default=3e-3, metadata={"help": "of Adam at the start; it falls linearly to 0"})
    value_weight: NotNegative = field(default=0.5, metadata={"help": "of the loss between the values; 0 for none"})
    num_envs: Count = field(default=8, metadata={"help": "environments that are stepped side by side"})
    buffer_size: Count = field(default=1_000_000, metadata={"help": "observations kept; the oldest go first"})


@dataclass
class Task:
    """One environment's side of a distillation."""

    recorder: Recorder
    teacher: nn.Module
    student: StudentNetwork
    buffer: Observations
    marks: list[int] = field(default_factory=lambda: [0])  # recorded steps at the end of each round


class Distiller:
    """Distills one task, or several whose students share layers, in minibatches that take turns.

    `folder` keeps what a killed distillation needs to go on and end as if never killed: weights, optimizer, random
    state and the actions taken. From these the environments and the buffers are brought to where they were.
    """

    def __init__(self, tasks: list[Task], args: DistillArguments, folder: Path, seed: int) -> None:
        self.tasks, self.args, self.checkpoints = tasks, args, Checkpoints(folder)
        self.generator = torch.Generator().manual_seed(seed)
        self.students = nn.ModuleList(task.student for task in tasks)
        self.optimizer = torch.optim.Adam(self.students.parameters(), lr=args.learning_rate, fused=True)
        self.done_rounds, self.cpu_seconds, self.history = 0, 0.0, list[dict[str, Any]]()

    def learn(self, watch: Watch, description: str = "") -> list[dict[str, Any]]:
        """Runs the rounds that are left; the log: after each round the losses and what `watch()` tells."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            self._restore(checkpoint / STATE)
        rounds = range(self.done_rounds, self.args.rounds)
        with tqdm(rounds, desc=description, unit="round", leave=False) as bar:
            for number in bar:
                self._round(number, watch)
        return self.history

    def _round(self, number: int, watch: Watch) -> None:
        started = time.process_time()
        for task in self.tasks:
            self._collect(task, number)
        losses = self._fit(number)
        check_finite_weights(self.students, when=f"after round {number + 1}")
        self.cpu_seconds += time.process_time() - started
        work = {"observations": sum(task.buffer.seen for task in self.tasks), "cpu_seconds": self.cpu_seconds}
        self.history.append({"environment_steps": self._steps(number + 1)} | work | losses | watch())
        self.done_rounds = number + 1
        self.checkpoints.save(self.done_rounds, self._write)

    def _steps(self, rounds: int) -> int:
        return self.args.steps * rounds // self.args.rounds

    def _collect(self, task: Task, number: int) -> None:
        steps = (self._steps(number + 1) - self._steps(number)) // len(self.tasks)
        observations = task.recorder.collect(self._driver(task, number), steps)
        if number == 0:
            task.student.prepare(observations)
        task.buffer.append(observations, task.teacher)
        task.marks.append(len(task.recorder.actions))
        values = task.buffer.values()
        if values is not None:
            task.student.set_value_scale(values, preserve=number > 0)

    def _driver(self, task: Task, number: int) -> Act:
        teacher, student = sampling(task.teacher, self.generator), sampling(task.student, self.generator)
        teachers_share = {
            "teacher": 1.0,
            "student": 0.0,
            "dagger": float(number == 0),
            "mixed": 1 - number / max(self.args.rounds - 1, 1),
        }[self.args.driver]
        if teachers_share in (0.0, 1.0):
            return teacher if teachers_share else student
        return mixture(teacher, student, teachers_share, self.generator)

    def _fit(self, number: int) -> dict[str, float]:
        """One round of minibatches; the means of the loss and its parts over it."""
        updates, tasks = self.args.updates, self.tasks
        streams = [
            task.buffer.batches(self.args.batch_size, updates, self.generator, task.student.device) for task in tasks
        ]
        objectives = [self._objective(task) for task in tasks]
        sums: dict[str, Tensor] = {}
        for update in range(updates):
            share_done = (number * updates + update) / (updates * self.args.rounds)
            self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * (1 - share_done)
            self.optimizer.zero_grad()
            for task, objective, (observations, said) in zip(tasks, objectives, map(next, streams), strict=True):
                outputs = task.student(observations)
                parts = objective(outputs, said, None)
                loss = torch.stack(list(parts.values())).sum()
                loss.backward()
                for name, value in (parts | {"loss": loss} | objective.watch(outputs, said, None)).items():
                    sums[name] = sums.get(name, 0) + value.detach() / (updates * len(tasks))
            self.optimizer.step()
        means = {name: value.item() for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is not finite in round {number + 1} ({means}): try a lower --learning_rate")
        return means

    def _objective(self, task: Task) -> Objective:
        value_weight = self.args.value_weight if task.buffer.values() is not None else 0.0
        student = task.student
        return policy_and_value(self.args.loss, value_weight, student.value_std.item(), student.policy.action_space)

    def _write(self, folder: Path) -> None:
        state = {
            "done_rounds": self.done_rounds,
            "cpu_seconds": self.cpu_seconds,
            "history": self.history,
            "students": self.students.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "actions": [torch.as_tensor(np.stack(task.recorder.actions)) for task in self.tasks],
            "marks": [task.marks for task in self.tasks],
        }
        torch.save(state, folder / STATE)

    def _restore(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.done_rounds, self.cpu_seconds = state["done_rounds"], state["cpu_seconds"]
        self.history = state["history"]
        self.students.load_state_dict(state["students"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for task, actions, marks in zip(self.tasks, state["actions"], state["marks"], strict=True):
            task.marks = marks
            for start, end in pairwise(marks):  # as the rounds went, so that the teacher says the same to the last bit
                task.buffer.append(task.recorder.replay(actions[start:end].numpy()), task.teacher)
