"""Where images come from - embedded, known by name, local, or the Hub - and which columns hold images and labels."""

import io
import os
from collections.abc import Iterator
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

from kd.common.data.labels import read_labels, shorten_list
from kd.common.data.readers import READERS
from kd.common.data.sources import SPLIT_NAMES, KnownDatasets, Splits, holdout, list_folder, read_folder, read_splits
from kd.common.utils.errors import UserError
from kd.image_classification.data.folders import read_class_folders


class ImageError(UserError):
    """A picture that cannot be used. One line also from a worker process, which adds its traceback in front."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Rows:
    """Pictures as they are stored: those at `places` (images,) of a raw split, with labels (images,) int64."""

    split: str  # the name of the raw split, for messages: a validation split may have been cut out of train
    source: datasets.Dataset  # of one column `image`, {"bytes", "path"}
    places: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.split, self.source, self.places[chosen], self.labels[chosen])

    def stored(self, row: int) -> dict[str, Any]:
        """What the dataset has of a picture: the `bytes` of its file, or the `path` to it."""
        return self.source[int(self.places[row])]["image"] or {}

    def where(self, row: int) -> str:
        stored = self.stored(row)
        by_number = f"image {int(self.places[row])} of {self.split}"
        return by_number if stored.get("bytes") is not None else stored.get("path") or by_number

    def encoded(self, row: int) -> bytes:
        """The file of a picture, PNG or JPEG as it may be."""
        with self._opened(row) as file:
            return file.read()

    def file_sizes(self) -> np.ndarray:
        """Bytes (images,) int64 of each file, without reading any."""
        images = self.source.with_format("arrow")[:]["image"]
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), -1).to_numpy()
        paths = pc.struct_field(images, "path").to_pylist()
        sizes = lengths.astype(np.int64)[self.places.numpy()]
        for row in np.flatnonzero(sizes < 0).tolist():
            try:
                sizes[row] = os.stat(paths[int(self.places[row])] or "").st_size
            except OSError:
                self.check(row)  # which refuses it in one line
        return sizes

    def image(self, row: int) -> Image.Image:
        """Grey (mode L) or in colour (RGB), turned upright."""
        encoded = self.encoded(row)
        with self._decoding(row, len(encoded)):
            return _eight_bit(datasets.Image().decode_example({"bytes": encoded, "path": None}))

    def check(self, row: int) -> None:
        """Raises ImageError where the beginning of a picture's file is that of none, or of one that is not used."""
        with self._opened(row) as file, self._decoding(row, file.seek(0, io.SEEK_END)), Image.open(file) as picture:
            _refuse_deep(picture)

    @contextmanager
    def _opened(self, row: int) -> Iterator[BinaryIO]:
        """The file of a picture; what the operating system refuses is one line."""
        stored = self.stored(row)
        held, path = stored.get("bytes"), stored.get("path")
        if held is None and not path:
            raise ImageError(f"{self.where(row)} is missing: remove the row or give it a picture")
        try:
            with io.BytesIO(held) if held is not None else Path(str(path)).open("rb") as file:
                yield file
        except OSError as error:
            raise ImageError(f"{self.where(row)} cannot be read ({error.strerror}): replace or remove it") from None

    @contextmanager
    def _decoding(self, row: int, size: int) -> Iterator[None]:
        """Turns whatever a decoder raises about a file of `size` bytes into one line."""
        try:
            yield
            return
        except UnidentifiedImageError:
            reason = "it is no picture" if size else "the file is empty"
        except Image.DecompressionBombError:
            reason = f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        except Exception as error:  # damaged bytes: OSError, SyntaxError, zlib.error, whatever the decoder raises
            reason = " ".join(str(error).split())
        raise ImageError(f"{self.where(row)} cannot be read ({reason}): replace or remove it")


def _eight_bit(picture: Image.Image) -> Image.Image:
    _refuse_deep(picture)
    if picture.mode in ("L", "RGB"):
        return picture
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # as Pillow asks for
    return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")


def _refuse_deep(picture: Image.Image) -> None:
    if picture.mode[0] in "IF":  # pillow would clip what is above 255, so nearly everything, to white
        raise ValueError("it has more than 8 bits per pixel, and is to be converted to 8")


LABELS = ("label", "fine_label", "labels", "class", "target")  # columns, in the order of preference


def embedded_digits() -> Splits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 (UCI, Alpaydin and Kaynak 1998), of which a fifth is test."""
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    rows = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    test = holdout(digits.target, 0.2)
    return {"train": rows.select(np.flatnonzero(~test)), "test": rows.select(np.flatnonzero(test))}


KNOWN: KnownDatasets = {
    "digits": embedded_digits,
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}


def read_rows(
    dataset: str, image_column: str | None = None, label_column: str | None = None, known: list[str] | None = None
) -> tuple[dict[str, Rows], list[str], list[str]]:
    """The rows of `dataset` that have a label, the names of its classes by id, and notes on what was left out.

    known: the classes of a model that is only evaluated on the dataset, which then needs no train split.
    """
    raw, notes = read_image_splits(dataset, known is None)
    image, label = _choose_columns(next(iter(raw.values())), image_column, label_column, notes)
    try:
        labels = read_labels(raw, label, "ids", known)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    splits = {}
    for split, places in labels.rows.items():
        pictures = _stored(split, raw[split], image)
        splits[split] = Rows(split, pictures, torch.from_numpy(places), torch.from_numpy(labels.values[split]))
    return splits, labels.names, notes + labels.notes


def read_image_splits(dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """The splits by their usual names, and notes on what was left out."""
    path = Path(dataset)
    if dataset not in KNOWN and path.suffix.lower() not in READERS and _is_file(path):
        raise UserError(f"{dataset} is a file: unpack it if it is an archive, and pass --dataset with the folder")
    notes: list[str] = []
    contents = "parquet files or one folder of images per class"
    read = partial(_read_folder, needs_train=needs_train, notes=notes)
    splits, unused = read_splits(dataset, KNOWN, contents, read, needs_train)
    return splits, notes + unused


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name, which read_splits refuses
        return False


def _read_folder(folder: Path, needs_train: bool, notes: list[str]) -> Splits:
    """Parquet files named by split, or SPLIT/CLASS/picture.png."""
    inside = list_folder(folder)
    if not any(path.suffix == ".parquet" for path in inside):
        return read_class_folders(folder, needs_train, notes)
    unread = [path.name for path in inside if path.is_dir() and path.name in SPLIT_NAMES]
    if unread:
        notes.append(f"folders are not read where there are parquet files: {shorten_list(unread)}")
    return read_folder(folder)


# ---------------------------------------------------------------- columns


def _choose_columns(rows: datasets.Dataset, image: str | None, label: str | None, notes: list[str]) -> tuple[str, str]:
    """The columns that are named, else the first that may hold images or labels, which a note reports."""
    features = rows.features
    for name in filter(None, (image, label)):
        if name not in features:
            raise UserError(f"there is no column {name!r}: the columns are {', '.join(features)}")
    if image is not None and not _holds_images(features[image]):
        raise UserError(
            f"column {image!r} holds no images (names of files are not read): name another with --image_column"
        )
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    images = [image] if image else [name for name, kind in features.items() if _holds_images(kind)]
    labels = [label] if label else [name for name in LABELS if name in features]
    if not images or not labels:
        what = "images (names of files are not read): name it with --image_column"
        what = "labels: name it with --label_column" if images else what
        raise UserError(f"no column of {what}; the columns are {', '.join(features)}")
    if label is None:
        labels += [name for name in classes if name not in labels]
    for kind, flag, names in (("images", "--image_column", images), ("labels", "--label_column", labels)):
        if len(names) > 1:
            notes.append(f"column {names[0]!r} holds the {kind}; {flag} names another of {', '.join(names)}")
    return images[0], labels[0]


def _holds_images(kind: object) -> bool:
    """Whether a column is one of pictures, also where the file does not declare it."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def _stored(split: str, rows: datasets.Dataset, image: str) -> datasets.Dataset:
    """The pictures as files, {"bytes", "path"}, in one column `image`."""
    if image not in rows.features:
        raise UserError(
            f"the {split} split lacks column {image!r} that train has: its columns are {', '.join(rows.column_names)}"
        )
    if not _holds_images(rows.features[image]):
        raise UserError(f"column {image!r} of {split} holds no images: give it the type that it has in train")
    pictures = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return pictures if image == "image" else pictures.rename_column(image, "image")
