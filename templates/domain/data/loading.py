"""Loads datasets - embedded, a local folder, or a Hub name - with the same two columns.

`values` holds a signal, a list of numbers as long as every other; `label` its class, a name or a whole number.
"""

from dataclasses import dataclass

import datasets
import numpy as np

from kd.common.data.fingerprints import fingerprint_of_data
from kd.common.data.labels import read_labels
from kd.common.data.sources import read_splits, short_name
from kd.common.data.splits import Splits, with_validation
from kd.common.utils.errors import UserError
from kd.example_domain.data.tones import tones


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
    raw, notes = read_splits(dataset, {"tones": tones}, "train.parquet (or .jsonl)")
    labels = read_labels(raw, "label", "ids")
    notes += labels.notes
    splits: Splits = {}
    contents: list[object] = [labels.names]
    for split, rows in labels.rows.items():
        values, ids = _values(split, raw[split])[rows], labels.values[split]
        contents += [split, values, ids]
        columns = {"values": values, "labels": ids, "sample_id": np.arange(len(rows))}
        splits[split] = datasets.Dataset.from_dict(columns).with_format("torch")
    splits = with_validation(splits, labels.values["train"], notes)
    return LabelledData(short_name(dataset), splits, labels.names, fingerprint_of_data(contents), notes)


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
