"""Runs of policies: reports by environment, returns during training, and trackers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.logger import KVWriter
from torch import nn

from kd.common.reporting.results import RESULTS
from kd.common.training.run import Run
from kd.common.training.run_folder import REPORT_FILES
from kd.common.training.trackers import Trackers
from kd.reinforcement_learning.data.environment_ids import student_environment
from kd.reinforcement_learning.data.rollouts import VALIDATION_SEED, returns_of
from kd.reinforcement_learning.teacher_model.policies import greedy, memory_of
from kd.reinforcement_learning.teacher_model.recipes import PolicyRunArguments, folder_name


class PolicyRun(Run):
    """A run with a report for each environment; reports for several environments are in subfolders.

    `notes`: what was inferred about the environments, for the report.
    """

    args: PolicyRunArguments
    notes: tuple[str, ...] = ()

    def __init__(self, environments: list[str], args: PolicyRunArguments, *instances: Any) -> None:
        if len(environments) > 1:
            self.reports = tuple(map(folder_name, environments))
            self.last_file = f"{self.reports[-1]}/{RESULTS}"
            self.files = (*Run.files, *(f"{folder}/{name}" for folder in self.reports for name in REPORT_FILES))
        super().__init__(args, *instances)

    def mean_returns(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Mean returns of greedy actions by environment, for the curves. Their time is not part of the stage's."""
        with self.timed("evaluation"):
            return {
                self.curve_name(environment): float(
                    returns_of(greedy(net), environment, self.args.eval_episodes, VALIDATION_SEED, memory_of(net))[
                        0
                    ].mean()
                )
                for environment, net in networks.items()
            }

    def curve_name(self, environment: str) -> str:
        """The name of the mean return in the log of a stage; with the environment, that of the student, if there are
        several.
        """
        several = f"/{folder_name(student_environment(environment))}" if len(self.reports) > 1 else ""
        return f"eval_return_mean{several}"

    @contextmanager
    def trackers(self, stage: str, environment: str | None = None) -> Iterator[Trackers]:
        """The trackers of --report_to for a stage, or for one of several environments of a stage."""
        if environment is not None and len(self.reports) > 1:
            stage = f"{stage}/{folder_name(environment)}"
        trackers = Trackers(self.args.report_to, self.folder, stage)
        try:
            yield trackers
        finally:
            trackers.finish()


class LogWriter(KVWriter):
    """Passes the log of a Stable-Baselines3 model to trackers, with its names: rollout/ep_rew_mean, train/loss, ..."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        shown = {name: value for name, value in key_values.items() if "tensorboard" not in key_excluded[name]}
        self.trackers.log(shown, step)

    def close(self) -> None:
        """Does nothing: the trackers are finished with the stage."""
