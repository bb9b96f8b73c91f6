"""Files and folders that are whole or absent: written under a temporary name beside the target, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.utils.errors import UserError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new, never a part. Makes missing folders."""
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
    """Writes JSON atomically. NaN and infinity are no JSON: ValueError, and the file stays as it was."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads JSON; a file that is missing or corrupt is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` and renames it to `path` when the block succeeds.

    Until then an older folder at `path` stays as it was. What killed processes left behind is cleared on the next use.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.writing.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """A full folder cannot be renamed over, so the old one steps aside first."""
    old = path.with_name(f".{path.name}.old.{os.getpid()}")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    for old in path.parent.glob(f".{path.name}.old.*"):
        if not path.exists() and not _in_use(old):  # killed between the two renames of _replace_folder
            old.rename(path)
    for kind in ("writing", "old"):
        for folder in path.parent.glob(f".{path.name}.{kind}.*"):
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
