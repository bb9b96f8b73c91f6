"""Batches of similar length, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def column_array(dataset: Any, name: str) -> np.ndarray:
    """A column of numbers of a `datasets.Dataset`, without Python objects for its values."""
    return np.asarray(dataset.select_columns([name]).with_format("numpy")[:][name])


def similar_length_order(dataset: Any) -> Tensor:
    """Row numbers by increasing `length`, or in order for a dataset without that column."""
    if "length" not in getattr(dataset, "column_names", ()):
        return torch.arange(len(dataset))
    return torch.from_numpy(column_array(dataset, "length")).argsort(stable=True)


class LengthGroupedSampler(Sampler[int]):
    """Yields indices such that each run of `batch_size` of them has similar lengths, so that padding is small.

    Shuffles, sorts inside blocks of 50 batches, then shuffles the batches. The order is a function of (seed, epoch),
    not of the global generator: a run that is resumed in mid-epoch sees the batches it would have seen.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        blocks = torch.randperm(len(self.lengths), generator=generator).split(50 * self.batch_size)
        by_length = [block[self.lengths[block].argsort(descending=True, stable=True)] for block in blocks]
        batches = [batch for block in by_length for batch in block.split(self.batch_size)]
        # A short batch may only come last, or every batch after it would straddle two groups.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(full), generator=generator)
        short = [batch for batch in batches if len(batch) < self.batch_size]
        return iter(torch.cat([*(full[i] for i in order), *short]).tolist())
