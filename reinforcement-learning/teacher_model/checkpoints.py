"""Checkpoints of a training: whole folders with checksums, of which the newest two are kept."""

import logging
from collections.abc import Callable
from pathlib import Path

from kd.common.training.checkpoints import checkpoints_in, remove_checkpoint
from kd.common.utils.folders import find_damage, writing_folder

KEPT = 2  # the newest, and the one before, in case the newest is damaged
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints `checkpoint-N` in a folder. An older one is removed only when a new one is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into the folder that it is given, as checkpoint `number`."""
        path = self.folder / f"checkpoint-{number}"
        remove_checkpoint(path)  # damaged, or training would have continued from it
        with writing_folder(path) as partial:
            write(partial)
        for old in checkpoints_in(self.folder)[:-KEPT]:
            remove_checkpoint(old)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or None. Warnings say what is wrong with newer ones."""
        for path in reversed(checkpoints_in(self.folder)):
            damage = find_damage(path)
            if damage is None:
                return path
            logger.warning("not continuing from %s: %s", path.name, damage)
        return None
