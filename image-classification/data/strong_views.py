"""Strongly augmented views of small images.

They follow multi-level logit distillation (Jin et al., CVPR 2023): a crop and mirroring, and another crop and
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
from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

from kd.image_classification.data.views import Views, random_numbers

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
