"""Heads on frozen embeddings, for `forgetting.py` and `streams.py`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

EPOCHS, BATCH = 10, 512
RATE, VALUE_RATE = 0.01, 0.1  # of AdamW, for a linear head and for values
RIDGE = 0.1


@dataclass
class Rows:
    """Embeddings (rows, width), codes (rows, C), or (rows, n, C) of n keys per codebook, and labels (rows,)."""

    embeddings: Tensor
    codes: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.embeddings[chosen], self.codes[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def joined(self, other: "Rows") -> "Rows":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rows(*(torch.cat(pair) for pair in pairs))


class Head(nn.Module):
    """A head with logits for rows. Subclasses define how it is fitted; `in_any_order`: it only adds up sums over the
    examples, so that neither their order nor their division into batches has an effect.
    """

    in_any_order = False

    def fit(self, rows: Rows) -> "Head":
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, rows: Rows) -> Tensor:
        return torch.cat([self(rows[part]) for part in torch.arange(len(rows)).split(4096)])


class Counted(Head):
    """A bottleneck with counted values."""

    in_any_order = True

    def __init__(self, keys: DiscreteKeyValueBottleneck, classes: int) -> None:
        super().__init__()
        self.bottleneck = bottleneck_like(keys, classes, "counted")

    def forward(self, rows: Rows) -> Tensor:
        return self.bottleneck.decode(rows.codes)

    def fit(self, rows: Rows) -> Head:
        self.bottleneck.add(rows.codes, rows.labels)
        return self


class Trained(Head):
    """A bottleneck with trained values, or a linear layer, both from zero."""

    def __init__(self, keys: DiscreteKeyValueBottleneck | None, width: int, classes: int) -> None:
        super().__init__()
        self.is_linear = keys is None
        self.layer: Any = nn.Linear(width, classes) if keys is None else bottleneck_like(keys, classes, "trained")
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, rows: Rows) -> Tensor:
        return self.layer(rows.embeddings) if self.is_linear else self.layer.decode(rows.codes)

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        scale = 1 if self.is_linear else VALUE_RATE / RATE
        return torch.optim.AdamW(self.parameters(), scale * rate, weight_decay=0)

    def fit(self, rows: Rows) -> Head:
        optimizer = self.optimizer(RATE)
        for batch in shuffled(rows, EPOCHS):
            step(optimizer, F.cross_entropy(self(batch), batch.labels))
        return self


class Ridge(Head):
    """Least squares on one-hot labels from sums over the examples, which can be subtracted, too."""

    in_any_order = True

    def __init__(self, width: int, classes: int, ridge: float = RIDGE) -> None:
        super().__init__()
        self.ridge = ridge
        self.gram, self.sums = torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, classes).double()

    def add(self, rows: Rows, sign: int = 1) -> Head:
        inputs = with_one(rows.embeddings).double()
        self.gram += sign * inputs.T @ inputs
        self.sums += sign * inputs.T @ F.one_hot(rows.labels, self.sums.shape[1]).double()
        self.weights = self.solve().float()
        return self

    def solve(self) -> Tensor:
        """Weights and bias (width + 1, classes)."""
        return torch.linalg.solve(self.gram + self.ridge * torch.eye(len(self.gram)), self.sums)

    fit = add

    def forward(self, rows: Rows) -> Tensor:
        return with_one(rows.embeddings) @ self.weights


class NearestMean(Head):
    """Cosine similarity to the mean of each class; a class without examples is the lowest."""

    in_any_order = True

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.sums, self.counts = torch.zeros(classes, width), torch.zeros(classes)

    def fit(self, rows: Rows) -> Head:
        self.sums.index_add_(0, rows.labels, rows.embeddings)
        self.counts += torch.bincount(rows.labels, minlength=len(self.counts))
        return self

    def forward(self, rows: Rows) -> Tensor:
        cosines = F.normalize(rows.embeddings, dim=1) @ F.normalize(self.sums, dim=1).T
        return cosines.masked_fill(self.counts == 0, -2)


def with_one(embeddings: Tensor) -> Tensor:
    return F.pad(embeddings, (0, 1), value=1.0)


def bottleneck_like(keys: DiscreteKeyValueBottleneck, classes: int, values: Any) -> DiscreteKeyValueBottleneck:
    """A bottleneck for codes of these keys. It has no need of the keys themselves."""
    sizes = keys.codebooks, keys.codebook_size
    return DiscreteKeyValueBottleneck(keys.codebooks, classes, *sizes, decoder="mean", values=values)


def shuffled(rows: Rows, epochs: int) -> Iterable[Rows]:
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(BATCH):
            yield rows[part]


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
