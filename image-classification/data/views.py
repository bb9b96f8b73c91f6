"""Views of images, which are the inputs of models: random crops in training, otherwise the same view in every epoch.

Small images: every crop of the padded image, plain and mirrored, has a number. A padding of 4 gives 9 x 9 crops x 2 =
162 views. The view of an image depends only on seed and epoch. So teacher and student receive the same view, a resumed
run repeats the views, and the teacher's outputs for a view can be cached by its number.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


class ImageViews(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A dataset that returns whole batches; use `identity_collate` as collator."""

    def set_epoch(self, epoch: int) -> None:
        """Selects the view of each image. The trainer calls it before each epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """pixel_values (batch, 3, size, size) fp32, normalized, channels_last; labels and sample_id (batch,).
        Grey images are repeated to three channels.
        """
        raise NotImplementedError


class Views(ImageViews):
    """Small images in one uint8 tensor. A batch also has `view` (batch,), the number of each view.

    Args:
        images: (samples, height, width, channels) uint8, on the device that crops them.
        labels: (samples,) int64.
        mean, std: per channel, of pixels between 0 and 1.
        padding: width of the black border from which crops are taken; 0 for evaluation.
        flip: whether half of the views are mirrored.
        seed: determines the view of each image in each epoch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: list[float],
        std: list[float],
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.padding, self.flip, self.seed = padding, flip, seed
        self.size = images.shape[1:3]
        self.images = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        self.labels = labels.to(images.device)
        self.mean = torch.tensor(mean, device=images.device) * 255
        self.scale = 1 / (torch.tensor(std, device=images.device) * 255)
        self.views = torch.zeros(len(images), dtype=torch.long).share_memory_()  # with persistent workers
        self.set_epoch(0)

    @property
    def number_of_views(self) -> int:
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        self.views.copy_(torch.randint(self.number_of_views, (len(self.images),), generator=generator))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(rows)
        numbers = torch.stack([chosen, self.views[chosen]])
        if self.images.is_cuda:
            numbers = numbers.pin_memory()  # otherwise the copy would wait for pending GPU work
        ids, views = numbers.to(self.images.device, non_blocking=True)
        pixels = self.normalized(self.crop(ids, views))
        return {"pixel_values": pixels, "labels": self.labels[ids], "sample_id": ids, "view": views}

    def crop(self, ids: Tensor, views: Tensor) -> Tensor:
        """Pixels (batch, height, width, channels) uint8 of views `views` (batch,) of images `ids` (batch,).

        With flip, view = 2 * position + mirrored; without, view = position. position = (2 * padding + 1) * top + left.
        """
        height, width = self.size
        position, mirrored = (views // 2, views % 2) if self.flip else (views, torch.zeros_like(views))
        top, left = position // (2 * self.padding + 1), position % (2 * self.padding + 1)
        down = rearrange(top, "batch -> batch 1 1") + rearrange(torch.arange(height, device=views.device), "h -> h 1")
        across = torch.arange(width, device=views.device)
        across = torch.where(rearrange(mirrored == 1, "batch -> batch 1 1"), across.flip(0), across)
        return self.images[rearrange(ids, "batch -> batch 1 1"), down, across + rearrange(left, "batch -> batch 1 1")]

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, height, width, channels) uint8 -> model input (batch, 3, height, width)."""
        color = ((pixels.float() - self.mean) * self.scale).expand(-1, -1, -1, 3)
        color = rearrange(color, "batch height width channels -> batch channels height width")
        return color.contiguous(memory_format=torch.channels_last)  # copies only grey images


def random_numbers(seed: int, epoch: int, row: int, count: int) -> np.ndarray:
    """`count` uint32 numbers for a view. A generator of torch would use only the lower 32 bits of a combined seed."""
    return np.random.SeedSequence([seed, epoch, row]).generate_state(count)
