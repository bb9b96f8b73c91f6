"""An environment with its teacher, and how students of that teacher are made."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.playing import Recorder, sampling
from kd.reinforcement_learning.environments.sb3 import training_environments
from kd.reinforcement_learning.environments.vector import Environments, time_limit_warning
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.evaluation import evaluate, random_metrics, random_warning
from kd.reinforcement_learning.student_model.student import StudentNetwork, fold_input, new_student
from kd.reinforcement_learning.teacher_model.agent import MODEL, Agent, PolicyNetwork
from kd.reinforcement_learning.teacher_model.policies import Deterministic
from kd.reinforcement_learning.teacher_model.recipes import TrainingRecipe
from kd.reinforcement_learning.teacher_model.saved_policy import read_model


@dataclass(eq=False)
class Subject:
    """An environment, who teaches on it, and how students of it are made: with PPO's `recipe`, as is the control."""

    environment: str
    teacher: Agent
    network: PolicyNetwork  # the teacher's, at its temperature
    recipe: TrainingRecipe
    student: StudentArguments

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
    def random_metrics(self, episodes: int) -> dict[str, Any]:
        return random_metrics(self.environment, self.teacher.policy.action_space, episodes)

    def warnings(self, episodes: int) -> list[str]:
        """What is to be known of the teacher and its environment before the teacher is used."""
        own = self.entry(episodes)["metrics"]["test"]
        found = [time_limit_warning(self.environment), *self.teacher.warnings]
        found.append(random_warning(self.teacher.name, own, self.random_metrics(episodes)))
        return [warning for warning in found if warning]

    def new_student(self, seed: int, environments: VecEnv | None = None, **keywords: Any) -> PPO:
        """Untrained; of one seed always the same. In its recipe's environments unless others are given."""
        environments = environments or training_environments(self.environment, self.recipe.environments, seed)
        return new_student(environments, self.student, self.recipe, seed, **keywords)

    def load_student(self, name: str, folder: Path, seed: int) -> Agent:
        """The student that a stage has saved."""
        model = self.new_student(seed)
        _, weights = read_model(folder / MODEL)
        try:
            model.policy.load_state_dict(weights)
        except RuntimeError:  # names or shapes of weights
            raise UserError(
                f"{folder / MODEL} is not the student of this run: start over with --overwrite_output_dir"
            ) from None
        return Agent(name, model.policy, model=model)

    def plain_student(self, name: str, trained: PPO, seed: int) -> Agent:
        """What was trained behind VecNormalize, as a student that takes observations as they are."""
        model = self.new_student(seed)
        model.policy.load_state_dict(trained.policy.state_dict())
        statistics = Agent.trained(name, trained).statistics
        if statistics is not None:
            fold_input(model.policy, torch.as_tensor(statistics.mean), torch.as_tensor(statistics.std))
        return Agent(name, model.policy, model=model)

    def prepare(self, model: PPO, num_envs: int, steps: int, seed: int) -> None:
        """Gives a student that is to be trained from reward the bottleneck that a distilled one has: its keys are
        fitted to what the teacher meets in so many steps, unlabelled.
        """
        if self.student.codebooks:
            environments = Environments(self.environment, num_envs, seed)
            driver = sampling(self.network, torch.Generator().manual_seed(seed))
            observations = Recorder(environments).collect(driver, steps)
            environments.close()
            StudentNetwork(model.policy, None).prepare(observations)

    def shared_view(self, seed: int) -> tuple[VecEnv, PolicyNetwork]:
        """For proximal distillation: environments whose observations are normalized by the teacher's statistics, if it
        has any and the student takes them, with the recipe's rewards; and the teacher's network for what they show.
        """
        environments: VecEnv = training_environments(self.environment, self.recipe.environments, seed)
        statistics, network = self.teacher.statistics, self.network
        normalizes = statistics is not None and not self.raw
        if not normalizes and not self.recipe.normalize:
            return environments, network
        gamma = self.recipe.keywords.get("gamma", 0.99)
        normalizer = VecNormalize(environments, norm_obs=normalizes, norm_reward=self.recipe.normalize, gamma=gamma)
        if normalizes and statistics is not None:
            moments = _Frozen(shape=statistics.mean.shape)
            moments.mean, moments.var = statistics.mean, statistics.var
            normalizer.obs_rms = moments  # type: ignore[assignment]
            normalizer.epsilon, normalizer.clip_obs = statistics.epsilon, statistics.clip
            network = PolicyNetwork(self.teacher.policy).to(self.network.device).eval()
            network.temperature = self.network.temperature
        return normalizer, network


class _Frozen(RunningMeanStd):
    def update(self, arr: Any) -> None:
        """Stays what it is."""
