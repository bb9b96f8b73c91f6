"""Pictures in folders, SPLIT/CLASS/NAME.png, as rows; and what of a folder is no picture of a class."""

from pathlib import Path
from typing import NoReturn

import datasets

from kd.common.data.label_words import in_order, some
from kd.common.data.sources import SPLIT_NAMES, Splits
from kd.common.utils.errors import UserError
from kd.image_classification.data.picture_files import Files, find_files

PLACE = "pictures belong into SPLIT/CLASS/, such as train/cat/1.png"
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")  # which may name the classes of pictures


def read_class_folders(root: Path, needs_train: bool, notes: list[str]) -> Splits:
    """The pictures of SPLIT/CLASS/NAME.png or, where no train split is needed, of CLASS/NAME.png as `test`.

    The columns are image and label, which is null for a picture of a split that lies in no class.
    """
    files = find_files(root)
    places = _split_folders(root, files, needs_train)
    if list(places.values()) == [root]:
        notes.append(f"{root.name} has classes but no splits: all of its pictures are the test split")
    pictures = {split: [path for path in files.pictures if path.is_relative_to(at)] for split, at in places.items()}
    for split, place in places.items():
        _check_split(root, split, place, pictures[split], files)
    notes += _left_out(root, places, pictures, files)
    classes = {split: [_class_of(place, path) for path in pictures[split]] for split, place in places.items()}
    names = in_order({name for of_split in classes.values() for name in of_split if name is not None})
    ids: dict[str | None, int | None] = {None: None, **{name: number for number, name in enumerate(names)}}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return {
        split: datasets.Dataset.from_dict(
            {"image": list(map(str, pictures[split])), "label": [ids[name] for name in classes[split]]},
            features=features,
        )
        for split in places
    }


def _split_folders(root: Path, files: Files, needs_train: bool) -> dict[str, Path]:
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
    raise UserError(f"{root} has no train split, only {some([path.name for path in inside])}: {PLACE}")


def _check_split(root: Path, split: str, place: Path, pictures: list[Path], files: Files) -> None:
    """Raises UserError for a split without pictures, and for one to train on with an empty class or none at all."""
    others = [path for path in files.others if path.is_relative_to(place)]
    if not pictures:
        raise UserError(f"{place} holds no pictures{_instead(root, others)}: put some there or remove the folder")
    if split != "train":
        return
    classes = {_class_of(place, path) for path in pictures}
    if classes == {None}:
        _refuse_classless(root, pictures[0], files)
    for folder in _folders(place):
        if folder.name not in classes:
            instead = _instead(place, [path for path in others if path.is_relative_to(folder)])
            raise UserError(f"class {folder} has no pictures{instead}: put some there or remove the folder")


def _refuse_classless(root: Path, picture: Path, files: Files) -> NoReturn:
    lists = [path.name for path in files.others if path.parent == root and path.suffix.lower() in LISTS]
    unread = f"; lists of labels such as {lists[0]} are not read" if lists else ""
    raise UserError(f"{picture} is in no class: {PLACE}{unread}")


def _left_out(root: Path, places: dict[str, Path], pictures: dict[str, list[Path]], files: Files) -> list[str]:
    """One line for each kind of thing that is not used as one might think."""
    notes = []
    used = {path for of_split in pictures.values() for path in of_split}
    outside = [path for path in files.pictures if path not in used]
    nested = [path for split, at in places.items() for path in pictures[split] if len(path.relative_to(at).parts) > 2]
    for paths, said in (
        (outside, "pictures in no split, not used"),
        (files.others, "files that are no pictures, left out"),
        (nested, "pictures deeper than their class, which is the first folder below the split"),
    ):
        if paths:
            notes.append(f"{said}: {len(paths):,} ({some([str(path.relative_to(root)) for path in paths])})")
    if files.hidden:
        notes.append(f"hidden files, left out: {files.hidden:,}")
    return notes


def _class_of(split: Path, picture: Path) -> str | None:
    parts = picture.relative_to(split).parts
    return parts[0] if len(parts) > 1 else None


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _instead(root: Path, others: list[Path]) -> str:
    return f" but files of other kinds ({some([str(path.relative_to(root)) for path in others])})" if others else ""
