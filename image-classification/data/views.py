"""Views of images, which are the inputs of models: random crops in training, otherwise the same view in every epoch.

Small images: every crop of the padded image, plain and mirrored, has a number. A padding of 4 gives 9 x 9 crops x 2 =
162 views. The view of an image depends only on seed and epoch. So teacher and student receive the same view, a resumed
run repeats the views, and the teacher's outputs for a view can be cached by its number.

Strong views follow multi-level logit distillation (Jin et al., CVPR 2023): a crop and mirroring, and another crop and
mirroring of the same image after RandAugment (arXiv:1909.13719) with two operations, each of a random magnitude, and
cutout (arXiv:1708.04552) of a square of up to half the width.
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

from kd.image_classification.data.sources import StoredImages


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


def random_numbers(seed: int, epoch: int, row: int, count: int) -> np.ndarray:
    """`count` uint32 numbers for a view. A generator of torch would use only the lower 32 bits of a combined seed."""
    return np.random.SeedSequence([seed, epoch, row]).generate_state(count)


def shorter_side(size: int) -> int:
    """Size of the shorter side before the center crop: 256 for 224."""
    return round(size * 256 / 224)


OPERATIONS = 2  # on each image
CUT_OUT = 0.5  # maximum side, as a share of the width


def _solarize(image: Tensor, threshold: float) -> Tensor:
    """Inverts the values (0 to 255) that reach the threshold; torchvision rejects thresholds above 255."""
    return image if threshold > 255 else F.solarize(image, threshold)


def _shear_x(image: Tensor, shear: float) -> Tensor:
    return F.affine(image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(shear)), 0.0], center=[0, 0])


def _shear_y(image: Tensor, shear: float) -> Tensor:
    return F.affine(image, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(shear))], center=[0, 0])


def _translate_x(image: Tensor, share: float) -> Tensor:
    return F.affine(image, 0.0, [round(share * image.shape[-1]), 0], 1.0, [0.0, 0.0])


def _translate_y(image: Tensor, share: float) -> Tensor:
    return F.affine(image, 0.0, [0, round(share * image.shape[-2])], 1.0, [0.0, 0.0])


# RandAugment's operations on images (channels, height, width) uint8, and their ranges of magnitudes in MLKD's code.
# Pixels from outside the image are black.
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
    (_solarize, 0.0, 256.0),
    (_translate_x, -0.3, 0.3),
    (_translate_y, -0.3, 0.3),
)


class StrongViews(Views):
    """Two views per image: pixel_values (2 * batch, 3, height, width) are those of `Views`, then strongly augmented
    crops of the same images; labels and sample_id (2 * batch,).

    The augmentation depends only on (seed, epoch, image). A batch has no `view`, because these views are not numbered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epoch = torch.tensor(0).share_memory_()  # shared with persistent workers
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
        augmented = [self._augment(int(seed), image) for seed, image in zip(drawn[:, 1], crops, strict=True)]
        strong = rearrange(torch.stack(augmented), "batch channels h w -> batch h w channels")
        return {
            "pixel_values": torch.cat([weak["pixel_values"], self.normalized(strong)]),
            "labels": weak["labels"].repeat(2),
            "sample_id": weak["sample_id"].repeat(2),
        }

    def _augment(self, seed: int, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        for operation in draw_operations(generator):
            image = operation(image)
        return cut_out(image, self.grey, generator)


def draw_operations(generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """Draws OPERATIONS of the AUGMENTATIONS with replacement, each with a magnitude from its range."""
    numbers = torch.randint(len(AUGMENTATIONS), (OPERATIONS,), generator=generator).tolist()
    shares = torch.rand(OPERATIONS, generator=generator).tolist()
    drawn = [(*AUGMENTATIONS[number], share) for number, share in zip(numbers, shares, strict=True)]
    return [partial(_apply, operation, low + share * (high - low)) for operation, low, high, share in drawn]


def cut_out(image: Tensor, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a square of up to CUT_OUT of the width of an image (channels, height, width) with `fill` (channels,). Its
    center is anywhere in the image, so the square may exceed the border.
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
