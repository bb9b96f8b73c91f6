"""From teachers to students: the stages that train them in one run of distill_policy.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from kd.reinforcement_learning.data.observations import Observations
from kd.reinforcement_learning.data.playing import Recorder
from kd.reinforcement_learning.environments.vector import Environments
from kd.reinforcement_learning.student_model.distiller import DistillArguments, Distiller, Task
from kd.reinforcement_learning.student_model.experiment import Agents, Experiment, folder_name
from kd.reinforcement_learning.student_model.ppd import PPD
from kd.reinforcement_learning.student_model.student import StudentNetwork, share_bodies
from kd.reinforcement_learning.student_model.subject import Subject
from kd.reinforcement_learning.teacher_model.agent import Agent
from kd.reinforcement_learning.teacher_model.teacher import recipe_environments


class Distillation:
    """The stages that train students in an experiment. One student per subject; those of several share their body."""

    def __init__(self, experiment: Experiment, subjects: list[Subject], args: DistillArguments) -> None:
        self.experiment, self.subjects, self.args, self.seed = experiment, subjects, args, experiment.seed
        self.steps = args.steps // len(subjects)  # of each environment

    def from_reward(self) -> Agents:
        """The control: the same student, trained by PPO from reward alone, with as many environment steps (rounded up
        to whole rollouts).
        """
        name = "PPO from reward"

        def build() -> Agents:
            agents = Agents()
            for subject in self.subjects:
                environments = recipe_environments(
                    subject.environment, subject.recipe, self.seed, norm_obs=not subject.raw
                )
                model = subject.new_student(self.seed, environments)
                subject.prepare(model, self.args.num_envs, self.steps // self.args.rounds, self.seed)
                self.experiment.from_reward("control", subject.environment, model, self.steps)
                agents[subject.environment] = subject.plain_student(name, model, self.seed)
            return agents

        return self._stage("control", name, build)

    def proximal(self, teacher_weight: float) -> Agents:
        """A student by proximal policy distillation."""
        name = "student (PPD)"

        def build() -> Agents:
            (subject,) = self.subjects
            environments, teacher = subject.shared_view(self.seed)
            model = subject.new_student(
                self.seed, environments, algorithm=PPD, teacher=teacher, teacher_weight=teacher_weight
            )
            subject.prepare(model, self.args.num_envs, self.steps // self.args.rounds, self.seed)
            self.experiment.from_reward("student", subject.environment, model, self.steps)
            return Agents({subject.environment: subject.plain_student(name, model, self.seed)})

        return self._stage("student", name, build)

    def distilled(self) -> Agents:
        """The student, by the distiller."""
        return self._stage("student", "student", lambda: self._distill("student", "student", self.args))

    def behaviour_cloning(self) -> Agents:
        """A baseline: the teacher drives throughout, and only its greedy action is kept."""
        discrete = all(isinstance(s.teacher.policy.action_space, spaces.Discrete) for s in self.subjects)
        args = replace(self.args, driver="teacher", loss="nll" if discrete else "mse", value_weight=0.0)
        stage, name = "behaviour_cloning", "behaviour cloning"
        return self._stage(stage, name, lambda: self._distill(stage, name, args))

    def work(self, stage: str) -> dict[str, float]:
        """What a stage took: environment steps and, of the distiller, observations and processor time."""
        last = self.experiment.run.history[stage][-1]
        return {name: last[name] for name in ("environment_steps", "observations", "cpu_seconds") if name in last}

    def _stage(self, stage: str, name: str, build: Callable[[], Agents]) -> Agents:
        def load(folder: str) -> Agents:
            agents = Agents()
            for subject in self.subjects:
                own = Path(folder, folder_name(subject.environment))
                agents[subject.environment] = subject.load_student(name, own, self.seed)
            return agents

        return self.experiment.run.stage(stage, build, load)

    def _distill(self, stage: str, name: str, args: DistillArguments) -> Agents:
        models = [subject.new_student(self.seed) for subject in self.subjects]
        share_bodies([model.policy for model in models])
        tasks = [self._task(subject, model, args) for subject, model in zip(self.subjects, models, strict=True)]
        distiller = Distiller(tasks, args, self.experiment.checkpoints(stage), self.seed)

        def watch() -> dict[str, float]:
            pairs = zip(self.subjects, tasks, strict=True)
            return self.experiment.watched({subject.environment: task.student for subject, task in pairs})

        self.experiment.run.history[stage] = distiller.learn(watch, description=stage)
        for task in tasks:
            task.recorder.environments.close()
        return Agents({
            subject.environment: _with_policy(name, model, task.student.folded_policy())
            for subject, task, model in zip(self.subjects, tasks, models, strict=True)
        })  # fmt: skip

    def _task(self, subject: Subject, model: PPO, args: DistillArguments) -> Task:
        environments = Environments(subject.environment, args.num_envs, self.seed)
        space = environments.observation_space
        kept = torch.uint8 if space.dtype == "uint8" else torch.float32
        rows = min(args.buffer_size, self.steps + args.num_envs * args.rounds)
        return Task(
            Recorder(environments),
            subject.network,
            StudentNetwork(model.policy, subject.teacher.statistics).to(model.device),
            Observations(rows, space.shape or (), kept),
        )


def _with_policy(name: str, model: PPO, policy: ActorCriticPolicy) -> Agent:
    model.policy.load_state_dict(policy.state_dict())
    return Agent(name, model.policy, model=model)
