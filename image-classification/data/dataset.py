"""What scripts, students and reports need to know of a dataset of images, however it is held."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Split(Protocol):
    """Images of which the labels (images,) int64 are known."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...


class ImageViews(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images as a model sees them, yielded a whole batch at a time; collate with `identity_collate`."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the view of each image, where it has several."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """pixel_values (batch, 3, size, size) fp32 normalized, labels and sample_id (batch,)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A dataset of square images: train (not where a model is only measured), and validation or test or both."""

    name: str
    splits: Mapping[str, Split]
    label_names: list[str]  # by class id
    mean: list[float]  # per channel, of pixels between 0 and 1; a single one where all images are grey
    std: list[float]
    size: int  # of what a model sees, in pixels
    fingerprint: str  # of the contents
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

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

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> ImageViews:
        """The images of a split, each always the same, or (`augment`) another view of it in every epoch, or (`strong`)
        two. Raises UserError for `strong` where there are no such views.
        """
        raise NotImplementedError
