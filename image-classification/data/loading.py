"""One door to every image dataset, and small images: whole in memory, in one uint8 tensor."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.data.sources import short_name
from kd.common.utils.errors import UserError
from kd.image_classification.data.dataset import ImageData
from kd.image_classification.data.large import large_images
from kd.image_classification.data.rows import Rows, read_rows
from kd.image_classification.data.splits import divide, missing_classes, renumbered
from kd.image_classification.data.strong_views import StrongViews
from kd.image_classification.data.views import Views

__all__ = ["ImageData", "SmallImageData", "load_image_data"]

LARGEST_IN_MEMORY = 64  # pixels across; what is resized to more is decoded when it is needed
MEMORY = 8 * 2**30  # bytes that the pixels of a dataset may take
IMAGENET_SIZE = 224


@dataclass(frozen=True)
class Images:
    """One split in memory: pixels (images, height, width, channels) uint8 and labels (images,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class SmallImageData(ImageData):
    """A dataset of small images, whole in memory; mean and std are those of its training pixels."""

    splits: dict[str, Images]
    flip: bool  # whether an image and its mirror image show the same

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> Views:
        """The images of a split as they are, or with random crops (and flips, where they mean the same)."""
        images = self.splits[split]
        padding, flip = (max(1, self.size // 8), self.flip) if augment else (0, False)
        kind = StrongViews if strong else Views
        return kind(images.pixels.to(device), images.labels, self.mean, self.std, padding, flip, seed)


def load_image_data(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    validation_share: float = 0.1,
    train_samples: int | None = None,
    label_names: list[str] | None = None,
) -> ImageData:
    """Loads `dataset` and sets a stratified share of train aside where it has no validation split.

    image_size: resize to that many pixels; otherwise all images must be square and of one size. Above
        LARGEST_IN_MEMORY, and for ImageNet, the images are a LargeImageData.
    train_samples: keep that many training images, the same ones every time, the classes in proportion.
    label_names: the classes, by id, of a model that is to be measured. The dataset has these or some of them. It needs
        no train split, and one that it has is not returned.
    """
    splits, own_names, notes = read_rows(dataset, image_column, label_column, label_names)
    splits = divide(dataset, splits, validation_share, train_samples, notes)
    if label_names is not None:
        measured = {split: rows for split, rows in splits.items() if split != "train"}
        splits = renumbered(dataset, measured, own_names, label_names)
        if image_size and any(rows.picture(0).size != (image_size, image_size) for rows in splits.values()):
            notes.append(f"images are resized to the {image_size} pixels of the model")
    label_names = label_names or own_names
    notes += missing_classes(splits, label_names)
    name = short_name(dataset)
    if dataset == "imagenet":
        return large_images(name, splits, label_names, image_size or IMAGENET_SIZE, notes)
    if image_size is not None and (image_size > LARGEST_IN_MEMORY or not _fit_in_memory(splits, image_size, notes)):
        return large_images(name, splits, label_names, image_size, notes)
    return _small_images(name, splits, label_names, image_size, notes)


def _small_images(
    name: str, splits: dict[str, Rows], label_names: list[str], size: int | None, notes: list[str]
) -> SmallImageData:
    images = _decode_all(splits, size)
    pixels = next(iter(images.values())).pixels  # those of train, where it is there
    mean, std = channel_statistics(pixels)
    return SmallImageData(
        name=name,
        splits=images,
        label_names=label_names,
        mean=mean,
        std=std,
        size=pixels.shape[1],
        flip=pixels.shape[-1] == 3,  # what is grey is mostly writing, which has no mirror image
        fingerprint=_fingerprint(images, label_names),
        notes=notes,
    )


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels (images, h, w, channels), on a scale from 0 to 1."""
    sums = torch.zeros(2, pixels.shape[-1], dtype=torch.float64)
    for chunk in pixels.split(4096):
        flat = chunk.reshape(-1, pixels.shape[-1]).double() / 255
        sums += torch.stack([flat.sum(0), flat.square().sum(0)])
    mean, square = sums / (pixels.numel() / pixels.shape[-1])
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-4) for value in std.tolist()]


def _fit_in_memory(splits: dict[str, Rows], size: int, notes: list[str]) -> bool:
    needed = _bytes_of(splits, size, size)
    if needed > MEMORY:
        notes.append(f"decoded when needed: in memory the images would take {needed / 2**30:.1f} GiB")
    return needed <= MEMORY


def _bytes_of(splits: dict[str, Rows], width: int, height: int) -> int:
    channels = len(next(iter(splits.values())).picture(0).getbands())
    return sum(map(len, splits.values())) * width * height * channels


def _decode_all(splits: dict[str, Rows], size: int | None) -> dict[str, Images]:
    if size is None:
        width, height = next(iter(splits.values())).picture(0).size
        needed = _bytes_of(splits, width, height)
        if needed > MEMORY:
            raise UserError(
                f"images of {width}x{height} pixels would take {needed / 2**30:.1f} GiB in memory: pass --image_size "
                f"N; above {LARGEST_IN_MEMORY} they are decoded when they are needed"
            )
    images = {name: _decode(rows, size) for name, rows in splits.items()}
    sizes = sorted({split.pixels.shape[1] for split in images.values()})
    if len(sizes) > 1:
        raise UserError(f"the splits hold images of different sizes ({sizes} pixels): pass --image_size N")
    channels = max(split.pixels.shape[-1] for split in images.values())
    return {name: Images(i.pixels.expand(-1, -1, -1, channels), i.labels) for name, i in images.items()}


def _decode(rows: Rows, size: int | None) -> Images:
    """Grey images are of one channel, unless there are others in colour."""
    pixels: np.ndarray[Any, Any] | None = None
    for row in tqdm(range(len(rows)), desc=f"decoding {rows.split}", leave=False, disable=len(rows) < 5000):
        picture = rows.picture(row)
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        array = np.atleast_3d(np.asarray(picture))  # (height, width, channels)
        if pixels is None:
            pixels = np.empty((len(rows), *array.shape), dtype=np.uint8)
        height, width = pixels.shape[1:3]
        if array.shape[:2] != (height, width) or height != width:
            first = f", {rows.where(0)} {width}x{height}" if row else ""
            raise UserError(
                f"{rows.where(row)} is {array.shape[1]}x{array.shape[0]} pixels{first}: images must be square and of "
                "one size; pass --image_size N to resize them"
            )
        if array.shape[2] > pixels.shape[3]:
            pixels = np.repeat(pixels, array.shape[2], axis=3)
        pixels[row] = array
    return Images(torch.from_numpy(pixels), rows.labels)


def _fingerprint(splits: dict[str, Images], label_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for name in sorted(splits):
        digest.update(name.encode() + str(tuple(splits[name].pixels.shape)).encode())
        digest.update(splits[name].pixels.contiguous().numpy().data)
        digest.update(splits[name].labels.numpy().data)
    return digest.hexdigest()
