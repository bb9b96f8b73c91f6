"""Loads image datasets, and decodes small images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.label_names import map_label_ids, shorten_list
from kd.common.data.sources import choose_validation, short_name, stratified
from kd.common.data.teacher_columns import TeacherColumns, Values
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.image_classification.data.image_data import ImageData, Images, LargeImageData, SmallImageData
from kd.image_classification.data.sources import OutputColumns, StoredImages, read_images

MAX_SIZE_IN_MEMORY = 64  # pixels; larger images are decoded for each batch
MEMORY = 8 * 2**30  # bytes for the pixels of a dataset
IMAGENET_SIZE = 224
SPLITS = ("train", "validation", "test")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of pretrained networks
READ_AT_ONCE = 2**30  # bytes; of a larger split the fingerprint reads only some files
HASHED = 500  # minimum number of images that the fingerprint reads of a larger split
CHECKED = 50_000  # maximum number of images of a split that are checked before training


def load_image_data(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    validation_share: float = 0.1,
    max_train_samples: int | None = None,
    label_names: list[str] | None = None,
    max_eval_samples: int | None = None,
    keep_unlabelled: bool = False,
    model_labels: list[str] | None = None,
    trust_label_order: bool = False,
    teacher_columns: list[str] | None = None,
    teacher_values: Values | None = None,
    unlabelled_label: Sequence[str] | None = None,
) -> ImageData:
    """Loads `dataset`, and moves a stratified share of train to a missing validation split.

    Args:
        image_size: resize to that many pixels; otherwise all images must be square and of one size. Above
            MAX_SIZE_IN_MEMORY, and for ImageNet, the result is a LargeImageData.
        max_train_samples, max_eval_samples: maximum number of images of train and of each other split, a fixed
            stratified sample.
        label_names: the classes, by id, of a model to evaluate. The dataset may lack some of them. Its train split is
            optional, and not returned.
        keep_unlabelled: whether train has the images without a label too.
        model_labels: the labels, by id, of a teacher and of teacher outputs that do not name theirs.
        trust_label_order: these have the labels of the data, in their order.
        teacher_columns, teacher_values: see `read_teacher_columns`.
        unlabelled_label: placeholders for a missing label.
    """
    outputs = None
    if teacher_columns:
        outputs = OutputColumns(teacher_columns, teacher_values, model_labels, trust_label_order)
    no_label = unlabelled_label or ()
    read = read_images(dataset, image_column, label_column, label_names, keep_unlabelled, outputs, no_label)
    splits, class_names, notes = read.splits, read.label_names, read.notes
    if read.teacher:
        splits = _without_useless(splits, read.teacher, notes)
    has_validation = "validation" in splits
    splits = _make_validation(dataset, splits, validation_share, notes)
    for split, images in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        if most is not None and most < len(images):
            chosen = stratified(images.labels.numpy(), most / len(images))
            splits[split] = images[torch.from_numpy(chosen)]
            notes.append(f"{most:,} of the {len(images):,} {split} images were used")
    if label_names is not None:
        splits.pop("train", None)
        splits, class_names = _with_labels_of(label_names, dataset, splits, class_names), label_names
        if image_size and any(images.image(0).size != (image_size, image_size) for images in splits.values()):
            notes.append(f"images are resized to the {image_size} pixels of the model")
    notes += _missing_classes(splits, class_names)
    places = {split: splits[split].places() for split in splits if split != "train"}
    set_aside = not has_validation and "validation" in splits
    data = _image_data(dataset, splits, class_names, image_size, notes)
    teacher = read.teacher and _in_order_of(read.teacher, splits)
    if teacher:
        contents = [data.fingerprint, *(teacher.logits[split] for split in sorted(teacher.logits))]
        data = replace(data, teacher=teacher, fingerprint=data_fingerprint(contents))
    order = class_names if trust_label_order else model_labels
    return replace(data, places=places, validation_is_from_train=set_aside, model_labels=order)


def load_examples(
    dataset: str,
    image_column: str | None,
    label_column: str | None,
    image_size: int | None,
    model_names: list[str],
    new_classes: bool = False,
) -> ImageData:
    """Loads the images with a label of all splits of `dataset`, which needs no train split. No split is made.

    model_names: the classes, by id, of the model that they are for. Those of the result, unless `new_classes` lets the
    dataset have others.
    """
    read = read_images(dataset, image_column, label_column, known=model_names)
    splits, names = read.splits, read.label_names
    if not new_classes:
        splits, names = _with_labels_of(model_names, dataset, splits, names), model_names
    return _image_data(dataset, splits, names, image_size, read.notes)


def _with_labels_of(
    model_names: list[str], dataset: str, splits: dict[str, StoredImages], names: list[str]
) -> dict[str, StoredImages]:
    """The images with the class ids of a model instead of those by `names`."""
    ids = {split: images.labels.numpy() for split, images in splits.items()}
    ids = map_label_ids(dataset, ids, names, model_names)
    return {split: replace(images, labels=torch.from_numpy(ids[split])) for split, images in splits.items()}


def _image_data(
    dataset: str, splits: dict[str, StoredImages], label_names: list[str], size: int | None, notes: list[str]
) -> ImageData:
    name = short_name(dataset)
    if dataset == "imagenet":
        return _large_images(name, splits, label_names, size or IMAGENET_SIZE, notes)
    if size is None or (size <= MAX_SIZE_IN_MEMORY and _fits_memory(splits, size, notes)):
        return _small_images(name, splits, label_names, size, notes)
    return _large_images(name, splits, label_names, size, notes)


def _without_useless(
    splits: dict[str, StoredImages], teacher: TeacherColumns, notes: list[str]
) -> dict[str, StoredImages]:
    """Leaves out the images of train with neither a label nor an output of the teacher."""
    train = splits["train"]
    no_output = np.isnan(teacher.logits["train"][train.indices.numpy()]).any(axis=1)
    useless = torch.from_numpy(no_output) & (train.labels == IGNORED)
    if not useless.any():
        return splits
    notes.append(f"images of train with neither a label nor an output, left out: {int(useless.sum()):,}")
    return splits | {"train": train[~useless]}


def _in_order_of(teacher: TeacherColumns, splits: dict[str, StoredImages]) -> TeacherColumns:
    """The outputs for the images of the splits that have any. Validation may be a part of train."""
    logits = {
        name: teacher.logits[images.split][images.indices.numpy()]
        for name, images in splits.items()
        if images.split in teacher.logits
    }
    return replace(teacher, logits=logits)


def _make_validation(
    dataset: str, splits: dict[str, StoredImages], share: float, notes: list[str]
) -> dict[str, StoredImages]:
    """Moves a share of train to a missing validation split."""
    train = splits.get("train")
    if train is not None and "validation" not in splits and share > 0:
        chosen = choose_validation(
            train.labels.numpy(), notes, share, " or pass another --validation_share (0 to report test)"
        )
        splits["validation"], train = (train[torch.from_numpy(part)] for part in (chosen, ~chosen))
    if train is not None and not {"validation", "test"} & splits.keys():
        raise UserError(f"{dataset} has neither validation nor test images: pass a --validation_share above 0")
    splits = splits if train is None else splits | {"train": train}
    return {name: splits[name] for name in SPLITS if name in splits}


def _missing_classes(splits: dict[str, StoredImages], names: list[str]) -> list[str]:
    """One note per split that lacks some classes."""
    notes = []
    for split, images in splits.items():
        present = set(images.labels.tolist())
        missing = [name for i, name in enumerate(names) if i not in present]
        if missing:
            number = f"{len(missing):,} of {len(names):,}"
            notes.append(f"classes without an image in {split}: {number} ({shorten_list(missing)})")
    return notes


# ---- small images ----


def _small_images(
    name: str, splits: dict[str, StoredImages], label_names: list[str], size: int | None, notes: list[str]
) -> SmallImageData:
    images = _decode_all(splits, size)
    pixels = next(iter(images.values())).pixels  # of train, if there is a train split
    mean, std = channel_statistics(pixels)

    def contents() -> Iterator[object]:
        yield label_names
        for split in sorted(images):
            yield f"{split}{tuple(images[split].pixels.shape)}".encode()
            yield images[split].pixels.numpy()
            yield images[split].labels.numpy()

    return SmallImageData(
        name=name,
        splits=images,
        label_names=label_names,
        mean=mean,
        std=std,
        size=pixels.shape[1],
        flip=pixels.shape[-1] == 3,  # grey images are mostly handwriting, which must not be mirrored
        fingerprint=data_fingerprint(contents()),
        notes=notes,
    )


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels (images, h, w, channels), scaled to 0 to 1."""
    sums = torch.zeros(2, pixels.shape[-1], dtype=torch.float64)
    for chunk in pixels.split(4096):
        values = chunk.double() / 255
        sums += torch.stack([reduce(x, "image h w channel -> channel", "sum") for x in (values, values.square())])
    mean, square = sums / (pixels.numel() / pixels.shape[-1])
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-4) for value in std.tolist()]


def _fits_memory(splits: dict[str, StoredImages], size: int, notes: list[str]) -> bool:
    needed = _pixel_bytes(splits, size, size)
    if needed > MEMORY:
        notes.append(f"decoded for each batch: in memory the images would take {needed / 2**30:.1f} GiB")
    return needed <= MEMORY


def _pixel_bytes(splits: dict[str, StoredImages], width: int, height: int) -> int:
    channels = len(next(iter(splits.values())).image(0).getbands())
    return sum(map(len, splits.values())) * width * height * channels


def _decode_all(splits: dict[str, StoredImages], size: int | None) -> dict[str, Images]:
    if size is None:
        width, height = next(iter(splits.values())).image(0).size
        needed = _pixel_bytes(splits, width, height)
        if needed > MEMORY:
            raise UserError(
                f"images of {width}x{height} pixels would take {needed / 2**30:.1f} GiB in memory: pass --image_size "
                f"N; above {MAX_SIZE_IN_MEMORY} they are decoded for each batch"
            )
    images = {name: _decode(stored, size) for name, stored in splits.items()}
    sizes = sorted({split.pixels.shape[1] for split in images.values()})
    if len(sizes) > 1:
        raise UserError(f"the splits hold images of different sizes ({sizes} pixels): pass --image_size N")
    channels = max(split.pixels.shape[-1] for split in images.values())
    return {name: Images(i.pixels.expand(-1, -1, -1, channels), i.labels) for name, i in images.items()}


def _decode(stored: StoredImages, size: int | None) -> Images:
    """Decodes a split: one channel if all images are grey, else three."""
    pixels: np.ndarray[Any, Any] | None = None
    for row in tqdm(range(len(stored)), desc=f"decoding {stored.split}", leave=False, disable=len(stored) < 5000):
        image = stored.image(row)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.atleast_3d(np.asarray(image))  # (height, width, channels)
        if pixels is None:
            pixels = np.empty((len(stored), *array.shape), dtype=np.uint8)
        height, width = pixels.shape[1:3]
        if array.shape[:2] != (height, width) or height != width:
            first = f", {stored.describe(0)} {width}x{height}" if row else ""
            raise UserError(
                f"{stored.describe(row)} is {array.shape[1]}x{array.shape[0]} pixels{first}: images must be square "
                "and of one size; pass --image_size N to resize them"
            )
        if array.shape[2] > pixels.shape[3]:
            pixels = np.repeat(pixels, array.shape[2], axis=3)
        pixels[row] = array
    return Images(torch.from_numpy(pixels), stored.labels)


# ---- large images ----


def _large_images(
    name: str, splits: dict[str, StoredImages], label_names: list[str], size: int, notes: list[str]
) -> LargeImageData:
    """Checks the headers of the images, so that a damaged file is reported before training."""
    for split, images in splits.items():
        checked = range(0, len(images), -(-len(images) // CHECKED))
        for row in tqdm(checked, desc=f"checking {split}", leave=False, disable=len(checked) < 5000):
            images.check(row)
    return LargeImageData(
        name=name,
        splits=splits,
        label_names=label_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=size,
        fingerprint=data_fingerprint(_file_contents(splits, label_names, size)),
        notes=notes,
    )


def _file_contents(splits: dict[str, StoredImages], label_names: list[str], size: int) -> Iterator[object]:
    """The input of the fingerprint: all labels and file sizes in order, and the contents of all files or, if reading
    them would take minutes, of evenly spaced files.
    """
    yield [label_names, size]
    for name in sorted(splits):
        images = splits[name]
        sizes = images.file_sizes()
        yield f"{name} {len(images)}".encode()
        yield images.labels.numpy()
        yield sizes
        for row in range(0, len(images), 1 if sizes.sum() <= READ_AT_ONCE else max(1, len(images) // HASHED)):
            yield images.encoded(row)
