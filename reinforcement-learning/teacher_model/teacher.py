"""The teachers of a run: loaded from files, or trained once and kept for every run that needs them."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kd.common.outputs import EnsembleTeacher
from kd.common.training.arguments import RunArguments
from kd.common.training.run import STAGE, Run
from kd.common.training.run_folder import read_recipe
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count
from kd.reinforcement_learning.data.environments import Environments, fingerprint, folder_name
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.teacher_model.agent import Agent, PolicyNetwork
from kd.reinforcement_learning.teacher_model.files import find_teacher
from kd.reinforcement_learning.teacher_model.policies import QValues, greedy, temperature_for_entropy
from kd.reinforcement_learning.teacher_model.recipes import TrainingRecipe, training_recipe
from kd.reinforcement_learning.teacher_model.training import new_teacher, train_from_reward

CALIBRATION_EPISODES = 8


@dataclass
class TeacherArguments:
    """How a teacher is trained. Raises ValueError, one line, for hyper-parameters that are invalid."""

    algorithm: Literal["ppo", "dqn", "sac"] = field(
        default="ppo", metadata={"help": "Algorithm of a teacher that is trained."}
    )
    teacher_steps: Count | None = field(
        default=None, metadata={"help": "Environment steps of its training (default: those of hyperparameters.yaml)."}
    )
    hyperparameters: str | None = field(
        default=None,
        metadata={"help": "JSON that replaces values of hyperparameters.yaml, such as '{\"gamma\": 0.99}'."},
    )

    def __post_init__(self) -> None:
        self.recipe("CartPole-v1")  # raises for malformed values

    def recipe(self, environment: str) -> TrainingRecipe:
        changes: Any = {} if self.hyperparameters is None else json.loads(self.hyperparameters)
        if not isinstance(changes, dict):
            raise ValueError(f"--hyperparameters must be a JSON object, such as '{{\"gamma\": 0.99}}', got {changes}")
        if self.teacher_steps is not None:
            changes["steps"] = self.teacher_steps
        return training_recipe(self.algorithm, environment, changes)

    def folder(self, environment: str) -> Path:
        """Where a teacher is kept unless --output_dir of train_teacher.py is another folder."""
        return Path("runs/reinforcement-learning", f"teacher_{folder_name(environment)}_{self.algorithm}")


@dataclass
class TeacherTask:
    """Where a teacher is trained and evaluated."""

    environment: str = field(default="CartPole-v1", metadata={"help": "Id of a Gymnasium environment."})
    episodes: Count = field(default=100, metadata={"help": "Episodes of the evaluation at the end."})
    eval_episodes: Count = field(default=10, metadata={"help": "Episodes of each evaluation for the curves."})


@dataclass(frozen=True)
class Teacher:
    """The policy that students of one environment learn from. `network` returns its outputs at its temperature; with
    `more_agents` the average of the outputs of all agents, each at its own temperature and with its own statistics.
    Students standardize observations with the statistics of `agent`.
    """

    environment: str
    agent: Agent
    network: PolicyNetwork | EnsembleTeacher
    more_agents: tuple[Agent, ...] = ()

    @property
    def agents(self) -> tuple[Agent, ...]:
        return (self.agent, *self.more_agents)


def load_or_train_teacher(
    name: str, task: TeacherTask, training: TeacherArguments, vecnormalize: str | None, trust_pickle: bool
) -> Agent:
    """The teacher that `find_teacher` finds or, for `train`, the one in the environment's folder, which is trained if
    it does not exist.

    Raises UserError where that one was trained with other arguments.
    """
    if name != "train":
        return load_agent(name, task.environment, trust_pickle, vecnormalize)
    folder = training.folder(task.environment)
    if (folder / "stages" / "teacher" / STAGE).exists():
        _refuse_other_training(folder, training)
        return load_agent(str(folder), task.environment)
    args = RunArguments(output_dir=str(folder), resume_from_checkpoint=True)
    model = new_teacher(task.environment, training.recipe(task.environment), args.seed)
    return train_teacher(Run(args, task, training), model, task, training)


def train_teacher(run: Run, model: BaseAlgorithm, task: TeacherTask, training: TeacherArguments) -> Agent:
    """Trains `model`, a new teacher, as the stage `teacher` of a run, or loads the finished stage."""
    recipe = training.recipe(task.environment)
    run.check_inputs(fingerprint(task.environment))

    def build() -> Agent:
        train_from_reward(run, "teacher", task.environment, model, recipe.steps, task.eval_episodes)
        return Agent.trained(recipe.algorithm, model)

    return run.stage("teacher", build, lambda folder: load_agent(folder, task.environment))


def _refuse_other_training(folder: Path, training: TeacherArguments) -> None:
    before = read_recipe(folder)
    for name, value in asdict(training).items():
        if before.get(name) != value:
            raise UserError(
                f"the teacher in {folder} was trained with {name} {before.get(name)}, not {value}: name it with "
                "--teacher, or train another with train_teacher.py and --overwrite_output_dir"
            )


def load_agent(
    name: str,
    environment: str,
    trust_pickle: bool = False,
    vecnormalize: str | None = None,
    flag: str = "--vecnormalize",
) -> Agent:
    """The policy in the files that `find_teacher` finds, for an environment; prints which statistics it uses."""
    files = find_teacher(name, environment, vecnormalize, flag)
    if files is None:
        raise UserError(f"{name} means a teacher that distill_policy.py trains: pass a file or folder")
    with closing(Environments(environment, 1)) as shown:
        agent = Agent.load(files, shown.observation_space, shown.action_space, trust_pickle)
    print(f"{files.policy}: statistics of observations: {agent.source}")
    return agent


def average_policies(networks: Sequence[PolicyNetwork]) -> EnsembleTeacher:
    """Several policies as one. For discrete actions the mean of their logits at their temperatures: the geometric mean
    of their distributions, normalized. For Box actions the mean of `mean` and of `log_std`; with a deterministic
    policy among them, which has no `log_std`, the average is deterministic. The values are averaged in the units in
    which each policy was trained.
    """
    return EnsembleTeacher(networks, features=("mean", "log_std", "value")).eval()


def soft_network(agent: Agent, environment: str, temperature: float | None, entropy: float) -> PolicyNetwork:
    """The network of a teacher at `temperature` or, for a DQN without one, at the temperature where the mean entropy
    of its actions in its states is `entropy` times the maximum.
    """
    network = agent.network()
    if temperature is not None:
        network.temperature = temperature
    elif isinstance(network.network, QValues):
        _, states = returns_of(greedy(network), environment, CALIBRATION_EPISODES, VALIDATION_SEED)
        with torch.no_grad():
            q_values = network(states.to(network.device)).logits
        network.temperature = temperature_for_entropy(q_values, entropy)
    return network
