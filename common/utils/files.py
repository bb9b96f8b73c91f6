"""Files and folders that are complete or absent, checksums of folders, and a lock for one process at a time.

Everything is written under a temporary name next to the target and then renamed.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kd.common.utils.errors import UserError

CHECKSUMS, LOCK = "SHA256SUMS", ".lock"
logger = logging.getLogger(__name__)
_locks: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


# ---- files ----


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: a reader finds the old or the new content, never a part. Creates missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    """Writes JSON atomically. Raises ValueError for NaN and infinity, and leaves the file unchanged."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads JSON. Raises UserError if the file is missing or corrupt."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {error}") from None


def check_writable(path: str | Path, flag: str) -> None:
    """Raises UserError if `path`, the value of a flag, cannot be created because of a parent folder's permissions."""
    parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {parent} is not a writable folder")


# ---- folders ----


@contextmanager
def writing_folder(path: str | Path, checksums: bool = True) -> Iterator[Path]:
    """Yields an empty temporary folder next to `path`, and renames it to `path` when the block succeeds.

    An older folder at `path` is replaced. Files that others added to it, which its checksums do not list, move to the
    new folder. Temporary folders of killed processes are removed, or restored if the older folder is missing.

    Args:
        checksums: Write SHA256SUMS, which shows later that the folder is complete and which files others added.

    Raises UserError if `path` is a symbolic link, or if an added file has the name of a new file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path, checksums)
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link and is not replaced: remove the link")
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
    """Files and links below a folder, relative to it, that its SHA256SUMS does not list; all files if it has none."""
    listed = {Path(name) for name in read_checksums(folder)} if (folder / CHECKSUMS).exists() else set()
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder) for path in files} - listed - {Path(CHECKSUMS)})


def _replace_folder(new: Path, path: Path, added: list[Path]) -> None:
    """Renames the old folder first, because a folder cannot be renamed over a full one; then moves `added` files."""
    for name in added:
        if os.path.lexists(new / name):
            raise UserError(
                f"{path / name} would be replaced, but {path / CHECKSUMS} does not list it, so this project did not "
                f"write it: move {path} elsewhere"
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


def _clean_up(path: Path, checksums: bool) -> None:
    """Completes or removes the temporary folders that killed processes left next to `path`."""
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
    """Whether another living process writes this temporary folder, whose name ends with the process id."""
    pid = int(folder.suffix[1:])
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # on other systems, signal 0 may end a process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---- checksums, in the format of sha256sum ----


def write_checksums(folder: str | Path) -> None:
    """Writes SHA256SUMS for all files below a folder. Call it last: the file marks the folder as complete.

    `sha256sum -c SHA256SUMS` checks the folder without this project. The last line, a comment to that command, is the
    checksum of the lines above.
    """
    folder = Path(folder)
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    write_text(folder / CHECKSUMS, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def read_checksums(folder: str | Path) -> dict[str, str]:
    """{path relative to the folder: SHA-256} of the files that the completed folder contained.

    Raises UserError if SHA256SUMS is missing or damaged.
    """
    path = Path(folder) / CHECKSUMS
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{folder} is incomplete: it has no {CHECKSUMS}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged") from None
    lines, _, digest = text.rpartition("# ")
    if digest != f"{hashlib.sha256(lines.encode()).hexdigest()}\n":
        raise UserError(f"{path} is damaged")
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines.split("\n")[:-1])}


def find_damage(folder: str | Path) -> str | None:
    """The first problem of a folder, as `FILE is missing` or `FILE is damaged`, or None. Added files are ignored."""
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


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- lock ----


class FolderLock:
    """Locks a folder as long as this object lives; the operating system releases it when the process ends.
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
            logger.warning("%s cannot be locked (%s): do not start a second run in it", folder, error.strerror)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}")
        self.file.flush()


def lock_folder(folder: Path) -> FolderLock:
    """Locks an existing folder. All callers in this process share the lock.

    Raises UserError if another living process has locked the folder.
    """
    path = folder.resolve()
    lock = _locks.get(path)
    if lock is None:
        lock = _locks[path] = FolderLock(folder)
    return lock


if os.name == "posix":
    import fcntl

    def _lock(file: IO[str]) -> None:
        """A record lock: it belongs to the process, so forked data workers cannot keep it."""
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

else:
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
