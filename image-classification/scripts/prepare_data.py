"""Prints a summary of a dataset and, with --output, writes it to a local folder that needs no download and no flags.

    python image-classification/scripts/prepare_data.py
    python image-classification/scripts/prepare_data.py --dataset cifar100 --output data/cifar100

The folder has one parquet file per split, including the validation split, and views.png with examples of augmented
images. With `--dataset data/cifar100`, the other scripts read the same pixels, labels, class names and splits. Small
images are written as PNG after --image_size, large ones as their original files.
"""

import io
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from kd.common.cli import parse, run, show_help
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)


@dataclass
class Arguments:
    """Output."""

    output: str | None = field(
        default=None, metadata={"help": "Folder to write the data to (default: only print the table)."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the files that an earlier call wrote to --output."}
    )


ARGUMENTS = Arguments, DataArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.reporting.plots import save_figure
from kd.common.reporting.tables import number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import added_files, writing_folder
from kd.image_classification.data.image_data import ImageData, LargeImageData, SmallImageData
from kd.image_classification.data.loading import channel_statistics

CHUNK = 500  # images per write
CLASSES_SHOWN, VIEWS_SHOWN = 6, 6  # in views.png


def main() -> None:
    args, data_args = parse(*ARGUMENTS)
    folder = None if args.output is None else check_folder(args.output, args.overwrite)
    data = data_args.load(keep_unlabelled=False)
    print_table(data)
    if folder is None:
        return
    try:
        with writing_folder(folder) as partial:
            for split in data.splits:
                write_split(data, split, partial / f"{split}.parquet")
            save_figure(draw_views(data), partial / "views.png")
    except OSError as error:
        raise UserError(f"cannot write {args.output} ({error.strerror}): choose another --output") from None
    print(f"written; flags for the other scripts: {flags(data, args.output)}")


def check_folder(output: str, overwrite: bool) -> Path:
    """The folder to write to. Raises UserError if that would delete files that this script did not write."""
    folder = Path(output).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file: pass a folder as --output")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty: choose another --output, or replace its contents with --overwrite")
    if folder.exists() and (others := added_files(folder)):
        raise UserError(f"{output} contains {others[0]}, which this script did not write: choose another --output")
    return folder


def print_table(data: ImageData) -> None:
    header = ["split", "images", "size", "images per class", "mean", "std"]
    rows = []
    for split, images in data.splits.items():
        counts = torch.bincount(images.labels, minlength=len(data.label_names))
        cells = ["–", "–"]  # large images are not decoded for the table
        if isinstance(data, SmallImageData):
            statistics = channel_statistics(data.splits[split].pixels)
            cells = [" ".join(f"{value:.3f}" for value in values) for values in statistics]
        per_class = f"{counts.min():,} to {counts.max():,}"
        rows.append([split, number(len(images)), f"{data.size}x{data.size}", per_class, *cells])
    names = ", ".join(data.label_names[:10]) + (", ..." if len(data.label_names) > 10 else "")
    below = [
        f"{len(data.label_names)} classes: {names}",
        f"normalized by mean {data.mean}, std {data.std}",
        f"fingerprint {data.fingerprint}",
    ]
    print_rich(header, rows, data.name, "\n".join(below))


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
    """An image as a lossless file."""
    if isinstance(data, LargeImageData):
        return data.splits[split].encoded(row)
    assert isinstance(data, SmallImageData)
    pixels = data.splits[split].pixels[row]  # (height, width, channels)
    file = io.BytesIO()
    Image.fromarray((pixels[..., 0] if pixels.shape[-1] == 1 else pixels).numpy()).save(file, "PNG")
    return file.getvalue()


def draw_views(data: ImageData) -> Figure:
    """Draws an image per row and class: its evaluation view, then its training views in successive epochs."""
    labels = data.splits["train"].labels
    classes = labels.unique()[torch.linspace(0, len(labels.unique()) - 1, CLASSES_SHOWN).long().unique()].tolist()
    images = [int((labels == label).nonzero()[0]) for label in classes]
    cpu = torch.device("cpu")
    columns = [to_pixels(data, data.views("train", cpu).__getitems__(images)["pixel_values"])]
    views = data.views("train", cpu, augment=True)
    for epoch in range(VIEWS_SHOWN):
        views.set_epoch(epoch)
        columns.append(to_pixels(data, views.__getitems__(images)["pixel_values"]))
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


def to_pixels(data: ImageData, pixels: Tensor) -> Tensor:
    """Normalized images (images, 3, h, w) -> pixels (images, h, w, 3) between 0 and 1."""
    shown = rearrange(pixels, "image channel h w -> image h w channel") * torch.tensor(data.std)
    return (shown + torch.tensor(data.mean)).clamp(0, 1)


def flags(data: ImageData, output: str) -> str:
    """The flags with which other scripts load the same data."""
    found = [
        "--dataset",
        output if "/" in output else f"./{output}",
    ]  # `cifar10` is a Hub dataset
    if isinstance(data, LargeImageData):
        found += ["--image_size", str(data.size)]
    if "validation" not in data.splits:
        found += ["--validation_share", "0"]
    return shlex.join(found)


if __name__ == "__main__":
    run(main)
