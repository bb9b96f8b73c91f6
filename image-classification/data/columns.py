"""Which columns of raw splits hold pictures and labels."""

import datasets

from kd.common.utils.errors import UserError

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


def check_images(split: str, rows: datasets.Dataset, image: str) -> None:
    if image not in rows.features:
        raise UserError(
            f"the {split} split lacks column {image!r} that train has: its columns are {', '.join(rows.column_names)}"
        )
    if not _holds_images(rows.features[image]):
        raise UserError(f"column {image!r} of {split} holds no images: give it the type that it has in train")
