"""Trackers of trainings without transformers' Trainer: TensorBoard and Weights & Biases, by Accelerate.

The names of the values are those of the Trainer: `train/loss`, `eval/accuracy`. This module does not import torch, so
that `--help` is fast.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

NAMES = ("tensorboard", "wandb")
GROUP = "WANDB_RUN_GROUP"  # the environment variable


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed, and for `none` next to others."""
    installed = [name for name in NAMES if find_spec(name)]
    for name in names:
        if name not in (*installed, "none"):
            raise ValueError(
                f"--report_to {name} is unknown or not installed: choose none, or from {', '.join(installed)}"
            )
    if "none" in names and len(names) > 1:
        raise ValueError("--report_to none excludes all trackers: leave out none or the others")


class Trackers:
    """The trackers `names` of a stage of a run. TensorBoard writes to `folder/tensorboard/stage`; W&B has one run per
    stage, grouped by the folder, in the project WANDB_PROJECT.
    """

    def __init__(self, names: Sequence[str] = (), folder: Path = Path(), stage: str = "") -> None:
        self.trackers: list[GeneralTracker] = []
        if "tensorboard" in names:
            from accelerate.tracking import TensorBoardTracker

            self.trackers.append(TensorBoardTracker(stage, folder / "tensorboard"))
        if "wandb" in names:
            from accelerate.tracking import WandBTracker

            project = os.environ.get("WANDB_PROJECT", "huggingface")  # as in transformers
            self.trackers.append(WandBTracker(project, name=f"{folder}/{stage}", group=_group(folder), reinit=True))
        for tracker in self.trackers:
            tracker.start()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs the numbers among `values`."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, Real)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


@contextmanager
def wandb_run(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Groups the W&B run that transformers' Trainer starts inside by the folder, and finishes it. Does nothing unless
    `names` include wandb.
    """
    if "wandb" not in names:
        yield
        return
    before = os.environ.get(GROUP)
    os.environ[GROUP] = _group(folder)
    try:
        yield
    finally:
        import_module("wandb").finish()
        if before is None:
            del os.environ[GROUP]


def _group(folder: Path) -> str:
    return os.environ.get(GROUP, str(folder))


def tracked(log: Mapping[str, Any]) -> dict[str, Any]:
    """A log with the names of the Trainer: `loss` becomes `train/loss`, `eval_NAME` becomes `eval/NAME`."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in log.items()
    }
