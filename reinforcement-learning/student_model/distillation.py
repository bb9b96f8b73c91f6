"""From teachers to students: what is built and trained in one run of distill_policy.py."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from common.utils.errors import UserError
from reinforcement_learning.data.observations import Observations
from reinforcement_learning.data.playing import Recorder, sampling
from reinforcement_learning.environments.sb3 import training_environments
from reinforcement_learning.environments.vector import Environments
from reinforcement_learning.student_model.arguments import StudentArguments
from reinforcement_learning.student_model.distiller import DistillArguments, Distiller, Task
from reinforcement_learning.student_model.evaluation import evaluate, random_return
from reinforcement_learning.student_model.experiment import Agents, Experiment, folder_name
from reinforcement_learning.student_model.ppd import PPD
from reinforcement_learning.student_model.student import StudentNetwork, fold_input, new_student, share_bodies
from reinforcement_learning.teacher_model.agent import MODEL, Agent, PolicyNetwork
from reinforcement_learning.teacher_model.policies import Deterministic
from reinforcement_learning.teacher_model.recipes import TrainingRecipe
from reinforcement_learning.teacher_model.teacher import recipe_environments


@dataclass(eq=False)
class Subject:
    """An environment, who teaches on it, and how students of it are made: with PPO's `recipe`, as is the control."""

    environment: str
    teacher: Agent
    network: PolicyNetwork  # the teacher's, at its temperature
    recipe: TrainingRecipe
    student: StudentArguments

    def __post_init__(self) -> None:
        space = self.teacher.policy.observation_space
        shape = space.shape or ()
        if is_image_space(space) and not self.student.student:
            raise UserError(
                f"{self.environment} shows frames: give --student the width of the layer behind convolutions"
            )
        if self.student.codebooks and len(shape) != 1:
            raise UserError(
                f"a key-value bottleneck looks up vectors, and {self.environment} shows observations of shape "
                f"{shape}: leave out --codebooks"
            )

    @property
    def raw(self) -> bool:
        """Whether students always see observations as they are: a bottleneck standardizes them itself."""
        return self.student.codebooks > 0

    @property
    def deterministic(self) -> bool:
        return isinstance(self.network.network, Deterministic)

    @cache  # noqa: B019 - the few subjects live as long as the program
    def entry(self, episodes: int) -> dict[str, Any]:
        """The teacher's part of results.json, the same for every seed of the students."""
        return evaluate(self.teacher, self.environment, episodes)

    @cache  # noqa: B019
    def random_return(self, episodes: int) -> float:
        return random_return(self.environment, self.teacher.policy.action_space, episodes)

    def new_student(self, seed: int, environments: VecEnv | None = None, **keywords: Any) -> PPO:
        """Untrained; of one seed always the same. In its recipe's environments unless others are given."""
        environments = environments or training_environments(self.environment, self.recipe.environments, seed)
        return new_student(environments, self.student, self.recipe, seed, **keywords)

    def load_student(self, name: str, folder: Path, seed: int) -> Agent:
        """The student that a stage has saved."""
        model = self.new_student(seed)
        _, parameters, _ = load_from_zip_file(folder / MODEL, device=model.device, load_data=False)
        model.policy.load_state_dict(dict(parameters["policy"]))
        return Agent(name, model.policy, model=model)

    def plain_student(self, name: str, trained: PPO, seed: int) -> Agent:
        """What was trained behind VecNormalize, as a student that takes observations as they are."""
        model = self.new_student(seed)
        model.policy.load_state_dict(trained.policy.state_dict())
        statistics = Agent.trained(name, trained).statistics
        if statistics is not None:
            fold_input(model.policy, torch.as_tensor(statistics.mean), torch.as_tensor(statistics.std))
        return Agent(name, model.policy, model=model)


class Distillation:
    """The stages that train students in an experiment. One student per subject; those of several share their body."""

    def __init__(self, experiment: Experiment, subjects: list[Subject], args: DistillArguments) -> None:
        self.experiment, self.subjects, self.args, self.seed = experiment, subjects, args, experiment.seed
        self.steps = args.steps // len(subjects)  # of each environment

    def from_reward(self) -> Agents:
        """The control: the same student, trained by PPO from reward alone, with as many environment steps."""
        name = "PPO from reward"

        def build() -> Agents:
            agents = Agents()
            for subject in self.subjects:
                environments = recipe_environments(
                    subject.environment, subject.recipe, self.seed, norm_obs=not subject.raw
                )
                model = self._prepared(subject, subject.new_student(self.seed, environments))
                self.experiment.from_reward("control", subject.environment, model, self.steps)
                agents[subject.environment] = subject.plain_student(name, model, self.seed)
            return agents

        return self._stage("control", name, build)

    def proximal(self, teacher_weight: float) -> Agents:
        """A student by proximal policy distillation."""
        name = "student (PPD)"

        def build() -> Agents:
            (subject,) = self.subjects
            teacher = subject.network
            if not subject.raw:  # it sees what the student sees: normalized by its own statistics if it has any
                teacher = PolicyNetwork(subject.teacher.policy).to(subject.network.device).eval()
                teacher.temperature = subject.network.temperature
            environments = _taught_environments(subject, self.seed)
            model = subject.new_student(
                self.seed, environments, algorithm=PPD, teacher=teacher, teacher_weight=teacher_weight
            )
            model = self._prepared(subject, model)
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

    def _stage(self, stage: str, name: str, build: Any) -> Agents:
        def load(folder: str) -> Agents:
            agents = Agents()
            for subject in self.subjects:
                own = Path(folder, folder_name(subject.environment))
                agents[subject.environment] = subject.load_student(name, own, self.seed)
            return agents

        return self.experiment.run.stage(stage, build, load)

    def _prepared(self, subject: Subject, model: PPO) -> PPO:
        """A student that is to be trained from reward, with the bottleneck that a distilled one has: its keys are
        fitted to what the teacher meets in the steps of a distillation's first round, unlabelled.
        """
        if subject.student.codebooks:
            environments = Environments(subject.environment, self.args.num_envs, self.seed)
            driver = sampling(subject.network, torch.Generator().manual_seed(self.seed))
            observations = Recorder(environments).collect(driver, self.steps // self.args.rounds)
            environments.close()
            StudentNetwork(model.policy, None).prepare(observations)
        return model

    def _distill(self, stage: str, name: str, args: DistillArguments) -> Agents:
        models = [subject.new_student(self.seed) for subject in self.subjects]
        share_bodies([model.policy for model in models])
        tasks = [self._task(subject, model, args) for subject, model in zip(self.subjects, models, strict=True)]
        distiller = Distiller(tasks, args, self.experiment.checkpoints(stage), self.seed)

        def watch() -> dict[str, float]:
            students: dict[str, nn.Module] = {
                s.environment: task.student for s, task in zip(self.subjects, tasks, strict=True)
            }
            return self.experiment.watched(students)

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


class _Frozen(RunningMeanStd):
    def update(self, arr: Any) -> None:
        """Stays what it is."""


def _taught_environments(subject: Subject, seed: int) -> VecEnv:
    """For proximal distillation: observations as the teacher is used to see them, rewards as the recipe has them."""
    environments: VecEnv = training_environments(subject.environment, subject.recipe.environments, seed)
    statistics = None if subject.raw else subject.teacher.statistics
    if statistics is None and not subject.recipe.normalize:
        return environments
    normalizer = VecNormalize(
        environments,
        norm_obs=statistics is not None,
        norm_reward=subject.recipe.normalize,
        gamma=subject.recipe.keywords.get("gamma", 0.99),
    )
    if statistics is not None:
        moments = _Frozen(shape=statistics.mean.shape)
        moments.mean, moments.var = statistics.mean, statistics.var
        normalizer.obs_rms = moments  # type: ignore[assignment]
        normalizer.epsilon, normalizer.clip_obs = statistics.epsilon, statistics.clip
    return normalizer
