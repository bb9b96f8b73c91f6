"""A dataset of images: small ones whole in memory, large ones decoded when they are needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kd.common.utils.errors import UserError
from kd.image_classification.data.rows import Rows
from kd.image_classification.data.strong_views import StrongViews
from kd.image_classification.data.views import ImageViews, LargeViews, Views


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
