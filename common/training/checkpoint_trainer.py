"""A Trainer whose checkpoints are used only if they are complete."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from kd.common.training.checkpoints import (
    STATE,
    best_checkpoint,
    last_checkpoint,
    problem_of,
    remove_checkpoint,
    rotate_checkpoints,
    step_of,
)
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_checksums

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


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
        self.state.best_global_step = step_of(Path(path)) if path else None  # the best step may have no checkpoint
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
