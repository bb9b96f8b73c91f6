"""Checksums of a folder's files, in the format of `sha256sum`, so that damage is noticed when the folder is read back.

`sha256sum -c SHA256SUMS` inside the folder checks it without this project. The last line, a comment to that command,
is the checksum of the lines above.
"""

import hashlib
from pathlib import Path

from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text

CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: str | Path) -> None:
    """Writes SHA256SUMS for all files below a folder. Call it last: its presence marks the folder as complete."""
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
