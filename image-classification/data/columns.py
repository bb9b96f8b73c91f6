"""Which columns of raw splits hold pictures and labels."""

import datasets

from common.sources import Splits
from common.utils.errors import UserError
from image_classification.data.labels import column_values, holds_labels, without_label

LABELS = ("label", "fine_label", "labels", "class", "target")


def choose_columns(rows: datasets.Dataset, image: str | None, label: str | None, notes: list[str]) -> tuple[str, str]:
    features = rows.features
    for name in filter(None, (image, label)):
        if name not in features:
            raise UserError(f"there is no column {name!r}: the columns are {', '.join(features)}")
    if image is not None and not _holds_images(features[image]):
        raise UserError(
            f"column {image!r} holds no images (names of files are not read): name another with --image_column"
        )
    images = [name for name, kind in features.items() if _holds_images(kind)] if image is None else [image]
    labels = [name for name in LABELS if name in features] if label is None else [label]
    if labels and label is None:
        labels += [
            name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel) and name not in labels
        ]
    if not images or not labels:
        what = "images (names of files are not read): name it with --image_column"
        what = "labels: name it with --label_column" if images else what
        raise UserError(f"no column of {what}; the columns are {', '.join(features)}")
    if not holds_labels(features[labels[0]]):
        raise UserError(f"column {labels[0]!r} holds no class ids: name another with --label_column")
    if len(images) > 1:
        notes.append(f"column {images[0]!r} holds the images; --image_column names another of {', '.join(images)}")
    if len(labels) > 1:
        notes.append(f"column {labels[0]!r} holds the labels; --label_column names another of {', '.join(labels)}")
    return images[0], labels[0]


def _holds_images(kind: object) -> bool:
    """Whether a column is one of pictures, also where the file does not say so."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def drop_unlabelled(raw: Splits, label: str, notes: list[str]) -> None:
    """Takes out validation and test splits that are there but have no labels."""
    for split, rows in list(raw.items()):
        if not len(rows) or (label in rows.features and not all(map(without_label, column_values(rows, label)))):
            continue
        if split == "train":
            raise UserError(f"no image of train has a label in column {label!r}: name another with --label_column")
        if split == "test" or label in rows.features:
            del raw[split]
            notes.append(f"the {split} split has no labels and is not used")


def check_split(split: str, rows: datasets.Dataset, image: str, label: str) -> None:
    if not len(rows):
        raise UserError(f"the {split} split is empty: it needs at least one image")
    for column in (image, label):
        if column not in rows.features:
            raise UserError(
                f"the {split} split lacks column {column!r} that train has: its columns are {rows.column_names}"
            )
    if not holds_labels(rows.features[label]):
        raise UserError(f"column {label!r} of {split} holds no labels: give names or whole numbers")
    if not _holds_images(rows.features[image]):
        raise UserError(f"column {image!r} of {split} holds no images: give it the type that it has in train")
