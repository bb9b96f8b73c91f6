"""Teachers: agents that are loaded from files, or trained from reward once and reused by later runs."""

import math
from collections.abc import Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.td3.policies import TD3Policy

from kd.common.outputs import EnsembleTeacher
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights, non_finite_tensor
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.teacher_model.files import TeacherFiles, box_statistics, find_teacher, read_statistics
from kd.reinforcement_learning.teacher_model.networks import DirectPolicy
from kd.reinforcement_learning.teacher_model.policies import (
    UNSCALED,
    ObservationStatistics,
    PolicyNetwork,
    greedy,
    temperature_for_entropy,
)
from kd.reinforcement_learning.teacher_model.recipes import TeacherArguments, folder_name
from kd.reinforcement_learning.teacher_model.recurrent import RecurrentPolicy
from kd.reinforcement_learning.teacher_model.run import LogWriter, PolicyRun
from kd.reinforcement_learning.teacher_model.saved_policy import load_policy, trained_with_vec_normalize
from kd.reinforcement_learning.teacher_model.training import train

MODEL, STATISTICS = "model.zip", "vecnormalize.pkl"
CALIBRATION_EPISODES = 8


# ---- agents ----


@dataclass
class Agent:
    """A policy of Stable-Baselines3 with the statistics of its observations: a teacher, control or student.

    `model`: the algorithm of the policy; None if only the policy was loaded. `source`: origin of the statistics, for
    the report. `warnings`: possible problems of a loaded policy. `columns`: those that the policy uses of observations
    that are a teacher's and a student's; None for its observations alone.
    """

    name: str
    policy: BasePolicy
    statistics: ObservationStatistics | None = None
    model: BaseAlgorithm | None = None
    source: str = "none"
    warnings: tuple[str, ...] = ()
    columns: slice | None = None

    @classmethod
    def load(
        cls,
        files: TeacherFiles,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        trust_pickle: bool = False,
    ) -> "Agent":
        """Loads a policy and its statistics, for the Box of the observations of an environment. Raises UserError for
        damaged files, and for a policy of other spaces.
        """
        algorithm, policy = load_policy(files.policy, observation_space, action_space, trust_pickle)
        if is_image_space(policy.observation_space):
            policy.to(best_device())  # smaller networks are faster on the CPU
        if (weight := non_finite_tensor(policy)) is not None:
            raise UserError(f"{files.policy} has weights that are not finite ({weight}): its training diverged")
        name, warnings = f"{algorithm} {files.policy.stem}", files.warnings
        if files.statistics is None:
            if not files.raw and trained_with_vec_normalize(files.policy):
                warnings += (
                    f"{files.policy} was trained with VecNormalize, but no statistics were found: observations are "
                    "not normalized. This is correct if VecNormalize normalized only rewards; otherwise pass "
                    "--vecnormalize",
                )
            return cls(name, policy, warnings=warnings)
        saved, source = read_statistics(files.statistics), str(files.statistics)
        if saved is None:
            source += " (does not normalize observations)"
        statistics = None if saved is None else box_statistics(saved, observation_space, files.statistics)
        return cls(name, policy, statistics, source=source, warnings=warnings)

    @classmethod
    def trained(cls, name: str, model: BaseAlgorithm) -> "Agent":
        """The agent of a model that this process trained, with the statistics of its VecNormalize, if any."""
        normalizer = model.get_vec_normalize_env()
        if normalizer is None or not normalizer.norm_obs:
            return cls(name, model.policy, model=model)
        moments: Any = normalizer.obs_rms
        statistics = ObservationStatistics(moments.mean, moments.var, normalizer.epsilon, normalizer.clip_obs)
        return cls(name, model.policy, statistics, model, "VecNormalize of its training")

    @property
    def deterministic(self) -> bool:
        """Whether the policy has no distribution of Box actions, as in TD3, DDPG and ARS."""
        return isinstance(self.policy, TD3Policy | DirectPolicy) and isinstance(self.policy.action_space, spaces.Box)

    @property
    def recurrent(self) -> bool:
        return isinstance(self.policy, RecurrentPolicy)

    def network(self) -> PolicyNetwork:
        """The network of the policy, which shares its weights, in eval mode on its device."""
        return PolicyNetwork(self.policy, self.statistics, self.columns).to(self.policy.device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.zip, as Stable-Baselines3 saves it, and vecnormalize.pkl. A model with statistics is saved for
        the Box to which they belong, any other for the observations of its environment.
        """
        assert self.model is not None, "only a whole model can be saved"
        check_finite_weights(self.policy, when=f"at the end of the training of {self.name}")
        model = _for_original_observations(self.model) if self.statistics is None else self.model
        model.save(Path(folder, MODEL))
        if self.statistics is not None:
            normalizer = self.model.get_vec_normalize_env()
            assert normalizer is not None
            normalizer.save(str(Path(folder, STATISTICS)))


def columns_of_both(teacher: Agent) -> tuple[slice, slice]:
    """The columns of a teacher and of its student in observations that are those of both."""
    size = math.prod(teacher.policy.observation_space.shape or ())
    return slice(0, size), slice(size, None)


def _for_original_observations(model: BaseAlgorithm) -> BaseAlgorithm:
    """A copy that is saved as a model of the environment's observations. Its policy has the same weights, because
    Stable-Baselines3 converts vectors without weights. It converts frames with the channels last itself.
    """
    environments = model.get_env()
    unwrapped = None if environments is None else environments.unwrapped
    if not isinstance(unwrapped, SB3Environments) or isinstance(unwrapped.environments.original_space, spaces.Box):
        return model
    model = copy(model)
    model.observation_space = unwrapped.environments.original_space
    if isinstance(model.observation_space, spaces.Dict):
        model.policy_class = model.policy_aliases["MultiInputPolicy"]
        for buffer in {"rollout_buffer_class", "replay_buffer_class"} & vars(model).keys():
            setattr(model, buffer, None)  # the default for the observations
    return model


def load_agent(
    name: str,
    environment: str,
    trust_pickle: bool = False,
    vecnormalize: str | None = None,
    flag: str = "--vecnormalize",
) -> Agent:
    """Loads the policy that `find_teacher` finds, and prints which statistics of observations it uses."""
    files = find_teacher(name, environment, vecnormalize, flag)
    if files is None:
        raise UserError(f"only --teacher of distill_policy.py accepts {name}: pass a file or folder")
    with closing(Environments(environment, 1)) as environments:
        agent = Agent.load(files, environments.original_space, environments.action_space, trust_pickle)
        if agent.name.startswith("maskable") and environments.has_action_masks:
            raise UserError(
                f"{files.policy} was trained by MaskablePPO with the action masks of {environment}, which are not "
                "applied here: pass a teacher that needs no masks, such as one of PPO"
            )
    print(f"{files.policy}: statistics of observations: {agent.source}")
    return agent


# ---- training from reward ----


class Agents(dict[str, Agent]):
    """Agents by environment, each saved in a subfolder."""

    def save_pretrained(self, folder: str | Path) -> None:
        for environment, agent in self.items():
            (path := Path(folder, folder_name(environment))).mkdir()
            agent.save_pretrained(path)


def train_teachers(run: PolicyRun, models: dict[str, BaseAlgorithm], training: TeacherArguments) -> Agents:
    """Trains new teachers, by environment, as the stage `teacher` of a run, or loads the finished stage."""

    def build() -> Agents:
        for environment, model in models.items():
            train_from_reward(run, "teacher", environment, model, training.recipe(environment).steps)
        return Agents({name: Agent.trained(training.algorithm, model) for name, model in models.items()})

    def load(folder: str) -> Agents:
        paths = {environment: str(Path(folder, folder_name(environment))) for environment in models}
        return Agents({name: replace(load_agent(path, name), name=training.algorithm) for name, path in paths.items()})

    return run.stage("teacher", build, load) if models else Agents()


def train_from_reward(run: PolicyRun, stage: str, environment: str, model: BaseAlgorithm, steps: int) -> None:
    """Trains a model by its algorithm inside a stage of `run`, and adds its log to the history of the stage."""

    def evaluate(model: BaseAlgorithm) -> dict[str, float]:
        return run.mean_returns({environment: Agent.trained(stage, model).network()})

    folder = run.folder / "checkpoints" / stage / folder_name(environment)
    with run.trackers(stage, environment) as trackers:
        model.set_logger(Logger(folder=None, output_formats=[LogWriter(trackers)]))
        log = train(model, steps, folder, run.args.seed, evaluate, f"{stage} {environment}", trackers)
    run.history[stage] = run.history.get(stage, []) + log


# ---- the teacher of a student ----


@dataclass(frozen=True)
class Teacher:
    """The teacher of one environment. The outputs of `network` are the students' targets: those of the agent at its
    temperature or, for several agents, their average, each at its temperature and with its statistics.

    `shared`: the environment in which teacher and student are compared. It differs from `environment` if the student
    observes otherwise: its observations are then those of both (see `environment_ids.of_both`).
    """

    environment: str
    agents: tuple[Agent, ...]
    network: PolicyNetwork | EnsembleTeacher
    shared: str

    @property
    def agent(self) -> Agent:
        """The first agent, whose statistics standardize the observations of students."""
        return self.agents[0]


def average_policies(networks: Sequence[PolicyNetwork], weights: Sequence[float] | None = None) -> EnsembleTeacher:
    """Averages policies. For discrete actions it averages the logits at their temperatures, which is the normalized
    geometric mean of the distributions; for Box actions it averages `mean` and `log_std`. With a deterministic policy,
    which has no `log_std`, the average is deterministic. Values keep the units in which each policy was trained.
    `weights`: one per policy (default: equal).
    """
    return EnsembleTeacher(networks, features=("mean", "log_std", "value"), weights=weights).eval()


def soft_network(agent: Agent, environment: str, temperature: float | None, entropy: float) -> PolicyNetwork:
    """The network of an agent at `temperature`. If it is None, a DQN, QR-DQN or ARS has the temperature at which the
    mean entropy of its actions, in the states of its greedy policy, is `entropy` times the maximum.
    """
    network = agent.network()
    if temperature is not None:
        network.temperature = temperature
    elif isinstance(network.network, UNSCALED) and not agent.deterministic:
        _, states = returns_of(greedy(network), environment, CALIBRATION_EPISODES, VALIDATION_SEED)
        with torch.no_grad():
            scores = network(states.to(network.device)).logits
        network.temperature = temperature_for_entropy(scores, entropy)
    return network
