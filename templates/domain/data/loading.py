"""One door to every dataset: embedded, a local folder or a Hub name, all with the same two columns.

`values` holds a signal, a list of numbers as long as every other; `label` its class, a name or a whole number.
"""

import hashlib
import json
from dataclasses import dataclass

import datasets
import numpy as np

from kd.common.data.labels import read_labels
from kd.common.data.sources import Splits, read_named, short_name
from kd.common.utils.errors import UserError
from kd.example_domain.data.tones import tones

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
    labels = read_labels(raw, "label", "ids")
    digest = hashlib.sha256(json.dumps(labels.names).encode())
    splits = {}
    for split, rows in labels.rows.items():
        values, ids = _values(split, raw[split])[rows], labels.values[split]
        digest.update(split.encode() + values.tobytes() + ids.tobytes())
        columns = {"values": values, "labels": ids, "sample_id": np.arange(len(rows))}
        splits[split] = datasets.Dataset.from_dict(columns).with_format("torch")
    notes = [*notes, *labels.notes]
    if "validation" not in splits:
        if len(splits["train"]) < 2:
            raise UserError("no validation split, and a single row in train to set aside: add a file validation.*")
        parts = splits["train"].train_test_split(max(1, len(splits["train"]) // 10), seed=0)
        splits |= {"train": parts["train"], "validation": parts["test"]}
        notes.append("no validation split: a tenth of train was set aside")
    return LabelledData(short_name(dataset), splits, labels.names, digest.hexdigest(), notes)


def _read(dataset: str) -> tuple[Splits, list[str]]:
    if dataset == "tones":
        return tones(), []
    return read_named(dataset, "tones, a folder of parquet or JSON files", INSTEAD)


def _values(split: str, rows: datasets.Dataset) -> np.ndarray:
    """Signals (samples, length)."""
    values: np.ndarray
    if "values" not in rows.column_names:
        raise UserError(f"the {split} split has no column 'values', only {', '.join(rows.column_names)}: rename one")
    try:
        values = np.asarray(rows.select_columns(["values"])[:]["values"], np.float32)
    except (TypeError, ValueError):  # of several lengths, or no numbers
        values = np.empty(0)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"column 'values' of the {split} split must hold lists of numbers, all finite, of one length")
    return values
