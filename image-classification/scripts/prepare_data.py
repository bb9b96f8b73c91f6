"""Shows what is in a dataset and, with --output, makes it a local folder that needs no download and no choices.

    python image-classification/scripts/prepare_data.py
    python image-classification/scripts/prepare_data.py --dataset cifar100 --output data/cifar100

The folder has one parquet file per split, the validation split set aside for good, and views.png, which shows how
training sees the images. What `--dataset data/cifar100` of the other scripts reads from it are the same pixels,
labels, class names and splits. Small images are written as PNG, after --image_size; large ones as the files they are.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kd.common.cli import parse, run
from kd.common.reporting.tables import number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.folders import added_files
from kd.image_classification.data.dataset import ImageData
from kd.image_classification.data.large import LargeImageData
from kd.image_classification.data.loading import SmallImageData, channel_statistics
from kd.image_classification.data.local_folder import write_data
from kd.image_classification.student_model.arguments import DataArguments


@dataclass
class Arguments:
    """Where it goes."""

    output: str | None = field(default=None, metadata={"help": "folder to write; without it, just look"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier call wrote to that folder"})


def main() -> None:
    args, data_args = parse(Arguments, DataArguments)
    folder = None if args.output is None else target(args.output, args.overwrite)
    data = data_args.load()
    print_table(data)
    if folder is None:
        return
    try:
        write_data(data, folder)
    except OSError as error:
        raise UserError(f"cannot write {args.output} ({error.strerror}): choose another --output") from None
    print(f"written; for the other scripts: {flags(data, args.output)}")


def target(output: str, overwrite: bool) -> Path:
    """The folder to write. Raises UserError where that would delete what this script did not write."""
    folder = Path(output).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file: give a folder as --output")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty: choose another --output, or replace its contents with --overwrite")
    if folder.exists() and (others := added_files(folder)):
        raise UserError(f"{output} holds {others[0]}, which this script did not write: choose another --output")
    return folder


def flags(data: ImageData, output: str) -> str:
    """What makes the other scripts see the same data."""
    words = ["--dataset", output if "/" in output else f"./{output}"]  # a bare `cifar10` would be the one on the Hub
    if isinstance(data, LargeImageData):
        words += ["--image_size", str(data.size)]
    if "validation" not in data.splits:
        words += ["--validation_share", "0"]
    return shlex.join(words)


def print_table(data: ImageData) -> None:
    header = ["split", "images", "size", "images of a class", "mean", "std"]
    names = ", ".join(data.label_names[:10]) + (", ..." if len(data.label_names) > 10 else "")
    below = [
        f"{len(data.label_names)} classes: {names}",
        f"normalized by mean {data.mean}, std {data.std}",
        f"fingerprint {data.fingerprint}",
    ]
    print_rich(header, [table_row(data, split) for split in data.splits], data.name, "\n".join(below))


def table_row(data: ImageData, split: str) -> list[str]:
    labels = data.splits[split].labels
    counts = torch.bincount(labels, minlength=len(data.label_names))
    of_a_class = f"{counts.min():,} to {counts.max():,}"
    statistics: tuple[list[float], ...] = ([], [])  # large images would have to be decoded for them
    if isinstance(data, SmallImageData):
        statistics = channel_statistics(data.splits[split].pixels)
    cells = [" ".join(f"{value:.3f}" for value in values) or "–" for values in statistics]
    return [split, number(len(labels)), f"{data.size}x{data.size}", of_a_class, *cells]


if __name__ == "__main__":
    run(main)
