"""Checkpoints of a training: whole folders with checksums, of which the newest two are kept."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from common.utils.checksums import CHECKSUMS, find_damage, read_checksums, write_checksums
from common.utils.errors import UserError
from common.utils.files import writing_folder

KEPT = 2  # the newest, and the one before, in case the newest is damaged
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints `checkpoint-N` in a folder. The one before is removed only when a new one is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into the folder that it is given, as checkpoint `number`."""
        path = self.folder / f"checkpoint-{number}"
        _remove(path)  # it is there only if it is damaged, so that the training went on from the one before
        with writing_folder(path) as partial:
            write(partial)
            write_checksums(partial)
        for old in self._all()[:-KEPT]:
            _remove(old)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or None where there is none at all; warns of those that are damaged.

        Raises UserError where all are.
        """
        damage = None
        for path in reversed(self._all()):
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning("checkpoint %s is left out: %s", path, damage)
        if damage is not None:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({damage}): start over with --overwrite_output_dir"
            )
        return None

    def _all(self) -> list[Path]:
        """By number."""
        found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*")}
        numbers = {path: int(match[1]) for path, match in found.items() if match}
        return sorted(numbers, key=lambda path: numbers[path])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. A list of checksums that was cut off lacks some of the files."""
    if (damage := find_damage(path)) is not None:
        return damage
    unlisted = {file.name for file in path.iterdir()} - read_checksums(path).keys() - {CHECKSUMS}
    return f"{path / CHECKSUMS} lacks {', '.join(sorted(unlisted))}" if unlisted else None


def _remove(path: Path) -> None:
    """Removes a folder, but never what a link leads to."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
