"""Heads that learn from a stream, for `streams.py`: each call of `fit` is one step on one small batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from heads import Counted, Head, NearestMean, Ridge, Rows, step
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

VALUE_DIM, HIDDEN = 16, 128  # widths of a value for the linear decoder, and of the hidden layer


class OneStep(Head):
    """One step of plain SGD for each batch. Momentum and weight decay would change values that no example selects."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.optimizer = network, torch.optim.SGD(network.parameters(), rate)

    def forward(self, rows: Rows) -> Tensor:
        return self.network(rows)

    def fit(self, rows: Rows) -> Head:
        step(self.optimizer, F.cross_entropy(self(rows), rows.labels))
        return self


class Values(nn.Module):
    """The values of a bottleneck, from zero, and its decoder: the mean of values that are logits, or a linear layer.

    The same logits as `DiscreteKeyValueBottleneck.decode`, with gradients that hold the selected values alone.
    """

    def __init__(self, keys: DiscreteKeyValueBottleneck, classes: int, linear_decoder: bool = False) -> None:
        super().__init__()
        width = VALUE_DIM if linear_decoder else classes
        self.register_buffer("offsets", torch.arange(keys.codebooks) * keys.codebook_size)
        self.table = nn.Parameter(torch.zeros(keys.codebooks * keys.codebook_size, width))
        self.decoder = nn.Linear(keys.codebooks * width, classes) if linear_decoder else None

    def forward(self, rows: Rows) -> Tensor:
        places = rows.codes + self.offsets
        if self.decoder is None:
            return F.embedding_bag(places.flatten(1), self.table, mode="mean", sparse=True)
        values = F.embedding(places, self.table, sparse=True)
        values = values.mean(1) if values.dim() == 4 else values
        return self.decoder(values.flatten(1))


class Layers(nn.Sequential):
    """A linear layer from zero, or two layers, on the embeddings."""

    def __init__(self, width: int, classes: int, hidden: bool = False) -> None:
        super().__init__(*([nn.Linear(width, HIDDEN), nn.ReLU()] if hidden else []))
        last = nn.Linear(HIDDEN if hidden else width, classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.append(last)

    def forward(self, rows: Rows) -> Tensor:
        return super().forward(rows.embeddings)


class Replay(Head):
    """Adds to each batch as many random ones of `size` stored examples, a uniform sample of the stream so far."""

    def __init__(self, head: Head, size: int) -> None:
        super().__init__()
        self.head, self.size, self.stored = head, size, None
        self.numbers = torch.empty(0)  # random, one for each stored example: those with the smallest stay

    def forward(self, rows: Rows) -> Tensor:
        return self.head(rows)

    def fit(self, rows: Rows) -> Head:
        if self.stored is None:
            self.head.fit(rows)
            everything = rows
        else:
            self.head.fit(rows.joined(self.stored[torch.randint(len(self.stored), (len(rows),))]))
            everything = self.stored.joined(rows)
        numbers = torch.cat([self.numbers, torch.rand(len(rows))])
        self.numbers, kept = numbers.topk(min(self.size, len(numbers)), largest=False)
        self.stored = everything[kept]
        return self


class Discriminant(Ridge):
    """Linear discriminant analysis from the same sums: class means, and one covariance within the classes. Streaming:
    Hayes and Kanan (CVPR workshops 2020, arXiv:1909.01520). `ridge` is a share of the mean variance.
    """

    def solve(self) -> Tensor:
        counts = self.sums[-1].clamp(min=1)
        means = self.sums[:-1] / counts
        within = (self.gram[:-1, :-1] - (means * counts) @ means.T) / counts.sum()
        within += self.ridge * within.diagonal().mean() * torch.eye(len(within))
        weights = torch.linalg.solve(within, means)
        return torch.cat([weights, -(weights * means).sum(0, keepdim=True) / 2])


@dataclass(frozen=True)
class Sizes:
    """What heads are built from: keys, width of the embeddings, number of classes, and of examples in the stream; the
    Hub name or folder of the encoder.
    """

    keys: DiscreteKeyValueBottleneck
    width: int
    classes: int
    examples: int
    encoder: str | None


@dataclass(frozen=True)
class Learner:
    """A head that is not fitted, from sizes and a setting of the grid.

    joint: several epochs on shuffled data.
    end_to_end: the embeddings of its rows are token ids, and its setting is chosen on a third of the stream.
    """

    name: str
    head: Callable[[Sizes, Any], Head]
    grid: tuple[float | None, ...] = (None,)
    joint: bool = False
    end_to_end: bool = False


def half_decades(first: int) -> tuple[float, ...]:
    """Thirteen settings, from 10^first to 10^(first + 6)."""
    return tuple(float(f"{10 ** (first + i / 2):.2g}") for i in range(13))


def mean_values(sizes: Sizes, rate: float) -> Head:
    return OneStep(Values(sizes.keys, sizes.classes), rate)


def linear(sizes: Sizes, rate: float) -> Head:
    return OneStep(Layers(sizes.width, sizes.classes), rate)


COUNTED, TRAINED, PROBE = "bottleneck, counted values", "bottleneck, trained values", "linear probe"
LINEAR_DECODER = "bottleneck, trained values, linear decoder"
LEARNERS = [
    Learner(COUNTED, lambda sizes, _: Counted(sizes.keys, sizes.classes)),
    Learner(TRAINED, mean_values, half_decades(-1)),
    Learner(
        LINEAR_DECODER,
        lambda sizes, rate: OneStep(Values(sizes.keys, sizes.classes, linear_decoder=True), rate),
        half_decades(-3),
    ),
    Learner(PROBE, linear, half_decades(-5)),
    Learner(
        "linear probe, replay of 1 %",
        lambda sizes, rate: Replay(linear(sizes, rate), sizes.examples // 100),
        half_decades(-5),
    ),
    Learner(
        "two layers",
        lambda sizes, rate: OneStep(Layers(sizes.width, sizes.classes, hidden=True), rate),
        half_decades(-6),
    ),
    Learner("nearest class mean", lambda sizes, _: NearestMean(sizes.width, sizes.classes)),
    Learner("least squares", lambda sizes, ridge: Ridge(sizes.width, sizes.classes, ridge), half_decades(-4)),
    Learner(
        "linear discriminant", lambda sizes, ridge: Discriminant(sizes.width, sizes.classes, ridge), half_decades(-5)
    ),
    Learner("joint: bottleneck, trained values", mean_values, half_decades(0), joint=True),
    Learner("joint: linear", linear, half_decades(-3), joint=True),
]
