"""Reads embedded and local image datasets and those on the Hub, and decodes their files."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor

from kd.common.data.label_names import shorten_list
from kd.common.data.label_sets import is_list
from kd.common.data.labels import read_labels
from kd.common.data.readers import READERS
from kd.common.data.sources import (
    SPLIT_NAMES,
    KnownDatasets,
    Splits,
    holdout,
    join_unlabelled,
    list_folder,
    read_folder,
    read_splits,
)
from kd.common.data.teacher_columns import TeacherColumns, Values, expand_columns, read_teacher_columns
from kd.common.utils.errors import UserError
from kd.image_classification.data.distorted_digits import distorted_digits
from kd.image_classification.data.folders import image_suffixes, read_class_folders
from kd.image_classification.data.manifests import is_list_of_a_split, open_paths

LABELS = ("label", "fine_label", "labels", "class", "target")  # columns, in the order of preference


def embedded_digits() -> Splits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 (UCI, Alpaydin and Kaynak 1998). A fifth is test."""
    digits = load_digits()
    rows = _rows_of_digits((digits.images * (255 / 16)).round().astype(np.uint8), digits.target)
    test = holdout(digits.target, 0.2)
    return {"train": rows.select(np.flatnonzero(~test)), "test": rows.select(np.flatnonzero(test))}


def embedded_distorted_digits() -> Splits:
    """`distorted_digits` as rows."""
    return {split: _rows_of_digits(*images) for split, images in distorted_digits().items()}


def _rows_of_digits(pixels: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    images = [Image.fromarray(image) for image in pixels]
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


KNOWN: KnownDatasets = {
    "distorted_digits": embedded_distorted_digits,
    "digits": embedded_digits,
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}


class ImageError(UserError):
    """An image that cannot be used. The message stays one line when a worker process adds its traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class StoredImages:
    """Image files of a split, with labels (images,) int64.

    split: the split in which the dataset stores them, for messages: validation may be a part of train.
    source: the stored split, one column `image` {"bytes", "path"}.
    indices: rows of `source` (images,).
    """

    split: str
    source: datasets.Dataset
    indices: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Tensor) -> "StoredImages":
        return StoredImages(self.split, self.source, self.indices[chosen], self.labels[chosen])

    def describe(self, row: int) -> str:
        """The path of an image, or its row number, for messages."""
        stored, number = self._stored(row), f"image {int(self.indices[row])} of {self.split}"
        return number if stored.get("bytes") is not None else stored.get("path") or number

    def places(self) -> dict[str, list[Any]]:
        """The columns `row`, the rows in the stored split, and `file`, the paths of images in folders."""
        images = self.source.with_format("arrow")[:]["image"]
        columns = {"row": self.indices.tolist()}
        if pc.struct_field(images, "bytes").null_count == len(images):
            paths = pc.struct_field(images, "path").to_pylist()
            columns["file"] = [paths[row] for row in columns["row"]]
        return columns

    def encoded(self, row: int) -> bytes:
        """The bytes of an image file, PNG or JPEG as stored."""
        with self._open(row) as file:
            return file.read()

    def file_sizes(self) -> np.ndarray:
        """Bytes (images,) int64 of each file, without reading the files."""
        images = self.source.with_format("arrow")[:]["image"]
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), -1).to_numpy()
        paths = pc.struct_field(images, "path").to_pylist()
        sizes = lengths.astype(np.int64)[self.indices.numpy()]
        for row in np.flatnonzero(sizes < 0).tolist():
            try:
                sizes[row] = os.stat(paths[int(self.indices[row])] or "").st_size
            except OSError:
                self.check(row)  # raises ImageError
        return sizes

    def image(self, row: int) -> Image.Image:
        """Decodes an image as grey (mode L) or RGB, turned upright."""
        encoded = self.encoded(row)
        with self._decoding_errors(row, len(encoded)):
            image = datasets.Image().decode_example({"bytes": encoded, "path": None})
            _check_depth(image)
            if image.mode in ("L", "RGB"):
                return image
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns otherwise
            return image.convert("L" if image.mode in ("1", "LA") else "RGB")

    def check(self, row: int) -> None:
        """Raises ImageError if the header of a file is not that of a supported image."""
        with self._open(row) as file, self._decoding_errors(row, file.seek(0, io.SEEK_END)), Image.open(file) as image:
            _check_depth(image)

    def _stored(self, row: int) -> dict[str, Any]:
        return self.source[int(self.indices[row])]["image"] or {}

    @contextmanager
    def _open(self, row: int) -> Iterator[BinaryIO]:
        stored = self._stored(row)
        content, path = stored.get("bytes"), stored.get("path")
        if content is None and not path:
            raise ImageError(f"{self.describe(row)} is missing: remove the row or add an image")
        try:
            with io.BytesIO(content) if content is not None else Path(str(path)).open("rb") as file:
                yield file
        except OSError as error:
            raise ImageError(f"{self.describe(row)} cannot be read ({error.strerror}): replace or remove it") from None

    @contextmanager
    def _decoding_errors(self, row: int, size: int) -> Iterator[None]:
        """Turns any exception of a decoder about a file of `size` bytes into an ImageError."""
        try:
            yield
            return
        except UnidentifiedImageError:
            reason = "it is not an image" if size else "the file is empty"
        except Image.DecompressionBombError:
            reason = f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        except Exception as error:  # a damaged file: OSError, SyntaxError, zlib.error, depending on the decoder
            reason = " ".join(str(error).split())
        raise ImageError(f"{self.describe(row)} cannot be read ({reason}): replace or remove it")


def _check_depth(image: Image.Image) -> None:
    if image.mode[0] in "IF":  # Pillow would clip all values above 255
        raise ValueError("it has more than 8 bits per pixel: convert it to 8")


@dataclass(frozen=True)
class OutputColumns:
    """Columns with the outputs of a teacher; see `read_teacher_columns`.

    model_labels: the class names in the order of outputs that do not name them; `trust_order`: the data's.
    """

    columns: list[str]
    values: Values | None = None
    model_labels: list[str] | None = None
    trust_order: bool = False


@dataclass(frozen=True)
class LabelledFiles:
    """Image files by split, the class names by id, the outputs of a teacher by stored split, and notes on what was
    inferred or is not used.
    """

    splits: dict[str, StoredImages]
    label_names: list[str]
    teacher: TeacherColumns | None
    notes: list[str]


def read_images(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    known: list[str] | None = None,
    keep_unlabelled: bool = False,
    outputs: OutputColumns | None = None,
    no_label: Sequence[str] = (),
) -> LabelledFiles:
    """Reads the images of `dataset`.

    known: the class names of a model to evaluate on the dataset, which then needs no train split.
    keep_unlabelled: whether train has the images without a label, and those of a split `unlabelled`, as IGNORED.
    no_label: placeholders for a missing label.
    """
    raw, notes = read_image_splits(dataset, known is None, keep_unlabelled)
    columns = expand_columns(raw, outputs.columns) if outputs else []
    raw, of_teacher = _apart(raw, columns)
    raw = _with_images_of_paths(raw, dataset, image_column, notes)
    image, label = _choose_columns(raw, image_column, label_column, notes)
    raw = join_unlabelled({split: _joined(rows, of_teacher[split]) for split, rows in raw.items()}, label, notes)
    try:
        labels = read_labels(raw, label, "ids", known, no_label, keep_unlabelled)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    splits = {}
    for split, indices in labels.rows.items():
        files = image_files(split, raw[split], image)
        splits[split] = StoredImages(split, files, torch.from_numpy(indices), torch.from_numpy(labels.values[split]))
    teacher = None
    if outputs:
        order = labels.names if outputs.trust_order else outputs.model_labels
        teacher = read_teacher_columns(raw, columns, labels.names, outputs.values, order)
    return LabelledFiles(splits, labels.names, teacher, notes + labels.notes + (teacher.notes if teacher else []))


def _apart(raw: Splits, columns: list[str]) -> tuple[Splits, dict[str, datasets.Dataset]]:
    """The splits without the columns of a teacher, and those columns alone."""
    of_teacher = {s: rows.select_columns([c for c in columns if c in rows.features]) for s, rows in raw.items()}
    return {s: rows.remove_columns(of_teacher[s].column_names) for s, rows in raw.items()}, of_teacher


def _joined(rows: datasets.Dataset, others: datasets.Dataset) -> datasets.Dataset:
    return datasets.concatenate_datasets([rows, others], axis=1) if others.column_names else rows


def _with_images_of_paths(raw: Splits, dataset: str, column: str | None, notes: list[str]) -> Splits:
    """The splits of a local dataset with images in place of their paths."""
    path = Path(dataset)
    if dataset in KNOWN or not path.exists():
        return raw
    root = path if path.is_dir() else path.parent
    needed = not any(map(_holds_images, next(iter(raw.values())).features.values()))
    return open_paths(raw, root, column, image_suffixes(), notes, needed)


def read_image_splits(
    dataset: str, needs_train: bool = True, with_unlabelled: bool = False
) -> tuple[Splits, list[str]]:
    """The splits of a dataset, and notes on what is not used."""
    path = Path(dataset)
    if dataset not in KNOWN and path.suffix.lower() not in READERS and _is_file(path):
        raise UserError(f"{dataset} is a file: unpack it if it is an archive, and pass the folder as --dataset")
    notes: list[str] = []
    contents = "parquet files, tables of image files (CSV, JSON) or one folder of images per class"
    read = partial(_read_folder, needs_train=needs_train, notes=notes)
    splits, unused = read_splits(dataset, KNOWN, contents, read, needs_train, with_unlabelled)
    return splits, notes + unused


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long: read_splits reports it
        return False


def _read_folder(folder: Path, needs_train: bool, notes: list[str]) -> Splits:
    """Reads tables of images, or of their paths, named by split, or SPLIT/CLASS/NAME.png."""
    contents = list_folder(folder)
    tables = [path for path in contents if path.suffix == ".parquet" or is_list_of_a_split(path)]
    if not tables:
        return read_class_folders(folder, needs_train, notes)
    unread = [path.name for path in contents if path.is_dir() and path.name in SPLIT_NAMES]
    if unread:
        kind = "parquet files" if tables[0].suffix == ".parquet" else f"tables such as {tables[0].name}"
        notes.append(f"folders are not searched for images, since there are {kind}: {shorten_list(unread)}")
    return read_folder(folder, notes)


# ---- columns ----


def _choose_columns(raw: Splits, image: str | None, label: str | None, notes: list[str]) -> tuple[str, str]:
    """The columns that flags name, or the first candidates. A note reports a choice among several candidates."""
    features = next(iter(raw.values())).features
    labelled = {name: kind for rows in raw.values() for name, kind in rows.features.items()}  # train may lack labels
    for name, known in ((image, features), (label, labelled)):
        if name is not None and name not in known:
            raise UserError(f"there is no column {name!r}: the columns are {', '.join(known)}")
    if image is not None and not _holds_images(features[image]):
        raise UserError(f"column {image!r} holds no images, and no paths of local ones: pass another --image_column")
    images = [image] if image else [name for name, kind in features.items() if _holds_images(kind)]
    labels = [label] if label else [name for name in LABELS if name in labelled]
    if not images or not labels:
        missing = (
            "labels: pass --label_column" if images else "images, or of local paths of images: pass --image_column"
        )
        raise UserError(f"no column of {missing}; the columns are {', '.join(labelled)}")
    if is_list(labelled[labels[0]]):
        raise UserError(
            f"column {labels[0]!r} holds several labels per image, and image classifiers have one: pass another "
            "--label_column, or use kd.common.distill"
        )
    if label is None:
        classes = [name for name, kind in labelled.items() if isinstance(kind, datasets.ClassLabel)]
        labels += [name for name in classes if name not in labels]
    for kind, flag, names in (("images", "--image_column", images), ("labels", "--label_column", labels)):
        if len(names) > 1:
            notes.append(f"column {names[0]!r} holds the {kind}; {flag} names another of {', '.join(names)}")
    return images[0], labels[0]


def _holds_images(kind: object) -> bool:
    """Whether a column may contain images, even if the file does not declare it."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def image_files(split: str, rows: datasets.Dataset, image: str) -> datasets.Dataset:
    """The column of images as files, {"bytes", "path"}, under the name `image`."""
    if image not in rows.features:
        raise UserError(
            f"the {split} split lacks column {image!r} that train has: its columns are {', '.join(rows.column_names)}"
        )
    if not _holds_images(rows.features[image]):
        raise UserError(f"column {image!r} of {split} holds no images: use the same type as in train")
    files = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return files if image == "image" else files.rename_column(image, "image")
