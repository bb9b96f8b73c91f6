"""Where raw images come from: embedded, known by name, a local folder, or the Hugging Face Hub."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from common.sources import Splits, read_folder, read_hub, read_named, usual_names
from common.utils.errors import UserError

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
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_splits(dataset: str) -> tuple[Splits, list[str]]:
    """The splits by their usual names, and notes on what was left out."""
    if dataset == "digits":
        return {"train": embedded_digits()}, []
    if dataset in HUB:
        return usual_names(read_hub(dataset, HUB[dataset], None, INSTEAD), dataset)
    others = f"a known name (digits, {', '.join(HUB)}), a folder of parquet files or of images"
    return read_named(dataset, others, INSTEAD, _read_folder)


def embedded_digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 (UCI, Alpaydin and Kaynak 1998), real and without download."""
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _read_folder(folder: Path) -> Splits:
    """Parquet files named by split, or SPLIT/CLASS/picture.png."""
    if any(path.suffix == ".parquet" for path in folder.iterdir()):
        return read_folder(folder)
    pictures = {split.name: _pictures(split) for split in sorted(folder.iterdir()) if split.is_dir()}
    pictures = {name: paths for name, paths in pictures.items() if paths}
    if not pictures:
        raise UserError(
            f"no images in folder {folder}: put train.parquet there, or pictures as train/CLASS/NAME.png (and so "
            "under validation/ and test/)"
        )
    flat = [path for name, paths in pictures.items() for path in paths if path.parent == folder / name]
    if flat:
        raise UserError(f"{flat[0]} is in no class: pictures belong into SPLIT/CLASS/, such as train/cat/1.png")
    labels = {name: [path.relative_to(folder / name).parts[0] for path in paths] for name, paths in pictures.items()}
    classes = sorted({label for of_split in labels.values() for label in of_split})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return {
        name: datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": labels[name]}, features=features)
        for name, paths in pictures.items()
    }


def _pictures(split: Path) -> list[Path]:
    """All pictures below a folder, but for what tools hide there (thumbnails, checkpoints, other systems' copies)."""
    found = sorted(path for path in split.rglob("*") if path.suffix.lower() in PICTURES)
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(split.parent).parts)]
