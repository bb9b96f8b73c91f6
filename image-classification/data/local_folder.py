"""A dataset as a local folder: one parquet file per split, and a picture of how training sees the images."""

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.utils.folders import writing_folder
from kd.image_classification.data.dataset import ImageData
from kd.image_classification.data.large import LargeImageData
from kd.image_classification.data.loading import SmallImageData

PICTURE = "views.png"
CHUNK = 500  # images that are encoded before they are written
CLASSES_SHOWN, VIEWS_SHOWN = 6, 6


def write_data(data: ImageData, folder: Path) -> None:
    """Small images are written as PNG, without loss; large ones as the files they are."""
    with writing_folder(folder) as partial:
        for split in data.splits:
            write_split(data, split, partial / f"{split}.parquet")
        draw_views(data).savefig(partial / PICTURE)


def write_split(data: ImageData, split: str, path: Path) -> None:
    names = datasets.ClassLabel(names=data.label_names)
    schema = datasets.Features({"image": datasets.Image(), "label": names}).arrow_schema
    labels = data.splits[split].labels.tolist()
    with pq.ParquetWriter(path, schema) as writer:
        for start in tqdm(range(0, len(labels), CHUNK), desc=f"writing {split}", leave=False):
            rows = range(start, min(start + CHUNK, len(labels)))
            files = [{"bytes": encoded(data, split, row), "path": None} for row in rows]
            chunk = [{"image": file, "label": labels[row]} for row, file in zip(rows, files, strict=True)]
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def encoded(data: ImageData, split: str, row: int) -> bytes:
    """An image as a file, without loss."""
    if isinstance(data, LargeImageData):
        return data.splits[split].encoded(row)
    assert isinstance(data, SmallImageData)
    pixels = data.splits[split].pixels[row]  # (height, width, channels)
    file = io.BytesIO()
    Image.fromarray((pixels[..., 0] if pixels.shape[-1] == 1 else pixels).numpy()).save(file, "PNG")
    return file.getvalue()


def draw_views(data: ImageData) -> Figure:
    """One image of some classes per row: as evaluation sees it, then as training sees it in successive epochs."""
    labels = data.splits["train"].labels
    classes = labels.unique()[torch.linspace(0, len(labels.unique()) - 1, CLASSES_SHOWN).long().unique()].tolist()
    images = [int((labels == label).nonzero()[0]) for label in classes]
    cpu = torch.device("cpu")
    columns = [pictures(data, data.views("train", cpu).__getitems__(images)["pixel_values"])]
    views = data.views("train", cpu, augment=True)
    for epoch in range(VIEWS_SHOWN):
        views.set_epoch(epoch)
        columns.append(pictures(data, views.__getitems__(images)["pixel_values"]))
    figure = Figure(figsize=(1.1 * len(columns), 1.25 * len(images)), dpi=150, layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for column, shown in enumerate(columns):
        for row, image in enumerate(shown):
            axes = grid[row, column]
            axes.imshow(image.numpy())
            axes.set_axis_off()
            name = data.label_names[classes[row]]
            axes.set_title(name if column == 0 else f"epoch {column - 1}" if row == 0 else "", fontsize=7)
    return figure


def pictures(data: ImageData, pixels: Tensor) -> Tensor:
    """Normalized (images, 3, h, w) -> (images, h, w, 3) between 0 and 1, as eyes want them."""
    shown = pixels.permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)
    return shown.clamp(0, 1)
