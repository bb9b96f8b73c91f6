"""A run on environments: agents as stages that are kept, and the report at the end."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import gymnasium
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from kd.common.metrics.returns import normalized_return
from kd.common.reporting.model_card import model_card
from kd.common.reporting.results import RESULTS, print_table, write_report
from kd.common.training.arguments import RunArguments
from kd.common.training.run import Run
from kd.common.training.run_folder import REPORT_FILES
from kd.common.utils.files import write_text
from kd.common.utils.folders import writing_folder
from kd.reinforcement_learning.data.playing import greedy
from kd.reinforcement_learning.environments.vector import registering
from kd.reinforcement_learning.student_model.evaluation import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.teacher_model.agent import MODEL, Agent
from kd.reinforcement_learning.teacher_model.training import train

USAGE = """{register}import gymnasium
from stable_baselines3 import PPO

model = PPO.load("{folder}/student.zip")  # one with a bottleneck needs this project
environments = gymnasium.make_vec("{environment}", num_envs=1)
observations, _ = environments.reset(seed=0)
actions, _ = model.predict(observations, deterministic=True)"""


class Agents(dict[str, Agent]):
    """Agents by environment, saved in a folder each."""

    def save_pretrained(self, folder: str | Path) -> None:
        for environment, agent in self.items():
            own = Path(folder, folder_name(environment))
            own.mkdir()
            agent.save_pretrained(own)


class SeveralReports(Run):
    """A run that reports on each of several environments, in a folder of its own inside the run's."""

    def __init__(self, folders: list[str], args: RunArguments, *instances: Any) -> None:
        self.last_file = f"{folders[-1]}/{RESULTS}"
        self.files = (*Run.files, *(f"{folder}/{name}" for folder in folders for name in REPORT_FILES))
        super().__init__(args, *instances)


class Experiment:
    """The stages of one run of `method`; `instances` are the script's other arguments, for the recipe, `folders` those
    of its reports, where it is about several environments.
    """

    def __init__(
        self, method: str, args: RunArguments, watch_episodes: int, *instances: Any, folders: list[str] | None = None
    ) -> None:
        self.method, self.watch_episodes = method, watch_episodes
        self.run = SeveralReports(folders, args, *instances) if folders else Run(args, *instances)
        self.seed = args.seed

    def checkpoints(self, stage: str) -> Path:
        return self.run.folder / "checkpoints" / stage

    def watched(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Mean greedy returns, for curves; the time that it takes is not the stage's."""
        with self.run.timed("evaluation"):
            return {
                curve(environment): float(
                    returns_of(greedy(network), environment, self.watch_episodes, VALIDATION_SEED)[0].mean()
                )
                for environment, network in networks.items()
            }

    def from_reward(self, stage: str, environment: str, model: BaseAlgorithm, steps: int) -> None:
        """Trains a model by its own algorithm, inside a stage."""

        def watch(model: BaseAlgorithm) -> dict[str, float]:
            return self.watched({environment: Agent.trained(stage, model).network()})

        folder = self.checkpoints(stage) / folder_name(environment)
        log = train(model, steps, folder, self.seed, watch, description=f"{stage} {environment}")
        self.run.history[stage] = self.run.history.get(stage, []) + log

    def report(
        self,
        environment: str,
        models: dict[str, dict[str, Any]],
        random: float,
        student_stage: str | None = None,
        folder: Path | None = None,
        work: dict[str, float] | None = None,
    ) -> None:
        """Writes the report of measured models on one environment, the student in a folder of its own, and prints the
        table. `random` is the mean return of actions at random, `student_stage` the stage of the student to save,
        `work` what its training took.
        """
        folder, work = folder or self.run.folder, work or {}
        measured = {role: entry["metrics"]["test"] for role, entry in models.items()}
        best = measured["teacher"]["return_mean"]
        for metrics in measured.values():
            metrics["normalized_return"] = normalized_return(metrics["return_mean"], random, best)
        extra: dict[str, Any] = {"work_of_the_student": work} if work else {}
        extra["teacher_observation_statistics"] = models["teacher"]["observation_statistics"]
        results = self.run.results(
            domain="reinforcement-learning",
            task=environment,
            method=self.method,
            data={
                "train": work.get("observations"),
                "validation": None,
                "test": measured["teacher"]["episodes"],
                "fingerprint": fingerprint(environment),
            },
            models=models,
            split="test",
            metric="return_mean",
            floor=random,
            return_of_random_actions=random,
            selection="the policy after the last update; no evaluation chose anything",
            **extra,
        )
        if student_stage:
            self._save_student(student_stage, folder, environment, results)
        history = {stage: _of(environment, log) for stage, log in self.run.history.items()}
        write_report(folder, results, history, progress="environment_steps")
        print_table(results)
        print(f"report: {folder / 'report.md'}")

    def _save_student(self, stage: str, folder: Path, environment: str, results: dict[str, Any]) -> None:
        with writing_folder(folder / "student") as partial:
            shutil.copy(self.run.folder / "stages" / stage / folder_name(environment) / MODEL, partial / "student.zip")
            usage = USAGE.format(register=registering(environment), folder=folder / "student", environment=environment)
            write_text(partial / "README.md", model_card(results, usage))


def folder_name(environment: str) -> str:
    return environment.replace("/", "-").replace(":", "-")


def curve(environment: str) -> str:
    return f"eval_return_mean {environment}"


def _of(environment: str, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log of one environment, under the names that are plotted."""
    return [entry | {"eval_return_mean": entry[curve(environment)]} for entry in log if curve(environment) in entry]


def fingerprint(environment: str) -> str:
    """Of what is played: the environment's specification and Gymnasium's version."""
    registered = environment.rpartition(":")[2]  # `module:id` names the module that registers the id
    spec = f"{gymnasium.__version__} {gymnasium.spec(registered)}"
    return hashlib.sha256(spec.encode()).hexdigest()[:12]
