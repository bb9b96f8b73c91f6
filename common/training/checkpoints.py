"""Checkpoints that are used only if they are complete.

A process can be killed at any point of writing or removing a checkpoint, and files can be damaged. Therefore the
checksums of a checkpoint's files (SHA256SUMS) are written last and removed first, older checkpoints are removed only
when the new one is complete, and training continues from the newest checkpoint whose files match their checksums.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, find_damage, read_checksums, write_checksums, writing_folder

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
NEEDED = {STATE, "scheduler.pt"}  # in any checkpoint; the scheduler is only saved with the optimizer
KEPT = 2  # checkpoints that save_checkpoint keeps: the newest, and one more in case the newest is damaged
Value = TypeVar("Value")


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, in order of their step."""
    paths = (path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in paths if path.is_dir()), key=_step)


def newest_checkpoint(folder: str | Path, problem_in: Callable[[Path], str | None] = find_damage) -> Path | None:
    """The newest checkpoint without a problem, or None. A warning names the problem of each newer checkpoint."""
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = problem_in(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("not continuing from %s: %s", checkpoint.name, problem)
    return None


def save_checkpoint(folder: Path, number: int, write: Callable[[Path], None]) -> None:
    """Calls `write(path)` for `folder/checkpoint-NUMBER`, adds checksums, then removes all but the newest two."""
    path = folder / f"checkpoint-{number}"
    remove_checkpoint(path)  # an existing one is damaged, otherwise training would have continued from it
    with writing_folder(path) as unfinished:
        write(unfinished)
    for old in checkpoints_in(folder)[:-KEPT]:
        remove_checkpoint(old)


def last_checkpoint(folder: str | Path, with_best: bool = False) -> str | None:
    """The newest checkpoint of a Trainer from which training can continue, or None; `with_best` as in `problem_of`."""
    checkpoint = newest_checkpoint(folder, partial(problem_of, with_best=with_best))
    return None if checkpoint is None else str(checkpoint)


def problem_of(checkpoint: Path, with_best: bool = False) -> str | None:
    """The reason why training cannot continue from a checkpoint, or None if it can.

    Args:
        with_best: Training will load the best checkpoint at its end, so the best one so far must be complete too.
    """
    try:
        problem = find_damage(checkpoint)
        if problem is not None:
            return problem
        if not read_checksums(checkpoint).keys() >= NEEDED:  # SHA256SUMS is truncated, or --save_only_model
            return f"{checkpoint} is incomplete: {CHECKSUMS} does not list {' and '.join(sorted(NEEDED))}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    best = best_checkpoint(checkpoint) if with_best else None
    return None if best is None else problem_of(best)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The best checkpoint at the time when this one was written, or None if none had been evaluated."""
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best_global_step"]
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint if it exists, checksums first, so that a partly removed one is not used. Does not follow a
    symbolic link.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes checkpoints until `limit` are left: incomplete ones first, then the oldest. The newest and the best are
    kept.
    """
    kept = {newest.name, Path(best or newest).name}
    others = [path for path in checkpoints_in(newest.parent) if path.name not in kept]
    others.sort(key=lambda path: ((path / CHECKSUMS).exists(), _step(path)))
    for checkpoint in others[: max(len(others) + len(kept) - limit, 0) if limit else 0]:
        remove_checkpoint(checkpoint)


def without_sharing(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones the weights that share memory with an earlier one."""
    first: dict[int, str] = {}
    for name, weight in weights.items():
        first.setdefault(weight.data_ptr(), name)
    return {name: w if first[w.data_ptr()] == name else w.clone() for name, w in weights.items()}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class CheckpointTrainer(Trainer):
    """A Trainer that writes and resumes from such checkpoints. The main process selects them for all processes."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains. `resume_from_checkpoint=True` continues from the last complete checkpoint in the output folder, if
        there is one. Raises UserError if it is the path of an incomplete checkpoint.
        """
        folder, with_best = str(self.args.output_dir), self.args.load_best_model_at_end
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._decide(lambda: last_checkpoint(folder, with_best))
        elif resume_from_checkpoint:
            self._check_complete(Path(resume_from_checkpoint), with_best)
        if resume_from_checkpoint:
            self._warn_of_other_processes(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _decide(self, decide: Callable[[], Value]) -> Value:
        """Calls `decide` in the main process and returns its result in all processes."""
        result = [decide() if self.args.process_index == 0 else None]
        broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def _check_complete(self, checkpoint: Path, with_best: bool = False) -> None:
        problem = self._decide(lambda: problem_of(checkpoint, with_best))
        if problem is not None:
            raise UserError(f"{problem}; --resume_from_checkpoint continues from the last complete checkpoint")

    def _warn_of_other_processes(self, checkpoint: Path) -> None:
        states = len(list(checkpoint.glob("rng_state*.pth")))
        if states != self.args.world_size and self.args.process_index == 0:
            logger.warning(
                "%s was written by %d processes, and %d continue: random numbers, such as dropout's, differ from "
                "those of an uninterrupted run", checkpoint, states, self.args.world_size,
            )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)  # incomplete, from an earlier attempt at this step
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            None,
        )  # the parent would remove checkpoints before the new one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process has written its files
        if self.args.should_save:
            self._save_state_without_path(folder)
            write_checksums(folder)
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _save_state_without_path(self, folder: Path) -> None:
        """Stores the best checkpoint by its step only: its path would be wrong after a move of the output folder."""
        path, step = self.state.best_model_checkpoint, self.state.best_global_step
        self.state.best_model_checkpoint = None
        self.state.best_global_step = _step(Path(path)) if path else None  # the best step may have no checkpoint
        self.state.save_to_json(str(folder / STATE))
        self.state.best_model_checkpoint, self.state.best_global_step = path, step

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        done = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        best = best_checkpoint(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if best is not None and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return done

    def _load_best_model(self) -> None:
        self._check_complete(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()
