"""One process at a time in a folder: a lock that the operating system releases when its process ends."""

import logging
import os
import platform
import weakref
from pathlib import Path
from typing import IO

from kd.common.utils.errors import UserError

LOCK = ".lock"
logger = logging.getLogger(__name__)
_held: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


class FolderLock:
    """Holds a folder for as long as this object lives. Made by `lock_folder`."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / LOCK).open("a+", encoding="utf-8")
        weakref.finalize(self, self.file.close)
        try:
            _lock(self.file)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}: wait until it ends, or choose another --output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): start no second process in it", folder, error.strerror)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}")
        self.file.flush()


def lock_folder(folder: Path) -> FolderLock:
    """Locks an existing folder; the same lock for every caller in this process.

    Raises UserError where another process holds the folder. A lock of a process that has died does not count.
    """
    path = folder.resolve()
    lock = _held.get(path)
    if lock is None:
        lock = _held[path] = FolderLock(folder)
    return lock


if os.name == "posix":
    import fcntl

    def _lock(file: IO[str]) -> None:
        """A record lock: it belongs to the process, so that forked data workers cannot keep it alive."""
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

else:
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
