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

from torch import Tensor

from kd.common.utils.files import CHECKSUMS, find_damage, read_checksums, writing_folder

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
NEEDED = {STATE, "scheduler.pt"}  # in any checkpoint; the scheduler is only saved with the optimizer
KEPT = 2  # checkpoints that save_checkpoint keeps: the newest, and one more in case the newest is damaged


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, in order of their step."""
    paths = (path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in paths if path.is_dir()), key=step_of)


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
    others.sort(key=lambda path: ((path / CHECKSUMS).exists(), step_of(path)))
    for checkpoint in others[: max(len(others) + len(kept) - limit, 0) if limit else 0]:
        remove_checkpoint(checkpoint)


def without_sharing(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones the weights that share memory with an earlier one."""
    first: dict[int, str] = {}
    for name, weight in weights.items():
        first.setdefault(weight.data_ptr(), name)
    return {name: w if first[w.data_ptr()] == name else w.clone() for name, w in weights.items()}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
