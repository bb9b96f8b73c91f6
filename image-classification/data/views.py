"""Views of images, as a model sees them: in training random parts of an image, otherwise always the same.

Of small images every crop of the padded image, plain and mirrored, has a number: with a padding of 4 there are 9 x 9
crops x 2 = 162 views. Which view of which image is shown in which epoch is a function of (seed, epoch) alone, so
teacher and student see the same one, a resumed run sees what it would have seen, and a teacher's outputs for a view
can be looked up by its number.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

from kd.image_classification.data.sources import Rows


class ImageViews(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images as a model sees them, yielded a whole batch at a time; collate with `identity_collate`."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the view of each image, where it has several. Called by the trainer before each epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """pixel_values (batch, 3, size, size) fp32 normalized, in channels_last order, labels and sample_id (batch,).
        Grey images become three equal channels.
        """
        raise NotImplementedError


class Views(ImageViews):
    """Small images in one uint8 tensor. A batch also holds `view` (batch,), the number of each view.

    Args:
        images: (samples, height, width, channels) uint8, on the device where they are to be cropped.
        labels: (samples,) int64.
        mean, std: per channel, of pixels between 0 and 1.
        padding: pixels of black around the image in which crops may lie; 0 for evaluation.
        flip: whether mirrored views exist.
        seed: decides the view of each image in each epoch.
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
        pixels = self.normalized(self.crop(ids, views))
        return {"pixel_values": pixels, "labels": self.labels[ids], "sample_id": ids, "view": views}

    def crop(self, ids: Tensor, views: Tensor) -> Tensor:
        """Pixels (batch, height, width, channels) uint8 of view number `views` (batch,) of images `ids` (batch,).

        view = 2 * place + mirrored where there are mirrored views, else place; place = (2 * padding + 1) * top + left.
        """
        height, width = self.size
        place, mirrored = (views // 2, views % 2) if self.flip else (views, torch.zeros_like(views))
        top, left = place // (2 * self.padding + 1), place % (2 * self.padding + 1)
        down = rearrange(top, "batch -> batch 1 1") + rearrange(torch.arange(height, device=views.device), "h -> h 1")
        across = torch.arange(width, device=views.device)
        across = torch.where(rearrange(mirrored == 1, "batch -> batch 1 1"), across.flip(0), across)
        return self.images[rearrange(ids, "batch -> batch 1 1"), down, across + rearrange(left, "batch -> batch 1 1")]

    def normalized(self, pixels: Tensor) -> Tensor:
        """The model's input (batch, 3, height, width) of pixels (batch, height, width, channels) uint8."""
        colour = ((pixels.float() - self.mean) * self.scale).expand(-1, -1, -1, 3)
        colour = rearrange(colour, "batch height width channels -> batch channels height width")
        return colour.contiguous(memory_format=torch.channels_last)  # copies grey images only


class LargeViews(ImageViews):
    """Images decoded on demand, since too many pixels for memory, and cropped as in ImageNet.

    With `augment` a view is a random 8 to 100 % of the image's area, resized; it is a function of (seed, epoch, image)
    alone, whichever process makes it and however many there are, so that a run that is resumed sees what it would have
    seen. Otherwise it is the centre, after the shorter side was resized to `shorter_side(size)`.

    There is no `view`: the views of an image cannot be counted, so nothing can be looked up by their number. Batches
    lie on `device`, or on the CPU where a worker process makes them.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.device, self.augment, self.seed = rows, device, augment, seed
        self.mean, self.std = torch.tensor(mean) * 255, torch.tensor(std) * 255
        steps: list[torch.nn.Module] = [v2.Resize(shorter_side(size)), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(steps)
        self.epoch = torch.tensor(0).share_memory_()  # workers see it, also those that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        in_worker = torch.utils.data.get_worker_info() is not None  # where a GPU cannot be touched after a fork
        device = torch.device("cpu") if in_worker else self.device
        pixels = torch.stack([self.view(row) for row in rows]).to(device)  # (batch, size, size, 3) uint8
        normalized = (pixels.float() - self.mean.to(device)) / self.std.to(device)
        ids = torch.tensor(rows)
        return {
            "pixel_values": rearrange(normalized, "batch height width channels -> batch channels height width"),
            "labels": self.rows.labels[ids].to(device),
            "sample_id": ids.to(device),
        }

    def view(self, row: int) -> Tensor:
        """(size, size, 3) uint8: this epoch's view of an image."""
        picture = self.rows.image(row).convert("RGB")
        with torch.random.fork_rng(devices=[], enabled=self.augment):
            if self.augment:
                seed = random_numbers(self.seed, int(self.epoch), row, 1).item()
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset those of GPUs as well
            return torch.from_numpy(np.array(self.transform(picture)))


def random_numbers(seed: int, epoch: int, row: int, count: int) -> np.ndarray:
    """`count` uint32 numbers for a view. SeedSequence mixes the three well; a generator of torch uses only the lower
    32 bits of its seed.
    """
    return np.random.SeedSequence([seed, epoch, row]).generate_state(count)


def shorter_side(size: int) -> int:
    """What the shorter side is resized to before the centre is cut out: 256 for 224."""
    return round(size * 256 / 224)


OPERATIONS = 2  # on each image
CUT_OUT = 0.5  # of the width, at most


def _shear_x(image: Tensor, shear: float) -> Tensor:
    return F.affine(image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(shear)), 0.0], center=[0, 0])


def _shear_y(image: Tensor, shear: float) -> Tensor:
    return F.affine(image, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(shear))], center=[0, 0])


def _translate_x(image: Tensor, share: float) -> Tensor:
    return F.affine(image, 0.0, [round(share * image.shape[-1]), 0], 1.0, [0.0, 0.0])


def _translate_y(image: Tensor, share: float) -> Tensor:
    return F.affine(image, 0.0, [0, round(share * image.shape[-2])], 1.0, [0.0, 0.0])


# RandAugment's operations on images (channels, height, width) uint8, and the range of the magnitude of each, with the
# ranges of MLKD's code. What comes in from outside the image is black.
AUGMENTATIONS: tuple[tuple[Callable[[Tensor, float], Tensor], float, float], ...] = (
    (lambda image, _: F.autocontrast(image), 0.0, 0.0),
    (F.adjust_brightness, 0.05, 0.95),
    (F.adjust_saturation, 0.05, 0.95),
    (F.adjust_contrast, 0.05, 0.95),
    (lambda image, _: F.equalize(image), 0.0, 0.0),
    (lambda image, _: image, 0.0, 0.0),
    (lambda image, bits: F.posterize(image, int(bits)), 4.0, 8.0),
    (F.rotate, -30.0, 30.0),
    (F.adjust_sharpness, 0.05, 0.95),
    (_shear_x, -0.3, 0.3),
    (_shear_y, -0.3, 0.3),
    (F.solarize, 0.0, 256.0),
    (_translate_x, -0.3, 0.3),
    (_translate_y, -0.3, 0.3),
)


class StrongViews(Views):
    """A batch holds its images twice: pixel_values (2 * batch, 3, height, width) are the views of `Views`, then other
    crops of the same images, changed; labels and sample_id (2 * batch,).

    Crop and change are a function of (seed, epoch, image) alone. There is no `view`: such views cannot be counted, so
    nothing can be looked up by their number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epoch = torch.tensor(0).share_memory_()  # workers see it, also those that outlive an epoch
        super().__init__(*args, **kwargs)
        self.grey = self.mean.round().to(torch.uint8)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch.fill_(epoch)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        weak = super().__getitems__(rows)
        drawn = np.stack([random_numbers(self.seed, int(self.epoch), row, 2) for row in rows]).astype(np.int64)
        views = torch.from_numpy(drawn[:, 0] % self.number_of_views).to(weak["sample_id"].device)
        crops = rearrange(self.crop(weak["sample_id"], views), "batch h w channels -> batch channels h w")
        changed = [self._changed(int(seed), image) for seed, image in zip(drawn[:, 1], crops, strict=True)]
        strong = rearrange(torch.stack(changed), "batch channels h w -> batch h w channels")
        return {
            "pixel_values": torch.cat([weak["pixel_values"], self.normalized(strong)]),
            "labels": weak["labels"].repeat(2),
            "sample_id": weak["sample_id"].repeat(2),
        }

    def _changed(self, seed: int, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        for change in draw_changes(generator):
            image = change(image)
        return cut_out(image, self.grey, generator)


def draw_changes(generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """OPERATIONS of the AUGMENTATIONS, the same one maybe twice, each with a magnitude drawn from its range."""
    numbers = torch.randint(len(AUGMENTATIONS), (OPERATIONS,), generator=generator).tolist()
    shares = torch.rand(OPERATIONS, generator=generator).tolist()
    drawn = [(*AUGMENTATIONS[number], share) for number, share in zip(numbers, shares, strict=True)]
    return [partial(_apply, operation, low + share * (high - low)) for operation, low, high, share in drawn]


def cut_out(image: Tensor, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a square of up to CUT_OUT of the width of an image (channels, height, width) with a value for each channel
    (channels,). Its centre is anywhere in the image, whose border may cut it.
    """
    share, across, down = torch.rand(3, generator=generator).tolist()
    height, width = image.shape[-2:]
    side = share * CUT_OUT * width
    left, top = int(max(0.0, across * width - side / 2)), int(max(0.0, down * height - side / 2))
    image = image.clone()
    image[:, top : top + round(side), left : left + round(side)] = rearrange(fill, "channels -> channels 1 1")
    return image


def _apply(operation: Callable[[Tensor, float], Tensor], magnitude: float, image: Tensor) -> Tensor:
    return operation(image, magnitude)
