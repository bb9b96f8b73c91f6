"""Checkpoints that count only while they are whole.

A process can be killed at any point of writing a checkpoint, and of removing one; disks damage files. So the checksums
of all of a checkpoint's files (SHA256SUMS) are written last and removed first, older checkpoints are removed only once
the new one is complete, and nothing is read back that does not match its checksum: training continues from the newest
checkpoint that does.
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
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, find_damage, read_checksums, write_checksums, writing_folder

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
NEEDED = {STATE, "scheduler.pt"}  # whatever else a checkpoint holds; the scheduler stands for the optimizer
KEPT = 2  # by save_checkpoint: the newest and, in case that is damaged, the one before
Answer = TypeVar("Answer")


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, by their step."""
    found = (path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in found if path.is_dir()), key=_step)


def newest_checkpoint(folder: str | Path, problem_in: Callable[[Path], str | None] = find_damage) -> Path | None:
    """The newest checkpoint in a folder without a problem, or None. A warning names the problem of each newer one."""
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = problem_in(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("not continuing from %s: %s", checkpoint.name, problem)
    return None


def save_checkpoint(folder: Path, number: int, write: Callable[[Path], None]) -> None:
    """Writes `folder/checkpoint-NUMBER` by `write(path)`, with checksums, then removes all but the newest two."""
    path = folder / f"checkpoint-{number}"
    remove_checkpoint(path)  # damaged, or training would have continued from it
    with writing_folder(path) as unfinished:
        write(unfinished)
    for old in checkpoints_in(folder)[:-KEPT]:
        remove_checkpoint(old)


def last_checkpoint(folder: str | Path, with_best: bool = False) -> str | None:
    """The newest checkpoint of a Trainer from which training can continue, or None; `with_best` as of `problem_of`."""
    checkpoint = newest_checkpoint(folder, partial(problem_of, with_best=with_best))
    return None if checkpoint is None else str(checkpoint)


def problem_of(checkpoint: Path, with_best: bool = False) -> str | None:
    """Why training cannot continue from a checkpoint, in words, or None where it can.

    `with_best`: training will end with the weights of the best checkpoint, so what was the best one by then must be
    whole too.
    """
    try:
        problem = find_damage(checkpoint)
        if problem is not None:
            return problem
        if not read_checksums(checkpoint).keys() >= NEEDED:  # its end is cut off, or --save_only_model
            return f"{checkpoint} is incomplete: {CHECKSUMS} does not list {' and '.join(sorted(NEEDED))}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    best = best_checkpoint(checkpoint) if with_best else None
    return None if best is None else problem_of(best)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """What was the best checkpoint when this one was written; None if none had been evaluated."""
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best_global_step"]
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint, if it is there; one that is removed in part no longer counts. Of a link only the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes checkpoints until `limit` are left: incomplete ones first, then the oldest; never the newest, nor the
    best.
    """
    kept = {newest.name, Path(best or newest).name}
    others = [path for path in checkpoints_in(newest.parent) if path.name not in kept]
    others.sort(key=lambda path: ((path / CHECKSUMS).exists(), _step(path)))
    for checkpoint in others[: max(len(others) + len(kept) - limit, 0) if limit else 0]:
        remove_checkpoint(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are those above. Of several processes one decides, and all of them do the same."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's. With `resume_from_checkpoint=True` it continues from the last checkpoint in the output folder,
        or starts where there is none; with a path it raises UserError where that checkpoint is not whole.
        """
        folder, with_best = str(self.args.output_dir), self.args.load_best_model_at_end
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.decided(lambda: last_checkpoint(folder, with_best))
        elif resume_from_checkpoint:
            self._refuse_damaged(Path(resume_from_checkpoint), with_best)
        if resume_from_checkpoint:
            self._warn_of_other_processes(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def decided(self, decide: Callable[[], Answer]) -> Answer:
        """What `decide` gives in the main process, in all of them."""
        answer = [decide() if self.args.process_index == 0 else None]
        broadcast_object_list(answer)
        return answer[0]  # type: ignore[return-value]

    def _refuse_damaged(self, checkpoint: Path, with_best: bool = False) -> None:
        problem = self.decided(lambda: problem_of(checkpoint, with_best))
        if problem is not None:
            raise UserError(f"{problem}; --resume_from_checkpoint continues from the last checkpoint that is whole")

    def _warn_of_other_processes(self, checkpoint: Path) -> None:
        states = len(list(checkpoint.glob("rng_state*.pth")))
        if states != self.args.world_size and self.args.process_index == 0:
            logger.warning(
                "%s was written by %d processes, and %d continue: random numbers, such as dropout's, differ from "
                "those of a run without interruption", checkpoint, states, self.args.world_size,
            )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)  # what is left of an earlier attempt at this step
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the parent would remove others too soon
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # all have written what is theirs
        if self.args.should_save:
            self._save_state_without_path(folder)
            write_checksums(folder)
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _save_state_without_path(self, folder: Path) -> None:
        """The best checkpoint is stored by its step alone: its path would not outlive a move of the output folder."""
        path, step = self.state.best_model_checkpoint, self.state.best_global_step
        self.state.best_model_checkpoint = None
        self.state.best_global_step = _step(Path(path)) if path else None  # the best step itself may not be saved
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
        self._refuse_damaged(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()
