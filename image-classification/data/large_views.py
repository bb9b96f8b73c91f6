"""Views of images of any shape, decoded for each batch: the crops of ImageNet training and evaluation."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from kd.image_classification.data.sources import StoredImages
from kd.image_classification.data.views import ImageViews, random_numbers


class LargeViews(ImageViews):
    """Images decoded for each batch, with the crops of ImageNet training.

    With `augment`, a view is a resized crop of 8 to 100 % of the image's area. It depends only on seed, epoch and
    image, for any number of worker processes, so a resumed run repeats the views. Otherwise it is the center crop
    after resizing the shorter side to `shorter_side(size)`.

    A batch has no `view`, because these views are not numbered. Batches are on `device`; those of a worker process are
    on the CPU.
    """

    def __init__(
        self,
        images: StoredImages,
        size: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.device, self.augment, self.seed = images, device, augment, seed
        self.mean, self.std = torch.tensor(mean) * 255, torch.tensor(std) * 255
        steps: list[torch.nn.Module] = [v2.Resize(shorter_side(size)), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(steps)
        self.epoch = torch.tensor(0).share_memory_()  # shared with persistent workers

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        in_worker = torch.utils.data.get_worker_info() is not None  # a forked process cannot use the GPU
        device = torch.device("cpu") if in_worker else self.device
        pixels = torch.stack([self.view(row) for row in rows]).to(device)  # (batch, size, size, 3) uint8
        normalized = (pixels.float() - self.mean.to(device)) / self.std.to(device)
        ids = torch.tensor(rows)
        return {
            "pixel_values": rearrange(normalized, "batch height width channels -> batch channels height width"),
            "labels": self.images.labels[ids].to(device),
            "sample_id": ids.to(device),
        }

    def view(self, row: int) -> Tensor:
        """The view (size, size, 3) uint8 of an image in this epoch."""
        image = self.images.image(row).convert("RGB")
        with torch.random.fork_rng(devices=[], enabled=self.augment):
            if self.augment:
                seed = random_numbers(self.seed, int(self.epoch), row, 1).item()
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the GPUs
            return torch.from_numpy(np.array(self.transform(image)))


def shorter_side(size: int) -> int:
    """Size of the shorter side before the center crop: 256 for 224."""
    return round(size * 256 / 224)
