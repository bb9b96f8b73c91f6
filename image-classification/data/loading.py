"""One door to every image dataset: embedded, known by name, local folder or Hub name."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from common.sources import Splits
from common.utils.errors import UserError
from image_classification.data.sources import read_splits
from image_classification.data.views import Views

SPLIT_SEED = 0  # of the validation split: not the run's seed, or a teacher of another seed would have seen it
LABELS = ("label", "fine_label", "labels", "class", "target")


@dataclass(frozen=True)
class Images:
    """One split in memory: pixels (samples, height, width, channels) uint8 and labels (samples,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class ImageData:
    """A dataset of small images, whole in memory."""

    name: str
    splits: dict[str, Images]
    label_names: list[str]  # by class id
    mean: list[float]  # per channel, of the training pixels between 0 and 1
    std: list[float]
    flip: bool  # whether an image and its mirror image show the same
    fingerprint: str  # of the contents
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

    @property
    def size(self) -> int:
        return self.splits["train"].pixels.shape[1]

    @property
    def selection_split(self) -> str:
        """The split on which choices are made and headlines reported: test only where nothing was set aside."""
        return "validation" if "validation" in self.splits else "test"

    @property
    def config(self) -> dict[str, Any]:
        """What a classifier of these images remembers of them."""
        return {
            "image_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    def views(self, split: str, device: torch.device, augment: bool = False, seed: int = 0) -> Views:
        """The images of a split as they are, or with random crops (and flips, where they mean the same)."""
        images = self.splits[split]
        padding, flip = (max(1, self.size // 8), self.flip) if augment else (0, False)
        return Views(images.pixels.to(device), images.labels, self.mean, self.std, padding, flip, seed)


def load_image_data(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    validation_share: float = 0.1,
    train_samples: int | None = None,
) -> ImageData:
    """Loads `dataset` and sets a stratified share of train aside where it has no validation split.

    image_size: resize to that many pixels; otherwise all images must be square and of one size.
    train_samples: keep that many training images, the same ones every time, the classes in proportion.
    """
    raw, notes = read_splits(dataset)
    image, label = _columns(raw["train"], image_column, label_column)
    label_names = _label_names(raw["train"], label)
    if "test" in raw and set(raw["test"][:][label]) <= {None, -1}:
        del raw["test"]
        notes.append("the test split has no labels and is not used")
    splits = _decode_all(raw, image, label, len(label_names), image_size)
    if dataset == "digits":  # one file without splits
        splits = dict(zip(("train", "test"), split_off(splits["train"], 0.2), strict=True))
    if "validation" not in splits and validation_share > 0:
        splits["train"], splits["validation"] = split_off(splits["train"], validation_share)
        notes.append(f"no validation split: a stratified {validation_share:.0%} of train was set aside")
    if not {"validation", "test"} & splits.keys():
        raise UserError(f"{dataset} has neither validation nor test images: pass a --validation_share above 0")
    if train_samples is not None and train_samples < len(splits["train"]):
        splits["train"] = split_off(splits["train"], train_samples / len(splits["train"]))[1]
        notes.append(f"{len(splits['train'])} of the training images were used")
    mean, std = channel_statistics(splits["train"].pixels)
    return ImageData(
        name=Path(dataset).resolve().name if Path(dataset).is_dir() else dataset,
        splits={name: splits[name] for name in ("train", "validation", "test") if name in splits},
        label_names=label_names,
        mean=mean,
        std=std,
        flip=splits["train"].pixels.shape[-1] == 3,  # what is grey is mostly writing, which has no mirror image
        fingerprint=_fingerprint(splits, label_names),
        notes=notes,
    )


def split_off(images: Images, share: float) -> tuple[Images, Images]:
    """Two parts, the second a stratified `share`: of the images in the order of their labels, evenly spaced ones."""
    labels = images.labels.numpy()
    order = np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(labels)), labels))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[np.diff(np.floor(np.arange(len(labels) + 1) * share + 0.5)) > 0]] = True
    return images[torch.from_numpy(~chosen)], images[torch.from_numpy(chosen)]


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels (samples, h, w, channels), on a scale from 0 to 1."""
    sums = torch.zeros(2, pixels.shape[-1], dtype=torch.float64)
    for chunk in pixels.split(4096):
        flat = chunk.reshape(-1, pixels.shape[-1]).double() / 255
        sums += torch.stack([flat.sum(0), flat.square().sum(0)])
    mean, square = sums / (pixels.numel() / pixels.shape[-1])
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-4) for value in std.tolist()]


def _columns(rows: datasets.Dataset, image: str | None, label: str | None) -> tuple[str, str]:
    features = rows.features
    for name in filter(None, (image, label)):
        if name not in features:
            raise UserError(f"there is no column {name!r}: the columns are {', '.join(features)}")
    image = image or next((name for name, kind in features.items() if _holds_images(kind)), None)
    label = label or next((name for name in LABELS if name in features), None)
    if image is None or label is None:
        what = "images: name it with --image_column" if image is None else "labels: name it with --label_column"
        raise UserError(f"no column of {what}; the columns are {', '.join(features)}")
    return image, label


def _holds_images(kind: object) -> bool:
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def _label_names(rows: datasets.Dataset, label: str) -> list[str]:
    kind = rows.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    labels = rows[:][label]
    if not all(isinstance(value, int) and value >= 0 for value in labels):
        raise UserError(f"column {label!r} must hold class ids (0, 1, ...), found {labels[0]!r}")
    return [str(i) for i in range(max(labels) + 1)]


def _decode_all(raw: Splits, image: str, label: str, classes: int, size: int | None) -> dict[str, Images]:
    splits = {name: _decode(name, rows, image, label, size) for name, rows in raw.items()}
    channels = max(images.pixels.shape[-1] for images in splits.values())
    sizes = {images.pixels.shape[1:3] for images in splits.values()}
    if len(sizes) > 1:
        raise UserError(f"the splits hold images of different sizes ({sorted(sizes)}): pass --image_size")
    for name, images in splits.items():
        if not (0 <= int(images.labels.min()) and int(images.labels.max()) < classes):
            raise UserError(
                f"the {name} split has labels outside 0 to {classes - 1}: every image needs a class of train"
            )
    return {name: Images(i.pixels.expand(-1, -1, -1, channels), i.labels) for name, i in splits.items()}


def _decode(split: str, rows: datasets.Dataset, image: str, label: str, size: int | None) -> Images:
    if not len(rows):
        raise UserError(f"the {split} split is empty: it needs at least one image")
    labels = rows[:][label]
    if None in labels:
        raise UserError(f"row {labels.index(None)} of {split} has no label: every image needs one")
    if not isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image())
    arrays = [_pixels(picture, size) for picture in _pictures(split, rows, image)]
    channels = max(array.shape[-1] for array in arrays)
    first = arrays[0].shape[:2]
    for row, array in enumerate(arrays):
        if array.shape[:2] != first or first[0] != first[1]:
            raise UserError(
                f"image {row} of {split} is {array.shape[1]}x{array.shape[0]} pixels, image 0 {first[1]}x{first[0]}: "
                "images must be square and of one size; pass --image_size N to resize them"
            )
    pixels = np.stack([np.broadcast_to(array, (*first, channels)) for array in arrays])
    return Images(torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.long))


def _pictures(split: str, rows: datasets.Dataset, column: str) -> Iterator[Image.Image]:
    for row in tqdm(range(len(rows)), desc=f"decoding {split}", leave=False, disable=len(rows) < 5000):
        try:
            yield rows[row][column]
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"image {row} of {split} cannot be read ({error}): replace or remove it") from None


def _pixels(picture: Image.Image | None, size: int | None) -> np.ndarray:
    """(height, width, 1) for grey images, (height, width, 3) for all others."""
    if picture is None:
        raise UserError("a row without an image: remove it")
    picture = picture if picture.mode in ("L", "RGB") else picture.convert("L" if picture.mode == "1" else "RGB")
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[:, :, None]


def _fingerprint(splits: dict[str, Images], label_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for name in sorted(splits):
        digest.update(name.encode() + str(tuple(splits[name].pixels.shape)).encode())
        digest.update(splits[name].pixels.contiguous().numpy().data)
        digest.update(splits[name].labels.numpy().data)
    return digest.hexdigest()
