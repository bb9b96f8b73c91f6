"""Tables that list image files: `train.csv` with a column of paths, and `metadata.csv` next to images in folders."""

import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from kd.common.data.label_names import count_rows
from kd.common.data.readers import read_rows
from kd.common.data.sources import SPLIT_NAMES, Splits, split_in
from kd.common.utils.errors import UserError

LISTS = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"}
METADATA = "metadata"  # the name of tables in folders of images, as in `datasets`
PATH_COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "img")  # in the order of preference
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
LABEL = "label"


def is_list_of_a_split(path: Path) -> bool:
    """Whether a file is a table of a split, such as `train.csv` or `my_test.jsonl`."""
    return path.suffix.lower() in LISTS and split_in(path.stem) in SPLIT_NAMES


def is_metadata(path: Path) -> bool:
    return path.stem == METADATA and path.suffix.lower() in LISTS


def open_paths(
    raw: Splits, root: Path, column: str | None, suffixes: frozenset[str], notes: list[str], needed: bool
) -> Splits:
    """The splits with the images of a column of paths, relative to `root` or absolute.

    Args:
        column: the column of paths; None for the only one whose values all end in one of the `suffixes`.
        needed: whether the images may not be in another column.

    Raises UserError for paths without a file.
    """
    first = next(iter(raw.values()))
    if column is None and needed:
        found = [name for name in first.column_names if _holds_paths(first, name, suffixes)]
        column = min(found, key=_preference, default=None)
        if column is not None:
            others = f"; --image_column names another of {', '.join(found)}" if len(found) > 1 else ""
            notes.append(f"column {column!r} holds the paths of the images{others}")
    if column is None or not _is_text(first, column):
        return raw
    return {split: _with_images(split, rows, root, column, notes) for split, rows in raw.items()}


def _is_text(rows: datasets.Dataset, column: str) -> bool:
    feature = rows.features.get(column)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _holds_paths(rows: datasets.Dataset, column: str, suffixes: frozenset[str]) -> bool:
    if not _is_text(rows, column):
        return False
    values = [value for value in _cells(rows, column) if value is not None]
    return bool(values) and all(Path(value).suffix.lower() in suffixes for value in values)


def _cells(rows: datasets.Dataset, column: str) -> list[str | None]:
    """The paths in a column; None where it is empty."""
    values = rows.with_format("arrow")[:][column].to_pylist()
    return [value.strip() or None if value is not None else None for value in values]


def _preference(column: str) -> int:
    return PATH_COLUMNS.index(column.lower()) if column.lower() in PATH_COLUMNS else len(PATH_COLUMNS)


def _with_images(split: str, rows: datasets.Dataset, root: Path, column: str, notes: list[str]) -> datasets.Dataset:
    if not _is_text(rows, column):
        return rows
    values = _cells(rows, column)
    for number, value in enumerate(values):
        if value is not None and URL.match(value):
            raise UserError(f"row {number} of {split}: {value} is an address: download the image and name its file")
    base = _base(split, next((value for value in values if value is not None), ""), root)
    if base != root:
        notes.append(f"the paths of {split} are relative to {base.relative_to(root)}/")
    paths = [None if value is None else _path(value, base) for value in values]
    absent = [value for value, path in zip(values, paths, strict=True) if path is not None and not path.is_file()]
    if absent:
        raise UserError(
            f"column {column!r} of {split}: {count_rows(len(absent))} of {len(values):,} name no file, such as "
            f"{absent[0]} (paths are relative to {base}): correct or remove them"
        )
    files = [None if path is None else str(path) for path in paths]
    features = rows.features | {column: datasets.Image()}
    table = rows.remove_columns(column).with_format("arrow")[:]
    table = table.append_column(column, datasets.Image().cast_storage(pa.array(files, pa.string())))
    return datasets.Dataset(table.select(list(features)).cast(datasets.Features(features).arrow_schema))


def _base(split: str, first: str, root: Path) -> Path:
    """The folder that the paths of a split are relative to: the root, or a folder in it that holds the first image,
    preferably that of the split.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    folders.sort(key=lambda path: SPLIT_NAMES.get(path.name) != split)
    return next((folder for folder in (root, *folders) if _path(first, folder).is_file()), root)


def _path(value: str, base: Path) -> Path:
    """The file of a cell, whose separators may be those of Windows."""
    path = base / value
    return path if path.exists() else base / value.replace("\\", "/")


# ---- metadata of images in folders ----


def join_metadata(splits: Splits, files: list[Path], notes: list[str]) -> Splits:
    """Adds the columns of tables of metadata to images in folders. The column `file_name` (or another of PATH_COLUMNS)
    has their paths, relative to the table's folder.

    An image that no table names has no values. Images outside of class folders have the table's labels. A table that
    cannot be used is noted if folders name the classes, and otherwise causes a UserError.
    """
    in_classes = any(rows.features[LABEL].names for rows in splits.values())
    stored = {split: [image["path"] for image in _files(rows)] for split, rows in splits.items()}
    known = {path for paths in stored.values() for path in paths}
    names = ", ".join(sorted({path.name for path in files}))
    try:
        cells = _cells_by_file(files)
        if not known & cells.keys():
            raise UserError(f"{names} names none of the images: paths are relative to its folder")
    except UserError as error:
        if not in_classes:
            raise
        notes.append(f"{names} is not used: {error}")
        return splits
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    if unknown := len(cells.keys() - known):
        notes.append(f"{count_rows(unknown)} of {names} name no image of a split")
    if unnamed := len(known - cells.keys()):
        notes.append(f"images that {names} does not name: {unnamed:,}")
    if in_classes and LABEL in columns:
        notes.append(f"column {LABEL!r} of {names} is not used, since folders name the classes")
        columns.remove(LABEL)
    joined = {}
    for split, rows in splits.items():
        kept = rows if in_classes or LABEL not in columns else rows.remove_columns(LABEL)
        table = kept.with_format("arrow")[:]
        for name in columns:
            table = table.append_column(name, pa.array([cells.get(path, {}).get(name) for path in stored[split]]))
        joined[split] = datasets.Dataset(table)
    return joined


def _files(rows: datasets.Dataset) -> list[dict[str, Any]]:
    return list(rows.cast_column("image", datasets.Image(decode=False))["image"])


def _cells_by_file(files: list[Path]) -> dict[str, dict[str, Any]]:
    """{path of an image: {column: value}} of tables of metadata."""
    cells: dict[str, dict[str, Any]] = {}
    for path in files:
        rows = read_rows(path)
        column = next((name for name in PATH_COLUMNS if name in rows.column_names), None)
        if column is None:
            raise UserError(f"{path} has no column file_name with the paths of images: rename the column")
        for row in rows.with_format("arrow")[:].to_pylist():
            if (value := row.pop(column)) is not None:
                cells[str(path.parent / str(value).replace("\\", "/"))] = row
    return cells
