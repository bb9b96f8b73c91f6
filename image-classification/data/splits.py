"""Which rows are trained on and which are set aside, and what the classes of a split are called."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kd.common.data.label_words import some
from kd.common.data.labels import renumber
from kd.common.utils.errors import UserError
from kd.image_classification.data.rows import Rows

SPLIT_SEED = 0  # of the validation split: not the run's seed, or a teacher of another seed would have seen it


def divide(
    dataset: str, splits: dict[str, Rows], validation_share: float, train_samples: int | None, notes: list[str]
) -> dict[str, Rows]:
    """The splits with a validation split, where there is to be one, and with so many training images."""
    if dataset == "digits":  # one file without splits
        splits = dict(zip(("train", "test"), split_off(splits["train"], 0.2), strict=True))
    if "train" not in splits:
        return splits
    if "validation" not in splits and validation_share > 0:
        splits = splits | _set_aside(dataset, splits["train"], validation_share, notes)
    if not {"validation", "test"} & splits.keys():
        raise UserError(f"{dataset} has neither validation nor test images: pass a --validation_share above 0")
    if train_samples is not None and train_samples < len(splits["train"]):
        train = splits["train"]
        splits = splits | {"train": train[stratified(train.labels, train_samples / len(train))]}
        notes.append(f"{len(splits['train']):,} of the {len(train):,} training images were used")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _set_aside(dataset: str, train: Rows, share: float, notes: list[str]) -> dict[str, Rows]:
    rest, validation = split_off(train, share)
    if not len(validation):
        raise UserError(
            f"{dataset} has too few training images to set {share * 100:.4g}% of them aside, {len(train):,}: add "
            "validation images, or pass another --validation_share"
        )
    notes.append(f"no validation split: a stratified {share * 100:.4g}% of train was set aside")
    return {"train": rest, "validation": validation}


def renumbered(dataset: str, splits: dict[str, Rows], own: list[str], names: list[str]) -> dict[str, Rows]:
    """The same rows with the class ids of a model, found by the names of the classes."""
    ids = renumber(dataset, {split: rows.labels.numpy() for split, rows in splits.items()}, own, names)
    return {split: replace(rows, labels=torch.from_numpy(ids[split])) for split, rows in splits.items()}


def missing_classes(splits: dict[str, Rows], names: list[str]) -> list[str]:
    """One line for each split that lacks some classes."""
    lines = []
    for split, rows in splits.items():
        there = set(rows.labels.tolist())
        missing = [name for number, name in enumerate(names) if number not in there]
        if missing:
            lines.append(f"classes without an image in {split}: {len(missing):,} of {len(names):,} ({some(missing)})")
    return lines


def split_off(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Two parts, the second a stratified `share`; the first keeps an image of each class."""
    chosen = stratified(rows.labels, share)
    emptied = ~torch.isin(rows.labels, rows.labels[~chosen])
    chosen &= ~(emptied & _first_of_each_class(rows.labels))
    return rows[~chosen], rows[chosen]


def stratified(labels: Tensor, share: float) -> Tensor:
    """Mask (samples,) of a `share` of them: of all in the order of their labels, evenly spaced ones."""
    order = _in_order(labels)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[np.diff(np.floor(np.arange(len(labels) + 1) * share + 0.5)) > 0]] = True
    return torch.from_numpy(chosen)


def _first_of_each_class(labels: Tensor) -> Tensor:
    """Mask (samples,) of one sample of each class."""
    order = _in_order(labels)
    mask = np.zeros(len(labels), dtype=bool)
    mask[order[np.unique(labels.numpy()[order], return_index=True)[1]]] = True
    return torch.from_numpy(mask)


def _in_order(labels: Tensor) -> np.ndarray:
    """The samples by label, those of a class in random order, the same every time."""
    return np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(labels)), labels.numpy()))
