"""Files that are whole or absent: written under a temporary name next to the target, then renamed."""

import json
import os
from pathlib import Path
from typing import Any

from kd.common.utils.errors import UserError


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


def check_writable(path: str | Path, flag: str) -> None:
    """Raises UserError where a file or folder cannot be made at a path, the value of a flag, for want of a folder that
    may be written to. Missing folders do not count: they can be made.
    """
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {there} is no folder that may be written to")


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
