"""The teachers of a run: found, or trained here once and kept for every run that wants them."""

from dataclasses import asdict
from pathlib import Path

import torch

from kd.common.training.arguments import RunArguments
from kd.common.training.run import STAGE
from kd.common.training.run_folder import read_recipe
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.playing import greedy
from kd.reinforcement_learning.environments.vector import Environments
from kd.reinforcement_learning.student_model.arguments import ExperimentArguments, TeacherTask, TeacherTraining
from kd.reinforcement_learning.student_model.evaluation import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.student_model.experiment import Experiment, fingerprint, folder_name
from kd.reinforcement_learning.teacher_model.agent import Agent, PolicyNetwork
from kd.reinforcement_learning.teacher_model.policies import QValues, temperature_for_entropy
from kd.reinforcement_learning.teacher_model.sources import find_teacher
from kd.reinforcement_learning.teacher_model.teacher import new_teacher

CALIBRATION_EPISODES = 8


def trained_teacher(task: TeacherTask, training: TeacherTraining, args: RunArguments) -> tuple[Experiment, Agent]:
    """A teacher trained in a run of its own, `args.output_dir` or that of its environment and algorithm."""
    recipe = training.recipe(task.environment)
    args.output_dir = args.output_dir or str(default_folder(task.environment, training))
    model = new_teacher(task.environment, recipe, args.seed)  # refuses what cannot be before the folder is made
    experiment = Experiment(f"{recipe.algorithm} teacher", args, task.watch_episodes, task, training)
    experiment.run.check_inputs(fingerprint(task.environment))

    def build() -> Agent:
        experiment.from_reward("teacher", task.environment, model, recipe.steps)
        return Agent.trained(recipe.algorithm, model)

    return experiment, experiment.run.stage("teacher", build, lambda folder: load_agent(folder, task.environment))


def teacher_of(
    environment: str,
    name: str,
    training: TeacherTraining,
    args: ExperimentArguments,
    vecnormalize: str | None = None,
) -> Agent:
    """The teacher that `name` says, or for `train` the one of the environment's own folder, trained if it is absent.

    Raises UserError where that one was trained with other arguments.
    """
    if name != "train":
        return load_agent(name, environment, args.trust_pickle, vecnormalize)
    folder = default_folder(environment, training)
    if not (folder / "stages" / "teacher" / STAGE).exists():
        task = TeacherTask(environment, args.episodes, args.watch_episodes)
        return trained_teacher(task, training, RunArguments(output_dir=str(folder), resume_from_checkpoint=True))[1]
    _refuse_other_training(folder, training)
    return load_agent(str(folder), environment)


def load_agent(
    name: str,
    environment: str,
    trust_pickle: bool = False,
    vecnormalize: str | None = None,
    flag: str = "--vecnormalize",
) -> Agent:
    """Whatever `find_teacher` finds, for the spaces of an environment; prints which statistics it uses."""
    files = find_teacher(name, environment, vecnormalize, flag)
    if files is None:
        raise UserError(f"{name} stands for a teacher that distill_policy.py trains: name a file or folder here")
    one = Environments(environment, 1)
    one.close()
    agent = Agent.load(files, one.observation_space, one.action_space, trust_pickle)
    print(f"{files.policy}: statistics of observations: {agent.source}")
    return agent


def soft_network(teacher: Agent, environment: str, temperature: float | None, entropy: float) -> PolicyNetwork:
    """The teacher's network at a temperature: the one given or, of a DQN, that at which its actions have `entropy`, a
    share of the greatest possible, on states of its own.
    """
    network = teacher.network()
    if temperature is not None:
        network.temperature = temperature
    elif isinstance(network.network, QValues):
        _, states = returns_of(greedy(network), environment, CALIBRATION_EPISODES, VALIDATION_SEED)
        with torch.no_grad():
            q_values = network(states.to(network.device)).logits
        network.temperature = temperature_for_entropy(q_values, entropy)
    return network


def default_folder(environment: str, training: TeacherTraining) -> Path:
    return Path("runs/reinforcement-learning", f"teacher_{folder_name(environment)}_{training.algorithm}")


def _refuse_other_training(folder: Path, training: TeacherTraining) -> None:
    before = read_recipe(folder)
    for name, value in asdict(training).items():
        if before.get(name) != value:
            raise UserError(
                f"the teacher in {folder} was trained with {name} {before.get(name)}, not {value}: name it with "
                "--teacher, or train another with train_teacher.py and --overwrite_output_dir"
            )
