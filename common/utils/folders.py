"""Folders that are whole or absent, their checksums, and the lock that one process at a time holds."""

import hashlib
import logging
import os
import platform
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text

CHECKSUMS, LOCK = "SHA256SUMS", ".lock"
logger = logging.getLogger(__name__)
_held: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


# ---------------------------------------------------------------- writing


@contextmanager
def writing_folder(path: str | Path, checksums: bool = True) -> Iterator[Path]:
    """Yields an empty temporary folder next to `path` and renames it to `path` when the block succeeds.

    `checksums`: SHA256SUMS is written into the folder: it shows later which files are whole, and which were added
    by others. Until the block succeeds an older folder at `path` stays as it was; afterwards files that were
    added to it are in the new one. What killed processes left behind is cleared on the next use.

    Raises UserError where `path` is a symbolic link, or where a file that was added to the older folder has the name
    of a new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path, checksums)
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and nothing is replaced through one: remove the link")
    temporary = path.with_name(f".{path.name}.writing.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        added = added_files(path) if checksums and path.exists() else []
        if checksums:
            write_checksums(temporary)
        _replace_folder(temporary, path, added)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def added_files(folder: Path) -> list[Path]:
    """Files and links below a folder, relative to it, that are not listed in its SHA256SUMS; all where it has none."""
    whole = (folder / CHECKSUMS).exists()
    listed = {Path(name) for name in read_checksums(folder)} | {Path(CHECKSUMS)} if whole else set()
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder) for path in found} - listed)


def _replace_folder(new: Path, path: Path, added: list[Path]) -> None:
    """A full folder cannot be renamed over, so the old one is renamed first. `added` files move to the new one."""
    for name in added:
        if os.path.lexists(new / name):
            raise UserError(
                f"{path / name} is in the way, and {path / CHECKSUMS} does not list it as written by this project: "
                f"move {path} elsewhere"
            )
    old = path.with_name(f".{path.name}.old.{os.getpid()}")
    if path.exists():
        path.rename(old)
    new.rename(path)
    _move(added, old, path)
    shutil.rmtree(old, ignore_errors=True)


def _move(names: list[Path], old: Path, new: Path) -> None:
    for name in names:
        if not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(new / name)


def _clear_leftovers(path: Path, checksums: bool) -> None:
    for old in path.parent.glob(f".{path.name}.old.*"):
        if _in_use(old):
            continue
        if not path.exists():  # killed between the two renames of _replace_folder
            old.rename(path)
            continue
        if checksums:
            _move(added_files(old), old, path)  # killed while they moved
        shutil.rmtree(old, ignore_errors=True)
    for folder in path.parent.glob(f".{path.name}.writing.*"):
        if not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    """Whether another living process writes this temporary folder; its name ends with the process id."""
    pid = int(folder.suffix[1:])
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # elsewhere signal 0 may end a process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- checksums, in the format of sha256sum


def write_checksums(folder: str | Path) -> None:
    """Writes SHA256SUMS for all files below a folder. Call it last: its presence marks the folder as complete.

    `sha256sum -c SHA256SUMS` inside the folder checks it without this project. The last line, a comment to that
    command, is the checksum of the lines above.
    """
    folder = Path(folder)
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in _files(folder))
    write_text(folder / CHECKSUMS, f"{lines}# {_digest(lines)}\n")


def read_checksums(folder: str | Path) -> dict[str, str]:
    """{path relative to the folder: SHA-256} of the files that were there when the folder was completed.

    Raises UserError where SHA256SUMS is missing or damaged.
    """
    path = Path(folder) / CHECKSUMS
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{folder} is incomplete: it has no {CHECKSUMS}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged") from None
    lines, _, digest = text.rpartition("# ")
    if digest != f"{_digest(lines)}\n":
        raise UserError(f"{path} is damaged")
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines.split("\n")[:-1])}


def find_damage(folder: str | Path) -> str | None:
    """What is wrong with a folder, as `FILE is missing` or `FILE is damaged`; None where all of its files are whole.

    Files that were added later are ignored.
    """
    try:
        checksums = read_checksums(folder)
    except UserError as error:
        return str(error)
    for name, digest in checksums.items():
        path = Path(folder, name)
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != digest:
            return f"{path} is damaged"
    return None


def _files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- lock


class FolderLock:
    """Holds a folder for as long as this object lives; the operating system releases it when the process ends.
    Created by `lock_folder`.
    """

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
