"""Which files below a folder are pictures: all that Pillow decodes, by suffix or by their first bytes."""

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

from PIL import Image

from kd.common.utils.errors import UserError

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # which Pillow names but leaves to other programs
HIDDEN = {"thumbs.db", "desktop.ini"}  # besides names that start with a dot


@dataclass
class Files:
    """What lies below a folder, in the order of the paths."""

    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: int = 0


def find_files(folder: Path) -> Files:
    """All files below a folder, also behind links to folders. Raises UserError for what cannot be read."""
    found = Files()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            found.hidden += sum(len(names) for _, _, names in os.walk(Path(place, name)))
        here = os.path.realpath(place)
        folders[:] = [name for name in folders if not _leads_back(Path(place, name), here)]
        for name in files:
            path = Path(place, name)
            if name.startswith(".") or name.lower() in HIDDEN:
                found.hidden += 1
            else:
                (found.pictures if is_picture(path) else found.others).append(path)
    found.pictures.sort()
    found.others.sort()
    return found


def is_picture(path: Path) -> bool:
    """A file with the suffix of a picture is one, whatever it holds: damage is reported by whoever reads it."""
    if path.suffix.lower() in suffixes():
        return True
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=recognizable()):
            return True
    except OSError as error:
        if error.errno is not None:
            _refuse(error)
        return False
    except Exception:  # whatever a decoder raises about bytes that are of another kind
        return False


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of what Pillow decodes, in lower case and with their dot."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_DECODED)


@cache
def recognizable() -> tuple[str, ...]:
    """The formats whose files begin with identifying bytes."""
    Image.init()
    return tuple(kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in NOT_DECODED)


def _leads_back(folder: Path, here: str) -> bool:
    """Whether a link would be walked for ever."""
    return folder.is_symlink() and Path(here).is_relative_to(os.path.realpath(folder))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions or remove it")
