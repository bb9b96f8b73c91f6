"""Reads images in folders SPLIT/CLASS/NAME.png, and unlabelled/NAME.png. Images are files with a suffix or header that
Pillow supports.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

import datasets
from PIL import Image

from kd.common.data.label_names import shorten_list, sort_labels
from kd.common.data.sources import SPLIT_NAMES, UNLABELLED, Splits
from kd.common.utils.errors import UserError
from kd.image_classification.data.manifests import LISTS, is_metadata, join_metadata

LAYOUT = "put images into SPLIT/CLASS/, such as train/cat/1.png"
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes but does not decode
HIDDEN = {"thumbs.db", "desktop.ini"}  # in addition to names that start with a dot


@dataclass
class Files:
    """The files below a folder, sorted by path."""

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: int = 0


def read_class_folders(root: Path, needs_train: bool, notes: list[str]) -> Splits:
    """Reads SPLIT/CLASS/NAME.png or, if `needs_train` is False, CLASS/NAME.png as `test`.

    The columns are image and label, and those of tables `metadata.csv` (or .jsonl) with the paths of images. The
    label is null for an image outside of class folders, and for all images of the split `unlabelled`. Notes report
    files that are not used.
    """
    files = find_files(root)
    folders = _split_folders(root, files, needs_train)
    metadata = [path for path in files.others if is_metadata(path) and path.parent in (root, *folders.values())]
    files.others = [path for path in files.others if path not in metadata]
    if list(folders.values()) == [root]:
        notes.append(f"{root.name} has classes but no splits: all of its images are the test split")
    images = {split: _below(folder, files.images) for split, folder in folders.items()}
    for split, folder in folders.items():
        _check_split(root, split, folder, images[split], files, listed=bool(metadata))
    notes += _unused_files(root, folders, images, files)
    classes = {
        split: [None if SPLIT_NAMES[split] == UNLABELLED else _class_of(folder, path) for path in images[split]]
        for split, folder in folders.items()
    }
    names = sort_labels({name for found in classes.values() for name in found if name is not None})
    ids: dict[str | None, int | None] = {None: None, **{name: i for i, name in enumerate(names)}}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {
        split: {"image": list(map(str, images[split])), "label": [ids[name] for name in classes[split]]}
        for split in folders
    }
    splits = {split: datasets.Dataset.from_dict(rows, features=features) for split, rows in columns.items()}
    return join_metadata(splits, metadata, notes) if metadata else splits


def _split_folders(root: Path, files: Files, needs_train: bool) -> dict[str, Path]:
    """The folders of the splits by name; the root, as `test`, if it only has classes."""
    folders = _subfolders(root)
    splits = {path.name: path for path in folders if path.name in SPLIT_NAMES}
    if ("train" in splits) or (splits and not needs_train):
        return splits
    for path in folders:
        if not splits and (path / "train").is_dir():
            raise UserError(f"no train split in {root}, but in {path}: pass --dataset {path}")
        if list(path.glob("*.parquet")):
            raise UserError(f"no parquet files in {root}, but in {path}: pass --dataset {path}")
    if not files.images:
        raise UserError(
            f"no images in folder {root}{_other_files(root, files.others)}: put train.parquet there, or images as "
            "train/CLASS/NAME.png (and likewise validation/ and test/)"
        )
    if not folders:
        _raise_without_class(root, files.images[0], files)
    if not needs_train:
        return {"test": root}
    raise UserError(f"{root} has no train split, only {shorten_list([path.name for path in folders])}: {LAYOUT}")


def _check_split(root: Path, split: str, folder: Path, images: list[Path], files: Files, listed: bool) -> None:
    """Raises UserError for a split without images, and for a train split with an empty class or without classes.

    `listed`: whether a table may name the classes.
    """
    others = _below(folder, files.others)
    if not images:
        raise UserError(f"{folder} holds no images{_other_files(root, others)}: add images or remove the folder")
    if split != "train" or listed:
        return
    classes = {_class_of(folder, path) for path in images}
    if classes == {None}:
        _raise_without_class(root, images[0], files)
    for path in _subfolders(folder):
        if path.name not in classes:
            other_files = _other_files(folder, _below(path, others))
            raise UserError(f"class {path} has no images{other_files}: add images or remove the folder")


def _raise_without_class(root: Path, image: Path, files: Files) -> NoReturn:
    lists = [path for path in files.others if path.parent == root and path.suffix.lower() in LISTS]
    instead = f", or pass --dataset {lists[0]} if it lists images and their labels" if lists else ""
    raise UserError(f"{image} is in no class: {LAYOUT}{instead}")


def _unused_files(root: Path, folders: dict[str, Path], images: dict[str, list[Path]], files: Files) -> list[str]:
    """One note per kind of file that is not used, or not used as one might expect."""
    used = {path for found in images.values() for path in found}
    kinds = {
        "images in no split, not used": [path for path in files.images if path not in used],
        "files that are not images, left out": files.others,
        "images deeper than their class, which is the first folder below the split": [
            path
            for split, folder in folders.items()
            for path in images[split]
            if SPLIT_NAMES[split] != UNLABELLED and len(path.relative_to(folder).parts) > 2
        ],
    }
    notes = [f"{kind}: {len(paths):,} ({_names(root, paths)})" for kind, paths in kinds.items() if paths]
    return [*notes, f"hidden files, left out: {files.hidden:,}"] if files.hidden else notes


def _class_of(split: Path, image: Path) -> str | None:
    parts = image.relative_to(split).parts
    return parts[0] if len(parts) > 1 else None


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _below(folder: Path, paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_relative_to(folder)]


def _other_files(root: Path, others: list[Path]) -> str:
    return f" but files of other kinds ({_names(root, others)})" if others else ""


def _names(root: Path, paths: list[Path]) -> str:
    return shorten_list([str(path.relative_to(root)) for path in paths])


# ---- which files are images ----


def find_files(folder: Path) -> Files:
    """Finds all files below a folder and follows links to folders. Raises UserError for an unreadable folder."""
    found = Files()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            found.hidden += sum(len(names) for _, _, names in os.walk(Path(parent, name)))
        real = Path(os.path.realpath(parent))
        folders[:] = [name for name in folders if not _is_cycle(Path(parent, name), real)]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or name.lower() in HIDDEN:
                found.hidden += 1
            else:
                (found.images if is_image(path) else found.others).append(path)
    found.images.sort()
    found.others.sort()
    return found


def is_image(path: Path) -> bool:
    """Whether a file has the suffix or header of an image. Damaged images are reported when they are read."""
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
            _raise_unreadable(error)
        return False
    except Exception:  # depends on the decoder: the file has another format
        return False


def image_suffixes() -> frozenset[str]:
    """Suffixes of image files, in lower case and with the dot."""
    return _decodable()[0]


@cache
def _decodable() -> tuple[frozenset[str], list[str]]:
    """Suffixes (lower case, with the dot) that Pillow decodes, and formats that it recognizes by their header."""
    Image.init()
    suffixes = Image.registered_extensions().items()
    formats = [kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in NOT_DECODED]
    return frozenset(suffix for suffix, kind in suffixes if kind in {*Image.OPEN} - NOT_DECODED), formats


def _is_cycle(folder: Path, parent: Path) -> bool:
    """Whether a link leads to a folder above itself."""
    return folder.is_symlink() and parent.is_relative_to(os.path.realpath(folder))


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions or remove it")
