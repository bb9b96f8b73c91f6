"""The embedded images: scikit-learn's handwritten digits, distorted at random.

Each image is a digit that is rotated, scaled, sheared, shifted and dimmed, with a gradient of light and noise. The
splits share no handwriting: each digit of scikit-learn belongs to one split and is drawn once or several times.
"""

from collections.abc import Mapping

import numpy as np
from einops import rearrange
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from kd.common.data.sources import holdout

SIZES: Mapping[str, int] = {"train": 1500, "validation": 500, "test": 1000}
SIZE = 8  # pixels
SEED = 0
ROTATION = np.pi / 9  # the maximum, as those of the next three
SHEAR, SHIFT = 0.2, 1.0  # pixels across per pixel down; pixels
SCALE = 0.8, 1.1
BRIGHTNESS = 0.35, 1.0
GRADIENT, NOISE = 0.15, 0.05  # standard deviations, of pixels between 0 and 1


def distorted_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (pixels (images, 8, 8) uint8, labels (images,) int64)}."""
    digits = load_digits()
    images, labels = digits.images / 16, digits.target
    test = holdout(labels, 0.3)
    validation = test.copy()
    validation[test] = holdout(labels[test], 1 / 3)
    parts = {"train": ~test, "validation": validation, "test": test & ~validation}
    splits = {}
    for number, (split, part) in enumerate(parts.items()):
        rng = np.random.default_rng([SEED, number])
        rows = rng.permutation(np.resize(np.flatnonzero(part), SIZES[split]))
        splits[split] = _with_light_and_noise(_transformed(images[rows], rng), rng), labels[rows]
    return splits


def _transformed(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotates, scales, shears and shifts images (images, 8, 8), each at random, with bilinear interpolation."""
    angle, scale, shear, right, down = (
        rearrange(rng.uniform(low, high, len(images)), "images -> images 1 1")
        for low, high in ((-ROTATION, ROTATION), SCALE, (-SHEAR, SHEAR), (-SHIFT, SHIFT), (-SHIFT, SHIFT))
    )
    rows = rearrange(np.arange(len(images)), "images -> images 1 1")
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    x, y = x - right, y - down  # of each pixel, from the centre of its digit
    across = (np.cos(angle) * x + np.sin(angle) * y) / scale + shear * y
    along = (np.cos(angle) * y - np.sin(angle) * x) / scale
    places = np.broadcast_arrays(rows, along + (SIZE - 1) / 2, across + (SIZE - 1) / 2)
    return map_coordinates(images, places, order=1, mode="grid-constant")


def _with_light_and_noise(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink between 0 and 1 (images, 8, 8) -> pixels uint8, dimmed, with a gradient of light and noise."""
    brightness, across, down = (
        rearrange(values, "images -> images 1 1")
        for values in (rng.uniform(*BRIGHTNESS, len(ink)), *rng.normal(0, GRADIENT, (2, len(ink))))
    )
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    light = brightness * ink + across * x + down * y + rng.normal(0, NOISE, ink.shape)
    return (light.clip(0, 1) * 255).round().astype(np.uint8)
