"""One door to every dataset: embedded, a local folder or a Hub name, all with the same two columns.

`values` holds a signal, a list of numbers as long as every other; `label` its class, a name or a whole number.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from common.sources import Splits, read_named, short_name
from common.utils.errors import UserError
from example_domain.data.tones import tones

INSTEAD = "pass --dataset FOLDER with train.parquet (or .jsonl), or --dataset tones, which needs no download"


@dataclass(frozen=True)
class LabelledData:
    """Every split has the columns values (length,) float32, labels (class ids) and sample_id, as tensors."""

    name: str
    splits: Splits  # train, validation and perhaps test
    label_names: list[str]  # by class id
    fingerprint: str  # of the contents
    notes: list[str]  # what a reader of a report should know


def load_data(dataset: str) -> LabelledData:
    """Loads `tones`, a folder or owner/name[:config]. Without a validation split, a tenth of train becomes one."""
    raw, notes = _read(dataset)
    classes = _classes(raw["train"])
    names = [str(name) for name in classes]
    digest = hashlib.sha256(json.dumps(names).encode())
    splits = {}
    for split, rows in raw.items():
        values, labels = _values(split, rows), _class_ids(split, rows, classes)
        digest.update(split.encode() + values.tobytes() + labels.tobytes())
        columns = {"values": values, "labels": labels, "sample_id": np.arange(len(rows))}
        splits[split] = datasets.Dataset.from_dict(columns).with_format("torch")
    if "validation" not in splits:
        parts = splits["train"].train_test_split(max(1, len(splits["train"]) // 10), seed=0)
        splits |= {"train": parts["train"], "validation": parts["test"]}
        notes = [*notes, "no validation split: a tenth of train was set aside"]
    name = short_name(dataset)
    return LabelledData(name, splits, names, digest.hexdigest(), notes)


def _read(dataset: str) -> tuple[Splits, list[str]]:
    if dataset == "tones":
        return tones(), []
    return read_named(dataset, "tones, a folder of parquet or JSON files", INSTEAD)


def _column(split: str, rows: datasets.Dataset, name: str) -> list[Any]:
    if name not in rows.column_names:
        raise UserError(f"the {split} split has no column {name!r}, only {', '.join(rows.column_names)}: rename one")
    return rows.select_columns([name])[:][name]


def _values(split: str, rows: datasets.Dataset) -> np.ndarray:
    """Signals (samples, length)."""
    values: np.ndarray
    try:
        values = np.asarray(_column(split, rows, "values"), np.float32)
    except (TypeError, ValueError):  # of several lengths, or no numbers
        values = np.empty(0)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"column 'values' of the {split} split must hold lists of numbers, all finite, of one length")
    return values


def _labels(split: str, rows: datasets.Dataset) -> list[Any]:
    """Names where the file has them, else what stands there."""
    kind = rows.features.get("label")
    names = dict(enumerate(kind.names)) if isinstance(kind, datasets.ClassLabel) else {}
    return [names.get(label, label) for label in _column(split, rows, "label")]


def _classes(train: datasets.Dataset) -> list[Any]:
    """The classes by id: in the order of the file where it has one."""
    labels, kind = _labels("train", train), train.features["label"]
    if any(not isinstance(label, str | int) for label in labels):
        raise UserError("column 'label' of the train split must hold a name or a whole number in every row")
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else sorted(set(labels))


def _class_ids(split: str, rows: datasets.Dataset, classes: list[Any]) -> np.ndarray:
    ids = {name: number for number, name in enumerate(classes)}
    labels = _labels(split, rows)
    if unknown := [label for label in labels if label not in ids]:
        raise UserError(f"label {unknown[0]!r} of the {split} split is not among those of train: correct or remove it")
    return np.array([ids[label] for label in labels])
