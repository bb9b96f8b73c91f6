"""Loads image datasets: small images into one uint8 tensor in memory, large ones as files that are decoded later."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.labels import map_label_ids, shorten_list
from kd.common.data.sources import choose_validation, short_name, stratified
from kd.common.utils.errors import UserError
from kd.image_classification.data.sources import Rows, read_rows
from kd.image_classification.data.views import ImageViews, LargeViews, StrongViews, Views


class Split(Protocol):
    """Images of which the labels (images,) int64 are known."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A dataset of square images: train (not where a model is only evaluated), and validation or test or both."""

    name: str
    splits: Mapping[str, Split]
    label_names: list[str]  # by class id
    mean: list[float]  # per channel, of pixels between 0 and 1; a single one where all images are grey
    std: list[float]
    size: int  # of the model's input, in pixels
    fingerprint: str  # of the contents
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

    @property
    def selection_split(self) -> str:
        """The split on which choices are made and headlines reported: test only where nothing was set aside."""
        return "validation" if "validation" in self.splits else "test"

    @property
    def config(self) -> dict[str, Any]:
        """The part of a classifier's configuration that depends on the data."""
        return {
            "image_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> ImageViews:
        """The images of a split, each always the same, or (`augment`) another view of it in every epoch, or (`strong`)
        two. Raises UserError for `strong` where there are no such views.
        """
        raise NotImplementedError


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


@dataclass(frozen=True, kw_only=True)
class LargeImageData(ImageData):
    """A dataset of images of any shape, decoded when a batch needs them.

    Training needs `--dataloader_num_workers`, of which each decodes some hundred images a second.
    """

    splits: dict[str, Rows]

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> LargeViews:
        """The centre of each image, or (`augment`) a random part of it, mirrored half of the time."""
        if strong:
            raise UserError("--strong_augmentation needs images of at most 64 pixels: leave it out")
        return LargeViews(self.splits[split], self.size, self.mean, self.std, device, augment, seed)


__all__ = ["ImageData", "Images", "LargeImageData", "SmallImageData", "load_image_data"]

LARGEST_IN_MEMORY = 64  # pixels across; what is resized to more is decoded when it is needed
MEMORY = 8 * 2**30  # bytes that the pixels of a dataset may take
IMAGENET_SIZE = 224
SPLITS: list[str] = ["train", "validation", "test"]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # which pretrained networks expect
READ_AT_ONCE = 2**30  # bytes of files that the fingerprint reads whole: a second or two
HASHED = 500  # images of a larger split of which the fingerprint reads at least so many
CHECKED = 50_000  # images of a split of which at most about so many are opened before training


def load_image_data(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    validation_share: float = 0.1,
    max_train_samples: int | None = None,
    label_names: list[str] | None = None,
) -> ImageData:
    """Loads `dataset` and sets a stratified share of train aside where it has no validation split.

    image_size: resize to that many pixels; otherwise all images must be square and of one size. Above
        LARGEST_IN_MEMORY, and for ImageNet, the images are a LargeImageData.
    max_train_samples: keep that many training images, the same ones every time, the classes in proportion.
    label_names: the classes, by id, of a model that is to be evaluated. The dataset has these or some of them. A train
        split is not needed, and not returned.
    """
    splits, class_names, notes = read_rows(dataset, image_column, label_column, label_names)
    splits = _divide(dataset, splits, validation_share, max_train_samples, notes)
    if label_names is not None:
        splits.pop("train", None)
        ids = {split: rows.labels.numpy() for split, rows in splits.items()}
        ids = map_label_ids(dataset, ids, class_names, label_names)
        splits = {split: replace(rows, labels=torch.from_numpy(ids[split])) for split, rows in splits.items()}
        class_names = label_names
        if image_size and any(rows.image(0).size != (image_size, image_size) for rows in splits.values()):
            notes.append(f"images are resized to the {image_size} pixels of the model")
    notes += _missing_classes(splits, class_names)
    name = short_name(dataset)
    if dataset == "imagenet":
        return _large_images(name, splits, class_names, image_size or IMAGENET_SIZE, notes)
    if image_size is not None and (image_size > LARGEST_IN_MEMORY or not _fit_in_memory(splits, image_size, notes)):
        return _large_images(name, splits, class_names, image_size, notes)
    return _small_images(name, splits, class_names, image_size, notes)


def _divide(
    dataset: str, splits: dict[str, Rows], validation_share: float, max_train_samples: int | None, notes: list[str]
) -> dict[str, Rows]:
    """Train with so many images, and validation, where there is to be one, and test."""
    train = splits.get("train")
    if train is not None and "validation" not in splits and validation_share > 0:
        aside = choose_validation(train.labels.numpy(), notes, validation_share, " or pass another --validation_share")
        splits["validation"], train = (train[torch.from_numpy(chosen)] for chosen in (aside, ~aside))
    if train is not None and not {"validation", "test"} & splits.keys():
        raise UserError(f"{dataset} has neither validation nor test images: pass a --validation_share above 0")
    if train is not None and max_train_samples is not None and max_train_samples < len(train):
        whole = len(train)
        train = train[torch.from_numpy(stratified(train.labels.numpy(), max_train_samples / whole))]
        notes.append(f"{len(train):,} of the {whole:,} training images were used")
    divided = splits if train is None else splits | {"train": train}
    return {name: divided[name] for name in SPLITS if name in divided}


def _missing_classes(splits: dict[str, Rows], names: list[str]) -> list[str]:
    """One line for each split that lacks some classes."""
    lines = []
    for split, rows in splits.items():
        there = set(rows.labels.tolist())
        missing = [name for number, name in enumerate(names) if number not in there]
        if missing:
            lines.append(
                f"classes without an image in {split}: {len(missing):,} of {len(names):,} ({shorten_list(missing)})"
            )
    return lines


# ---------------------------------------------------------------- small images


def _small_images(
    name: str, splits: dict[str, Rows], label_names: list[str], size: int | None, notes: list[str]
) -> SmallImageData:
    images = _decode_all(splits, size)
    pixels = next(iter(images.values())).pixels  # those of train, where it is there
    mean, std = channel_statistics(pixels)

    def contents() -> Iterator[object]:
        yield label_names
        for split in sorted(images):
            yield f"{split}{tuple(images[split].pixels.shape)}".encode()
            yield images[split].pixels.numpy()
            yield images[split].labels.numpy()

    return SmallImageData(
        name=name,
        splits=images,
        label_names=label_names,
        mean=mean,
        std=std,
        size=pixels.shape[1],
        flip=pixels.shape[-1] == 3,  # what is grey is mostly writing, which has no mirror image
        fingerprint=data_fingerprint(contents()),
        notes=notes,
    )


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels (images, h, w, channels), on a scale from 0 to 1."""
    sums = torch.zeros(2, pixels.shape[-1], dtype=torch.float64)
    for chunk in pixels.split(4096):
        values = chunk.double() / 255
        sums += torch.stack([reduce(x, "image h w channel -> channel", "sum") for x in (values, values.square())])
    mean, square = sums / (pixels.numel() / pixels.shape[-1])
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-4) for value in std.tolist()]


def _fit_in_memory(splits: dict[str, Rows], size: int, notes: list[str]) -> bool:
    needed = _bytes_of(splits, size, size)
    if needed > MEMORY:
        notes.append(f"decoded when needed: in memory the images would take {needed / 2**30:.1f} GiB")
    return needed <= MEMORY


def _bytes_of(splits: dict[str, Rows], width: int, height: int) -> int:
    channels = len(next(iter(splits.values())).image(0).getbands())
    return sum(map(len, splits.values())) * width * height * channels


def _decode_all(splits: dict[str, Rows], size: int | None) -> dict[str, Images]:
    if size is None:
        width, height = next(iter(splits.values())).image(0).size
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
        picture = rows.image(row)
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


# ---------------------------------------------------------------- large images


def _large_images(
    name: str, splits: dict[str, Rows], label_names: list[str], size: int, notes: list[str]
) -> LargeImageData:
    """Opens the pictures, without decoding them: what is none is found now and not after hours of training."""
    for split, rows in splits.items():
        places = range(0, len(rows), -(-len(rows) // CHECKED))
        for row in tqdm(places, desc=f"checking {split}", leave=False, disable=len(places) < 5000):
            rows.check(row)
    return LargeImageData(
        name=name,
        splits=splits,
        label_names=label_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=size,
        fingerprint=data_fingerprint(_contents_of_files(splits, label_names, size)),
        notes=notes,
    )


def _contents_of_files(splits: dict[str, Rows], label_names: list[str], size: int) -> Iterator[object]:
    """All labels and the sizes of all files in their order, and what the files hold: all of them or, where that would
    take minutes, evenly spaced ones.
    """
    yield [label_names, size]
    for name in sorted(splits):
        rows = splits[name]
        sizes = rows.file_sizes()
        yield f"{name} {len(rows)}".encode()
        yield rows.labels.numpy()
        yield sizes
        for row in range(0, len(rows), 1 if sizes.sum() <= READ_AT_ONCE else max(1, len(rows) // HASHED)):
            yield rows.encoded(row)
