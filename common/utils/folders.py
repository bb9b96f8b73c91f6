"""Folders that are whole or absent: written under a temporary name next to the target, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.common.utils.checksums import CHECKSUMS, read_checksums, write_checksums
from kd.common.utils.errors import UserError


@contextmanager
def writing_folder(path: str | Path, checksums: bool = True) -> Iterator[Path]:
    """Yields an empty temporary folder next to `path` and renames it to `path` when the block succeeds.

    `checksums`: SHA256SUMS is written into the folder: it shows later which files are whole, and which were added
    by somebody else. Until the block succeeds an older folder at `path` stays as it was; afterwards files that were
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
        return True  # elsewhere signal 0 is not a mere question
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
