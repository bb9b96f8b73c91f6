"""The embedded dataset: short noisy tones of instruments that differ in their overtones, made from a seed.

It is synthetic: scores on it compare models with each other and do not predict scores on real instruments.
"""

import datasets
import numpy as np

from kd.common.data.splits import Splits

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
WRONG_LABELS = 0.2  # share of train whose label is drawn at random, as if annotators had not listened


def tones() -> Splits:
    """Columns `values` (LENGTH,) and `label`; no two splits share a sample."""
    kinds = datasets.Features(
        {"values": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=list(OVERTONES))}
    )
    splits = {}
    for seed, (split, size) in enumerate(SIZES.items()):
        generator = np.random.default_rng(seed)
        labels = generator.integers(len(OVERTONES), size=size)
        columns = {"values": _play(labels, generator), "label": labels}
        if split == "train":
            guessed = generator.integers(len(OVERTONES), size=size)
            columns["label"] = np.where(generator.random(size) < WRONG_LABELS, guessed, labels)
        splits[split] = datasets.Dataset.from_dict(columns, features=kinds)
    return splits


def _play(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Signals (samples, LENGTH): a random pitch, a random phase of each overtone, and noise."""
    amplitudes = np.array(list(OVERTONES.values()))[labels]  # (samples, overtones)
    pitches = generator.uniform(3, 9, (len(labels), 1))  # periods of the fundamental in a signal
    frequencies = pitches * np.arange(1, amplitudes.shape[1] + 1)  # (samples, overtones)
    phases = generator.uniform(0, 2 * np.pi, frequencies.shape)
    angles = 2 * np.pi * frequencies[:, :, None] * np.linspace(0, 1, LENGTH) + phases[:, :, None]
    clean = (amplitudes[:, :, None] * np.sin(angles)).sum(1)
    return clean + generator.normal(0, NOISE, clean.shape)
