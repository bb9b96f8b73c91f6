"""Rows of raw splits: which column holds what, which picture shows which class, and which rows go where."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.sources import Splits
from common.utils.errors import UserError
from image_classification.data.sources import read_splits

SPLIT_SEED = 0  # of the validation split: not the run's seed, or a teacher of another seed would have seen it
LABELS = ("label", "fine_label", "labels", "class", "target")


class PictureError(UserError):
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
        stored = self.stored(row)
        if stored.get("bytes") is not None:
            return stored["bytes"]
        if not stored.get("path"):
            raise PictureError(f"{self.where(row)} is missing: remove the row or give it a picture")
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise PictureError(f"{self.where(row)} cannot be read ({error.strerror}): replace or remove it") from None

    def picture(self, row: int) -> Image.Image:
        """Grey (mode L) or in colour (RGB), turned upright."""
        encoded = self.encoded(row)
        try:
            return _eight_bit(datasets.Image().decode_example({"bytes": encoded, "path": None}))
        except UnidentifiedImageError:
            reason = "it is no picture"
        except Exception as error:  # damaged bytes: OSError, SyntaxError, zlib.error, whatever the decoder raises
            reason = " ".join(str(error).split())
        raise PictureError(f"{self.where(row)} cannot be read ({reason}): replace or remove it")


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in ("L", "RGB"):
        return picture
    if picture.mode[0] in "IF":  # pillow would clip what is above 255, so nearly everything, to white
        raise ValueError("more than 8 bits per pixel")
    return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")


def read_rows(
    dataset: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[dict[str, Rows], list[str], list[str]]:
    """The splits of `dataset`, the names of its classes by id, and notes on what was left out."""
    raw, notes = read_splits(dataset)
    image, label = _columns(raw["train"], image_column, label_column)
    _drop_unlabelled_test(raw, label, notes)
    for split, rows in raw.items():
        _check(split, rows, image, label)
    names = _class_names(raw["train"], label)
    labels = {"train": _class_ids("train", raw["train"], label, names, range(len(names)))}
    seen = set(labels["train"])
    labels |= {
        split: _class_ids(split, rows, label, names, seen) for split, rows in raw.items() if split not in labels
    }
    splits = {
        split: Rows(split, _encoded(rows, image), torch.arange(len(rows)), torch.tensor(labels[split]))
        for split, rows in raw.items()
    }
    return splits, names, notes


def _check(split: str, rows: datasets.Dataset, image: str, label: str) -> None:
    if not len(rows):
        raise UserError(f"the {split} split is empty: it needs at least one image")
    for column in (image, label):
        if column not in rows.features:
            raise UserError(
                f"the {split} split lacks column {column!r} that train has: its columns are {rows.column_names}"
            )


def split_off(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Two parts, the second a stratified `share`."""
    chosen = stratified(rows.labels, share)
    return rows[~chosen], rows[chosen]


def stratified(labels: Tensor, share: float) -> Tensor:
    """Mask (samples,) of a `share` of them: of all in the order of their labels, evenly spaced ones."""
    order = np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(labels)), labels.numpy()))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[np.diff(np.floor(np.arange(len(labels) + 1) * share + 0.5)) > 0]] = True
    return torch.from_numpy(chosen)


def _columns(rows: datasets.Dataset, image: str | None, label: str | None) -> tuple[str, str]:
    features = rows.features
    for name in filter(None, (image, label)):
        if name not in features:
            raise UserError(f"there is no column {name!r}: the columns are {', '.join(features)}")
    if image is not None and not _holds_images(features[image]):
        raise UserError(f"column {image!r} holds no images: name another with --image_column")
    image = image or next((name for name, kind in features.items() if _holds_images(kind)), None)
    label = label or next((name for name in LABELS if name in features), None)
    if image is None or label is None:
        what = "images: name it with --image_column" if image is None else "labels: name it with --label_column"
        raise UserError(f"no column of {what}; the columns are {', '.join(features)}")
    if not isinstance(features[label], datasets.ClassLabel | datasets.Value):
        raise UserError(f"column {label!r} holds no class ids: name another with --label_column")
    return image, label


def _holds_images(kind: object) -> bool:
    """Whether a column is one of pictures, also where the file does not say so."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def _encoded(rows: datasets.Dataset, image: str) -> datasets.Dataset:
    pictures = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return pictures if image == "image" else pictures.rename_column(image, "image")


def _labels(rows: datasets.Dataset, label: str) -> list[Any]:
    return rows.select_columns([label])[:][label]  # the column alone: all of them would decode every picture


def _drop_unlabelled_test(raw: Splits, label: str, notes: list[str]) -> None:
    if "test" not in raw or not len(raw["test"]):
        return
    if label not in raw["test"].features or all(value in (None, -1) for value in _labels(raw["test"], label)):
        del raw["test"]
        notes.append("the test split has no labels and is not used")


def _class_names(train: datasets.Dataset, label: str) -> list[str]:
    kind = train.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    labels = _labels(train, label)
    for row, value in enumerate(labels):
        if not isinstance(value, int) or value < 0:
            raise UserError(f"row {row} of train: {value!r} in column {label!r} is no class id; give 0, 1, ...")
    return [str(i) for i in range(max(labels) + 1)]


def _class_ids(
    split: str, rows: datasets.Dataset, label: str, names: list[str], allowed: Collection[int]
) -> list[int]:
    """Labels as places in `names`, which are train's: another split may list its classes in another order."""
    labels, kind = _labels(rows, label), rows.features[label]
    if isinstance(kind, datasets.ClassLabel) and list(kind.names) != names:
        own, ids = dict(enumerate(kind.names)), {name: i for i, name in enumerate(names)}
        labels = [ids.get(own.get(value, ""), own.get(value, value)) for value in labels]
    for row, value in enumerate(labels):
        if value is None or value == -1:
            raise UserError(f"row {row} of {split} has no label: every image needs one")
        if value not in allowed:
            said = repr(names[value]) if value in range(len(names)) else repr(value)
            right = f"labels are 0 to {len(names) - 1}" if split == "train" else "no image of train has it"
            raise UserError(f"row {row} of {split} has label {said}, but {right}")
    return labels
