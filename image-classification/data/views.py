"""Views of images: every crop of the padded image, plain and mirrored, by number.

With a padding of 4 there are 9 x 9 crops x 2 = 162 views of an image. Which view of which image is shown in which
epoch is a function of (seed, epoch) alone, so teacher and student see the same one, a run that is resumed sees what it
would have seen, and what a teacher says about a view can be looked up by its number.
"""

import torch
from torch import Tensor

from kd.image_classification.data.dataset import ImageViews


class Views(ImageViews):
    """Images in one uint8 tensor, yielded a whole batch at a time; collate with `identity_collate`.

    Args:
        images: (samples, height, width, channels) uint8, on the device where they are to be cropped.
        labels: (samples,) int64.
        mean, std: per channel, of pixels between 0 and 1.
        padding: pixels of black around the image in which crops may lie; 0 for evaluation.
        flip: whether mirrored views exist.
        seed: decides the view of each image in each epoch.

    A batch holds pixel_values (batch, 3, height, width) fp32 in channels_last order, labels, sample_id and view, each
    (batch,). Grey images become three equal channels.
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
        self.views = torch.zeros(len(images), dtype=torch.long).share_memory_()  # with workers that outlive an epoch
        self.set_epoch(0)

    @property
    def number_of_views(self) -> int:
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def set_epoch(self, epoch: int) -> None:
        """Draws a view for each image. Called by the trainer before it iterates over an epoch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        self.views.copy_(torch.randint(self.number_of_views, (len(self.images),), generator=generator))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(rows)
        numbers = torch.stack([chosen, self.views[chosen]])
        if self.images.is_cuda:
            numbers = numbers.pin_memory()  # or the copy would wait for all that the GPU has yet to do
        ids, views = numbers.to(self.images.device, non_blocking=True)
        return {
            "pixel_values": self.normalized(self.crop(ids, views)),
            "labels": self.labels[ids],
            "sample_id": ids,
            "view": views,
        }

    def crop(self, ids: Tensor, views: Tensor) -> Tensor:
        """Pixels (batch, height, width, channels) uint8 of view number `views` (batch,) of images `ids` (batch,).

        view = 2 * place + mirrored where there are mirrored views, else place; place = (2 * padding + 1) * top + left.
        """
        height, width = self.size
        mirrored = views % 2 == 1 if self.flip else torch.zeros_like(views, dtype=torch.bool)
        place = views // 2 if self.flip else views
        top, left = place // (2 * self.padding + 1), place % (2 * self.padding + 1)
        across = torch.arange(width, device=views.device).expand(len(views), width)
        across = torch.where(mirrored.unsqueeze(1), width - 1 - across, across) + left.unsqueeze(1)  # (batch, width)
        down = torch.arange(height, device=views.device) + top.unsqueeze(1)  # (batch, height)
        return self.images[ids[:, None, None], down[:, :, None], across[:, None, :]]

    def normalized(self, pixels: Tensor) -> Tensor:
        """What a model sees (batch, 3, height, width) of pixels (batch, height, width, channels) uint8."""
        pixels = (pixels.float() - self.mean) * self.scale
        pixels = pixels.expand(-1, -1, -1, 3).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=torch.channels_last)  # copies grey images only
