"""The stages that train students in one run: control, student and the behaviour cloning baseline."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from kd.common.reporting.results import RESULTS
from kd.common.training.arguments import RunArguments
from kd.common.training.run import Run
from kd.common.training.run_folder import REPORT_FILES
from kd.reinforcement_learning.data.environments import Environments, folder_name
from kd.reinforcement_learning.data.rollouts import Observations, Recorder
from kd.reinforcement_learning.student_model.distiller import DistillArguments, Distiller, Task
from kd.reinforcement_learning.student_model.ppd import PPD, ppd_environments
from kd.reinforcement_learning.student_model.student import StudentNetwork, StudentSpec, share_bodies
from kd.reinforcement_learning.teacher_model.policies import sampling
from kd.reinforcement_learning.teacher_model.teacher import Agent, mean_returns, train_from_reward
from kd.reinforcement_learning.teacher_model.training import recipe_environments


class Agents(dict[str, Agent]):
    """Agents by environment, saved in a folder each."""

    def save_pretrained(self, folder: str | Path) -> None:
        for environment, agent in self.items():
            (path := Path(folder, folder_name(environment))).mkdir()
            agent.save_pretrained(path)


class PolicyRun(Run):
    """A run with a report on each of its environments; for several, each in a folder of the run's."""

    def __init__(self, environments: list[str], args: RunArguments, *instances: Any) -> None:
        if len(environments) > 1:
            self.reports = tuple(map(folder_name, environments))
            self.last_file = f"{self.reports[-1]}/{RESULTS}"
            self.files = (*Run.files, *(f"{folder}/{name}" for folder in self.reports for name in REPORT_FILES))
        super().__init__(args, *instances)


@dataclass(frozen=True)
class Distillation:
    """Trains students as stages of `run`: one per environment; those of several environments share their body.

    Every method returns the finished stage's agents if the run has them.
    """

    run: Run
    specs: list[StudentSpec]
    args: DistillArguments
    eval_episodes: int

    def control(self) -> Agents:
        """The same student, trained by PPO from reward alone, with as many environment steps (rounded up to whole
        rollouts).
        """

        def build(spec: StudentSpec) -> PPO:
            environment, raw = spec.teacher.environment, spec.args.codebooks > 0
            return spec.new(self._seed, recipe_environments(environment, spec.recipe, self._seed, norm_obs=not raw))

        return self._from_reward("control", "PPO from reward", build)

    def ppd_student(self, teacher_weight: float) -> Agents:
        """A student by proximal policy distillation."""

        def build(spec: StudentSpec) -> PPO:
            environments, teacher = ppd_environments(spec, self._seed)
            return spec.new(self._seed, environments, algorithm=PPD, teacher=teacher, teacher_weight=teacher_weight)

        return self._from_reward("student", "student (PPD)", build)

    def student(self) -> Agents:
        """A student by the Distiller."""
        return self._distilled("student", "student", self.args)

    def behaviour_cloning(self) -> Agents:
        """A baseline: the teacher always acts, and its greedy actions are the targets."""
        discrete = all(isinstance(spec.teacher.agent.policy.action_space, spaces.Discrete) for spec in self.specs)
        args = replace(self.args, rollout_policy="teacher", loss="nll" if discrete else "mse", value_weight=0.0)
        return self._distilled("behaviour_cloning", "behaviour cloning", args)

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
                environment = spec.teacher.environment
                agents[environment] = spec.load(name, Path(folder, folder_name(environment)), self._seed)
            return agents

        return self.run.stage(stage, build, load)

    def _from_reward(self, stage: str, name: str, untrained: Callable[[StudentSpec], PPO]) -> Agents:
        def build() -> Agents:
            agents = Agents()
            for spec in self.specs:
                environment, model = spec.teacher.environment, untrained(spec)
                self._fit_bottleneck(spec, model)
                train_from_reward(self.run, stage, environment, model, self._steps, self.eval_episodes)
                statistics = Agent.trained(name, model).statistics
                agents[environment] = spec.with_policy(name, self._seed, model.policy, statistics)
            return agents

        return self._stage(stage, name, build)

    def _fit_bottleneck(self, spec: StudentSpec, model: PPO) -> None:
        """Fits the keys of a bottleneck to the teacher's observations in the first round, as in distillation."""
        if spec.args.codebooks:
            rollout_policy = sampling(spec.teacher.network, torch.Generator().manual_seed(self._seed))
            with closing(Environments(spec.teacher.environment, self.args.num_envs, self._seed)) as environments:
                observations = Recorder(environments).collect(rollout_policy, self._steps // self.args.rounds)
            StudentNetwork(model.policy, None).prepare(observations)

    def _distilled(self, stage: str, name: str, args: DistillArguments) -> Agents:
        def build() -> Agents:
            models = [spec.new(self._seed) for spec in self.specs]
            share_bodies([model.policy for model in models])
            tasks = {
                spec.teacher.environment: self._task(spec, model)
                for spec, model in zip(self.specs, models, strict=True)
            }
            networks: dict[str, nn.Module] = {environment: task.student for environment, task in tasks.items()}

            def evaluate() -> dict[str, float]:
                return mean_returns(self.run, networks, self.eval_episodes)

            distiller = Distiller(list(tasks.values()), args, self.run.folder / "checkpoints" / stage, self._seed)
            self.run.history[stage] = distiller.learn(evaluate, description=stage)
            agents = Agents()
            for spec, (environment, task) in zip(self.specs, tasks.items(), strict=True):
                task.recorder.environments.close()
                agents[environment] = spec.with_policy(name, self._seed, task.student.folded_policy())
            return agents

        return self._stage(stage, name, build)

    def _task(self, spec: StudentSpec, model: PPO) -> Task:
        environments = Environments(spec.teacher.environment, self.args.num_envs, self._seed)
        space = environments.observation_space
        dtype = torch.uint8 if space.dtype == "uint8" else torch.float32
        rows = min(self.args.buffer_size, self._steps + self.args.num_envs * self.args.rounds)
        return Task(
            Recorder(environments),
            spec.teacher.network,
            StudentNetwork(model.policy, spec.teacher.agent.statistics).to(model.device),
            Observations(rows, space.shape or (), dtype),
        )
