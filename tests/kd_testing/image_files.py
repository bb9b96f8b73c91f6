"""Writes small image datasets to disk, and loads them."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData, LargeImageData, SmallImageData
from kd.image_classification.data.loading import load_image_data

NAMES = ["cat", "ant", "bee"]  # not sorted


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(picture: np.ndarray | Image.Image) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, names: list[str] | None = None, **splits: tuple[Any, list]) -> str:
    """Writes parquet files of (images, labels) per split, with the metadata of `datasets` if there are `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pictures, labels) in splits.items():
        files = [
            {"bytes": p if isinstance(p, bytes) else png(p), "path": None} if p is not None else None for p in pictures
        ]
        kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names or ["-"])})
        schema = kind.arrow_schema if names else kind.arrow_schema.remove_metadata()
        rows = [{"image": file, "label": label} for file, label in zip(files, labels, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{split}.parquet")
    return str(folder)


def draw(path: Path, picture: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture))


def small(dataset: object, **keywords: Any) -> SmallImageData:
    data = load_image_data(str(dataset), **keywords)
    assert isinstance(data, SmallImageData)
    return data


def sizes(data: ImageData) -> dict[str, int]:
    return {name: len(images) for name, images in data.splits.items()}


def large(dataset: object, **keywords: Any) -> LargeImageData:
    data = load_image_data(str(dataset), **({"image_size": 72, "validation_share": 0.2} | keywords))
    assert isinstance(data, LargeImageData)
    return data


def in_colour(folder: Path) -> str:
    """Writes 60 + 12 color images of 10 pixels, three classes."""
    pictures = pixels(72, 10, 10, 3)
    labels = [i % 3 for i in range(72)]
    return write(folder, NAMES, train=(pictures[:60], labels[:60]), test=(pictures[60:], labels[60:]))


def photos_in(folder: Path) -> str:
    """Writes 20 + 4 images of 100x80 pixels, some of them grey, two classes."""
    for number, array in enumerate(pixels(24, 8, 10, 3)):
        picture = Image.fromarray(array).resize((100, 80))
        split, label = "train" if number < 20 else "test", "ab"[number % 2]
        draw(folder / split / label / f"{number:02}.png", picture.convert("L") if number % 5 == 0 else picture)
    return str(folder)


def error_of(dataset: object, **keywords: Any) -> str:
    """The error message of one line for a dataset that cannot be loaded."""
    with pytest.raises(UserError) as caught:
        load_image_data(str(dataset), **keywords)
    message = str(caught.value)
    assert message and "\n" not in message
    return message
