"""Datasets of square images: small images in one uint8 tensor in memory, large ones as files that views decode."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.image_classification.data.views import ImageViews, Views

if TYPE_CHECKING:
    from kd.common.data.teacher_columns import TeacherColumns
    from kd.image_classification.data.large_views import LargeViews
    from kd.image_classification.data.sources import StoredImages


class Split(Protocol):
    """Images with labels (images,) int64; IGNORED for an image of train without a label."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor) -> "Split": ...


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A dataset of square images: train (unless a model is only evaluated), and validation or test or both."""

    name: str
    splits: Mapping[str, Split]
    label_names: list[str]  # by class id
    mean: list[float]  # per channel, of pixels between 0 and 1; a single value if all images are grey
    std: list[float]
    size: int  # of the model's input, in pixels
    fingerprint: str  # of the contents
    notes: list[str] = field(default_factory=list)  # for the report
    validation_is_from_train: bool = False  # set aside by this project
    places: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # `StoredImages.places` of all but train
    teacher: "TeacherColumns | None" = None  # outputs in columns of the data, logits in the order of the splits
    model_labels: list[str] | None = None  # the labels, by id, of a teacher that does not name its labels

    @property
    def selection_split(self) -> str:
        """The split for model selection and headline metrics: test only if there is no validation split."""
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
        """The images of a split.

        Args:
            augment: draw another view of each image in every epoch.
            strong: also return a strongly augmented view of each image. Raises UserError for large images.
        """
        raise NotImplementedError

    def labelled_train(self) -> "ImageData":
        """The same data without the training images that have no label."""
        known = self.splits["train"].labels != IGNORED
        if known.all():
            return self
        return replace(self, splits={**self.splits, "train": self.splits["train"][known.nonzero().flatten()]})


@dataclass(frozen=True)
class Images:
    """One split in memory: pixels (images, height, width, channels) uint8 and labels (images,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: Tensor) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True, kw_only=True)
class SmallImageData(ImageData):
    """Small images in memory. Mean and std are those of the training pixels."""

    splits: dict[str, Images]
    flip: bool  # whether a mirrored image keeps its class

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> Views:
        """Views of a split: whole images, or (`augment`) random crops, mirrored half of the time if `flip`."""
        images = self.splits[split]
        padding, flip = (max(1, self.size // 8), self.flip) if augment else (0, False)
        kind = Views
        if strong:
            from kd.image_classification.data.strong_views import StrongViews  # imports torchvision

            kind = StrongViews
        return kind(images.pixels.to(device), images.labels, self.mean, self.std, padding, flip, seed)


@dataclass(frozen=True, kw_only=True)
class LargeImageData(ImageData):
    """Images of any shape, decoded for each batch.

    Training needs `--dataloader_num_workers`: each worker decodes a few hundred images per second.
    """

    splits: "dict[str, StoredImages]"

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> "LargeViews":
        """Views of a split: center crops, or (`augment`) random resized crops, mirrored half of the time."""
        if strong:
            raise UserError("--strong_augmentation needs images of at most 64 pixels: leave it out")
        from kd.image_classification.data.large_views import LargeViews

        return LargeViews(self.splits[split], self.size, self.mean, self.std, device, augment, seed)
