"""Pictures in folders, SPLIT/CLASS/NAME.png, as rows. Pictures are what Pillow decodes, by suffix or first bytes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

import datasets
from PIL import Image

from kd.common.data.labels import shorten_list, sort_labels
from kd.common.data.sources import SPLIT_NAMES, Splits
from kd.common.utils.errors import UserError

PLACE = "pictures belong into SPLIT/CLASS/, such as train/cat/1.png"
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")  # which may name the classes of pictures
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # which Pillow names but leaves to other programs
HIDDEN = {"thumbs.db", "desktop.ini"}  # in addition to names that start with a dot


def read_class_folders(root: Path, needs_train: bool, notes: list[str]) -> Splits:
    """The pictures of SPLIT/CLASS/NAME.png or, where no train split is needed, of CLASS/NAME.png as `test`.

    The columns are image and label, which is null for a picture of a split that lies in no class. Notes report what is
    not used.
    """
    files = find_files(root)
    places = _split_folders(root, files, needs_train)
    if list(places.values()) == [root]:
        notes.append(f"{root.name} has classes but no splits: all of its pictures are the test split")
    pictures = {split: _below(place, files.pictures) for split, place in places.items()}
    for split, place in places.items():
        _check_split(root, split, place, pictures[split], files)
    notes += _left_out(root, places, pictures, files)
    classes = {split: [_class_of(place, path) for path in pictures[split]] for split, place in places.items()}
    names = sort_labels({name for of_split in classes.values() for name in of_split if name is not None})
    ids: dict[str | None, int | None] = {None: None, **{name: number for number, name in enumerate(names)}}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {
        split: {
            "image": list(map(str, pictures[split])),
            "label": [ids[name] for name in classes[split]],
        }
        for split in places
    }
    return {split: datasets.Dataset.from_dict(of_split, features=features) for split, of_split in columns.items()}


def _split_folders(root: Path, files: "Files", needs_train: bool) -> dict[str, Path]:
    """The folders of the splits by their names; the root itself, as `test`, where it has classes only."""
    inside = _folders(root)
    splits = {path.name: path for path in inside if path.name in SPLIT_NAMES}
    if ("train" in splits) or (splits and not needs_train):
        return splits
    for path in inside:
        if not splits and (path / "train").is_dir():
            raise UserError(f"no train split in {root}, but in {path}: pass --dataset {path}")
        if list(path.glob("*.parquet")):
            raise UserError(f"no parquet files in {root}, but in {path}: pass --dataset {path}")
    if not files.pictures:
        raise UserError(
            f"no images in folder {root}{_instead(root, files.others)}: put train.parquet there, or pictures as "
            "train/CLASS/NAME.png (and so under validation/ and test/)"
        )
    if not inside:
        _refuse_classless(root, files.pictures[0], files)
    if not needs_train:
        return {"test": root}
    raise UserError(f"{root} has no train split, only {shorten_list([path.name for path in inside])}: {PLACE}")


def _check_split(root: Path, split: str, place: Path, pictures: list[Path], files: "Files") -> None:
    """Raises UserError for a split without pictures, and for one to train on with an empty class or none at all."""
    others = _below(place, files.others)
    if not pictures:
        raise UserError(f"{place} holds no pictures{_instead(root, others)}: put some there or remove the folder")
    if split != "train":
        return
    classes = {_class_of(place, path) for path in pictures}
    if classes == {None}:
        _refuse_classless(root, pictures[0], files)
    for folder in _folders(place):
        if folder.name not in classes:
            instead = _instead(place, _below(folder, others))
            raise UserError(f"class {folder} has no pictures{instead}: put some there or remove the folder")


def _refuse_classless(root: Path, picture: Path, files: "Files") -> NoReturn:
    lists = [path.name for path in files.others if path.parent == root and path.suffix.lower() in LISTS]
    unread = f"; lists of labels such as {lists[0]} are not read" if lists else ""
    raise UserError(f"{picture} is in no class: {PLACE}{unread}")


def _left_out(root: Path, places: dict[str, Path], pictures: dict[str, list[Path]], files: "Files") -> list[str]:
    """One line for each kind of thing that is not used as one might think."""
    used = {path for of_split in pictures.values() for path in of_split}
    kinds = {
        "pictures in no split, not used": [path for path in files.pictures if path not in used],
        "files that are no pictures, left out": files.others,
        "pictures deeper than their class, which is the first folder below the split": [
            path for split, at in places.items() for path in pictures[split] if len(path.relative_to(at).parts) > 2
        ],
    }
    notes = [f"{kind}: {len(paths):,} ({_names(root, paths)})" for kind, paths in kinds.items() if paths]
    return [*notes, f"hidden files, left out: {files.hidden:,}"] if files.hidden else notes


def _class_of(split: Path, picture: Path) -> str | None:
    parts = picture.relative_to(split).parts
    return parts[0] if len(parts) > 1 else None


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _below(place: Path, paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_relative_to(place)]


def _instead(root: Path, others: list[Path]) -> str:
    return f" but files of other kinds ({_names(root, others)})" if others else ""


def _names(root: Path, paths: list[Path]) -> str:
    return shorten_list([str(path.relative_to(root)) for path in paths])


# ---------------------------------------------------------------- which files are pictures


@dataclass
class Files:
    """What is below a folder, in the order of the paths."""

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
    """Whether a file has the suffix of a picture; a damaged one is reported when it is read."""
    suffixes, formats = _decodable()
    if path.suffix.lower() in suffixes:
        return True
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=formats):
            return True
    except OSError as error:
        if error.errno is not None:
            _refuse(error)
        return False
    except Exception:  # whatever a decoder raises about bytes that are of another kind
        return False


@cache
def _decodable() -> tuple[frozenset[str], list[str]]:
    """What Pillow decodes: suffixes, in lower case and with their dot, and formats with identifying first bytes."""
    Image.init()
    suffixes = Image.registered_extensions().items()
    formats = [kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in NOT_DECODED]
    return frozenset(suffix for suffix, kind in suffixes if kind in {*Image.OPEN} - NOT_DECODED), formats


def _leads_back(folder: Path, here: str) -> bool:
    """Whether a link would be walked for ever."""
    return folder.is_symlink() and Path(here).is_relative_to(os.path.realpath(folder))


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions or remove it")
