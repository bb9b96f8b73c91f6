"""Policy distillation as a plain loop: collect observations, run the teacher once on each, fit the student.

Rounds of collecting and fitting over all that has been collected (DAgger, arXiv:1011.0686), with the teacher's action
distribution as target (Rusu et al., arXiv:1511.06295). The rollout policy acts while observations are
collected: the teacher, the student, the teacher in the first round and then the student (dagger), or a mixture whose
share of the teacher falls from 1 to 0 (mixed).
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
from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights
from kd.common.utils.ranges import Count, NotNegative, Positive
from kd.reinforcement_learning.data.rollouts import Act, Observations, Recorder, mixture
from kd.reinforcement_learning.student_model.matching import Loss, policy_and_value
from kd.reinforcement_learning.student_model.student import StudentNetwork
from kd.reinforcement_learning.teacher_model.policies import sampling

STATE = "state.pt"  # of a checkpoint
RolloutPolicy = Literal["teacher", "student", "dagger", "mixed"]
Evaluate = Callable[[], dict[str, float]]


@dataclass
class DistillArguments:
    """How a student is distilled."""

    rollout_policy: RolloutPolicy = field(
        default="dagger", metadata={"help": "Policy that acts while observations are collected."}
    )
    loss: Loss = field(default="kl", metadata={"help": "Loss between the action distributions."})
    steps: Count = field(default=20_000, metadata={"help": "Environment steps in total."})
    rounds: Count = field(default=10, metadata={"help": "Rounds of collecting and fitting."})
    updates: Count = field(default=200, metadata={"help": "Minibatches per round."})
    batch_size: Count = field(default=256, metadata={"help": "Observations per minibatch."})
    learning_rate: Positive = field(
        default=3e-3, metadata={"help": "Initial learning rate of Adam; it falls linearly to 0."}
    )
    value_weight: NotNegative = field(default=0.5, metadata={"help": "Weight of the loss between the values."})
    num_envs: Count = field(default=8, metadata={"help": "Environments that are stepped in parallel."})
    buffer_size: Count = field(default=1_000_000, metadata={"help": "Observations kept; the oldest are dropped."})


@dataclass
class Task:
    """The distillation in one environment."""

    recorder: Recorder
    teacher: nn.Module
    student: StudentNetwork
    buffer: Observations
    marks: list[int] = field(default_factory=lambda: [0])  # recorded steps at the end of each round


class Distiller:
    """Distills one task, or several whose students share layers, one minibatch of each per update.

    Checkpoints in `folder` hold the weights, the optimizer, the random state and the recorded actions, from which
    environments and buffers are restored: a killed distillation continues and ends as if never killed.
    """

    def __init__(self, tasks: list[Task], args: DistillArguments, folder: Path, seed: int) -> None:
        self.tasks, self.args, self.folder = tasks, args, folder
        self.generator = torch.Generator().manual_seed(seed)
        self.students = nn.ModuleList(task.student for task in tasks)
        self.optimizer = torch.optim.Adam(self.students.parameters(), lr=args.learning_rate, fused=True)
        self.cpu_seconds, self.history = 0.0, list[dict[str, Any]]()

    def learn(self, evaluate: Evaluate, description: str = "") -> list[dict[str, Any]]:
        """Runs the remaining rounds; the log has an entry per round: means of the losses and `evaluate()`."""
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
            self.history.append({"environment_steps": self._steps(number + 1)} | work | means | evaluate())
            save_checkpoint(self.folder, number + 1, self._write)
        return self.history

    def _steps(self, rounds: int) -> int:
        """Environment steps of all tasks at the end of so many rounds."""
        return self.args.steps * rounds // self.args.rounds

    def _collect(self, task: Task, number: int) -> None:
        """Adds the observations of a round, with the teacher's outputs, to the buffer of a task."""
        steps = (self._steps(number + 1) - self._steps(number)) // len(self.tasks)
        observations = task.recorder.collect(self._rollout_policy(task, number), steps)
        if number == 0:
            task.student.prepare(observations)
        task.buffer.append(observations, task.teacher)
        task.marks.append(len(task.recorder.actions))
        values = task.buffer.values()
        if values is not None:
            task.student.set_value_scale(values, preserve=number > 0)

    def _rollout_policy(self, task: Task, number: int) -> Act:
        teacher, student = sampling(task.teacher, self.generator), sampling(task.student, self.generator)
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
        """The minibatches of a round; the means of the loss and its terms."""
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
                for name, value in (parts | {"loss": loss} | objective.watch(student, teacher, None)).items():
                    sums[name] = sums.get(name, 0) + value.detach() / (updates * len(tasks))
            self.optimizer.step()
        means = {name: value.item() for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is not finite in round {number + 1} ({means}): try a lower --learning_rate")
        return means

    def _objective(self, task: Task) -> Objective:
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
            "marks": [task.marks for task in self.tasks],
        }
        torch.save(state, folder / STATE)

    def _restore(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.cpu_seconds, self.history = state["cpu_seconds"], state["history"]
        self.students.load_state_dict(state["students"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for task, actions, marks in zip(self.tasks, state["actions"], state["marks"], strict=True):
            task.marks = marks
            for start, end in pairwise(marks):  # round by round, for teacher outputs that are equal to the last bit
                task.buffer.append(task.recorder.replay(actions[start:end].numpy()), task.teacher)
