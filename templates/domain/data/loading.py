"""Loads datasets of signals - embedded, local, or on the Hub - and generates the embedded one.

A dataset has two columns: `values`, lists of numbers of the same length, and `label`, a name or a whole number.

The embedded dataset is synthetic: short noisy tones of instruments that differ in their overtones. Scores on it
compare models with each other, and do not predict scores on real instruments.
"""

from dataclasses import dataclass

import datasets
import numpy as np

from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.label_names import map_label_ids
from kd.common.data.labels import read_labels
from kd.common.data.sources import KnownDatasets, Splits, read_splits, sample, short_name, with_validation
from kd.common.utils.errors import UserError

OVERTONES = {  # instrument: amplitudes of the fundamental and of its overtones
    "flute": (1.0, 0.4, 0.1, 0.0, 0.0),
    "clarinet": (1.0, 0.0, 0.7, 0.0, 0.5),
    "violin": (1.0, 0.5, 0.33, 0.25, 0.2),
    "oboe": (0.5, 1.0, 0.4, 0.6, 0.1),
    "trumpet": (0.6, 0.7, 1.0, 0.6, 0.3),
    "horn": (1.0, 0.8, 0.3, 0.1, 0.0),
}
SIZES = {"train": 1500, "validation": 1000, "test": 1000}
LENGTH, NOISE = 128, 0.5
WRONG_LABELS = 0.2  # share of train labels that are drawn at random


@dataclass(frozen=True)
class LabelledData:
    """A dataset. Its splits have the columns values (length,) float32, labels (class ids), and sample_id (the row
    in the data as stored; of train, if validation was set aside from it).
    """

    name: str
    splits: Splits  # train, validation and, if the dataset has it, test
    label_names: list[str]  # class names by id
    fingerprint: str  # hash of the contents
    notes: list[str]  # notes on the labels and splits, for the report

    @property
    def selection_split(self) -> str:
        """The split of headline metrics: test only for data without validation, which are never trained on."""
        return "validation" if "validation" in self.splits else "test"


def load_data(
    dataset: str,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    label_names: list[str] | None = None,
) -> LabelledData:
    """Loads `tones`, a folder, a file or owner/name[:config]. A tenth of train becomes a missing validation split.

    Args:
        max_train_samples, max_eval_samples: Maximum number of signals of train and of each other split, a fixed
            stratified sample.
        label_names: The classes, by id, of a model to evaluate, which needs no train split.
    """
    raw, notes = read_splits(dataset, KNOWN, "train.parquet (or .jsonl)", needs_train=label_names is None)
    labels = read_labels(raw, "label", "ids", label_names)
    names = label_names or labels.names
    notes += labels.notes
    splits: Splits = {}
    contents: list[object] = [names]
    for split, ids in map_label_ids(dataset, labels.values, labels.names, names).items():
        rows = labels.rows[split]
        columns = {"values": _values(split, raw[split])[rows], "labels": ids, "sample_id": rows}
        splits[split] = datasets.Dataset.from_dict(columns).with_format("torch")
    splits = with_validation(splits, labels.values.get("train", np.empty(0)), notes)
    for split, signals in splits.items():
        most = max_train_samples if split == "train" else max_eval_samples
        splits[split] = sample(signals, most, split, notes, signals["labels"][:].numpy())
        contents += [split, *(splits[split][column][:].numpy() for column in ("values", "labels"))]
    return LabelledData(short_name(dataset), splits, names, data_fingerprint(contents), notes)


def _values(split: str, rows: datasets.Dataset) -> np.ndarray:
    """The column `values` as an array (samples, length)."""
    values: np.ndarray
    if "values" not in rows.column_names:
        raise UserError(f"the {split} split has no column 'values', only {', '.join(rows.column_names)}: rename one")
    try:
        values = np.asarray(rows.select_columns(["values"])[:]["values"], np.float32)
    except (TypeError, ValueError):  # different lengths, or not numbers
        values = np.empty(0)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"column 'values' of the {split} split must hold lists of numbers, all finite, of one length")
    return values


def tones() -> Splits:
    """Generates train, validation and test with the columns `values` (LENGTH,) and `label`."""
    kinds = datasets.Features(
        {"values": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=list(OVERTONES))}
    )
    splits = {}
    for seed, (split, size) in enumerate(SIZES.items()):
        generator = np.random.default_rng(seed)
        labels = generator.integers(len(OVERTONES), size=size)
        columns = {"values": _synthesize(labels, generator), "label": labels}
        if split == "train":
            random_labels = generator.integers(len(OVERTONES), size=size)
            columns["label"] = np.where(generator.random(size) < WRONG_LABELS, random_labels, labels)
        splits[split] = datasets.Dataset.from_dict(columns, features=kinds)
    return splits


KNOWN: KnownDatasets = {"tones": tones}


def _synthesize(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Signals (samples, LENGTH) with a random pitch, random phases of the overtones, and noise."""
    amplitudes = np.array(list(OVERTONES.values()))[labels]  # (samples, overtones)
    pitches = generator.uniform(3, 9, (len(labels), 1))  # periods of the fundamental in a signal
    frequencies = pitches * np.arange(1, amplitudes.shape[1] + 1)  # (samples, overtones)
    phases = generator.uniform(0, 2 * np.pi, frequencies.shape)
    angles = 2 * np.pi * frequencies[:, :, None] * np.linspace(0, 1, LENGTH) + phases[:, :, None]
    clean = (amplitudes[:, :, None] * np.sin(angles)).sum(1)
    return clean + generator.normal(0, NOISE, clean.shape)
