"""Where raw images come from: embedded, known by name, a local folder, or the Hugging Face Hub."""

import os
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from kd.common.data.label_words import some
from kd.common.data.sources import SPLIT_NAMES, Splits, read_folder, read_hub, read_named, usual_names
from kd.common.utils.errors import UserError
from kd.image_classification.data.folders import read_class_folders

HUB = {  # short name -> name on the Hub
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}
INSTEAD = (
    "pass --dataset FOLDER with parquet files or one folder of images per class, or --dataset digits, which needs no "
    "download"
)


def read_splits(dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """The splits by their usual names, and notes on what was left out."""
    if dataset == "digits":
        return {"train": embedded_digits()}, []
    if dataset in HUB:
        return usual_names(read_hub(dataset, HUB[dataset], None, INSTEAD), dataset, needs_train)
    if os.path.isfile(dataset):
        raise UserError(f"{dataset} is a file: unpack it if it is an archive, and pass --dataset with the folder")
    notes: list[str] = []

    def read(folder: Path) -> Splits:
        return _read_folder(folder, needs_train, notes)

    others = f"a known name (digits, {', '.join(HUB)}), a folder of parquet files or of images"
    try:
        splits, unused = read_named(dataset, others, INSTEAD, read, needs_train)
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UserError(f"--dataset cannot be read ({reason}): {error.filename or dataset}") from None
    return splits, notes + unused


def embedded_digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 (UCI, Alpaydin and Kaynak 1998), real and without download."""
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _read_folder(folder: Path, needs_train: bool, notes: list[str]) -> Splits:
    """Parquet files named by split, or SPLIT/CLASS/picture.png."""
    if not any(path.suffix == ".parquet" for path in folder.iterdir()):
        return read_class_folders(folder, needs_train, notes)
    unread = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name in SPLIT_NAMES)
    if unread:
        notes.append(f"folders are not read beside parquet files: {some(unread)}")
    return read_folder(folder)
