"""Heads on frozen embeddings, and the ways in which `forgetting.py` removes examples from them or adds a class."""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

EPOCHS, BATCH = 10, 512
RATE, VALUE_RATE = 0.01, 0.1  # of AdamW, for a linear head and for values; the grids below are for a linear head
ASCENT = [(rate, steps) for rate in (1e-2, 1e-1) for steps in (1, 5, 20)]  # grids of the competitors
SCRUB = [1e-2, 1e-1]
SCRUB_EPOCHS, ASCENT_EPOCHS = 2, 1  # epochs on the rest, and those with a preceding epoch on the forgotten examples
PAIRS = [10, 100, 1000, 10**9]  # the most selected pairs whose values are set to zero
RIDGE = 0.1


@dataclass
class Rows:
    """Embeddings (rows, width), codes (rows, C) and labels (rows,) of examples."""

    embeddings: Tensor
    codes: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.embeddings[chosen], self.codes[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


class Head(nn.Module):
    """A head with logits for rows. Subclasses define how it is fitted."""

    def fit(self, rows: Rows) -> "Head":
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, rows: Rows) -> Tensor:
        return torch.cat([self(rows[part]) for part in torch.arange(len(rows)).split(4096)])


class Counted(Head):
    """A bottleneck with counted values."""

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

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.gram, self.sums = torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, classes).double()

    def add(self, rows: Rows, sign: int = 1) -> Head:
        inputs = with_one(rows.embeddings).double()
        self.gram += sign * inputs.T @ inputs
        self.sums += sign * inputs.T @ F.one_hot(rows.labels, self.sums.shape[1]).double()
        self.weights = torch.linalg.solve(self.gram + RIDGE * torch.eye(len(self.gram)), self.sums).float()
        return self

    fit = add

    def forward(self, rows: Rows) -> Tensor:
        return with_one(rows.embeddings) @ self.weights


class NearestMean(Head):
    """Cosine similarity to the mean of each class; a class without examples is the lowest."""

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


# ---- ways to forget: functions of a head, the forgotten examples and the rest, which return candidates ----


def subtract(head: Any, forgotten: Rows, rest: Rows) -> None:
    if isinstance(head, Ridge):
        head.add(forgotten, -1)
    else:
        head.bottleneck.forget(forgotten.codes, forgotten.labels)


def delete_outputs(head: Any, forgotten: Rows, rest: Rows) -> None:
    """Makes the output of the class of the forgotten examples the lowest."""
    label = int(forgotten.labels[0])
    if head.is_linear:
        head.layer.weight.data[label], head.layer.bias.data[label] = 0, -1e4
    else:
        head.layer.forget_class(label)


def zero_pairs(head: Any, forgotten: Rows, rest: Rows, pairs: int) -> None:
    """Shah et al. (arXiv:2311.15268): the pairs that the forgotten examples select most no longer contribute."""
    codebooks, codebook_size = head.layer.codebooks, head.layer.codebook_size
    flat = (forgotten.codes + torch.arange(codebooks) * codebook_size).flatten()
    counts = torch.bincount(flat, minlength=codebooks * codebook_size)
    chosen = counts.argsort(descending=True)[: min(pairs, int((counts > 0).sum()))]
    head.layer.values.data.view(codebooks * codebook_size, -1)[chosen] = 0


def ascend(head: Any, forgotten: Rows, rest: Rows, rate: float, steps: int) -> None:
    """Gradient ascent on the loss of the forgotten examples."""
    optimizer = head.optimizer(rate)
    for _ in range(steps):
        step(optimizer, -F.cross_entropy(head(forgotten), forgotten.labels))


def scrub(head: Any, forgotten: Rows, rest: Rows, rate: float) -> None:
    """SCRUB (Kurmanji et al., NeurIPS 2023, arXiv:2302.09880): away from the outputs of the head before on the
    forgotten examples, towards them and the labels on the rest.
    """
    before, optimizer = copy.deepcopy(head), head.optimizer(rate)

    def divergence(rows: Rows) -> Tensor:
        target = before.predict(rows).log_softmax(1)
        return F.kl_div(head(rows).log_softmax(1), target, reduction="batchmean", log_target=True)

    for epoch in range(SCRUB_EPOCHS):
        for batch in shuffled(forgotten, 1) if epoch < ASCENT_EPOCHS else ():
            step(optimizer, -divergence(batch))
        for batch in shuffled(rest, 1):
            step(optimizer, divergence(batch) + F.cross_entropy(head(batch), batch.labels))


Way = tuple[str, Callable[..., None], list[Any]]  # name, function, and a tuple of further arguments for each candidate
WAYS: dict[str, list[Way]] = {
    "counted values": [("subtract", subtract, [()])],
    "trained values": [
        ("lowest output", delete_outputs, [()]),
        ("zero pairs", zero_pairs, [(pairs,) for pairs in PAIRS]),
        ("gradient ascent", ascend, ASCENT),
        ("SCRUB", scrub, [(rate,) for rate in SCRUB]),
    ],
    "linear": [
        ("delete row", delete_outputs, [()]),
        ("gradient ascent", ascend, ASCENT),
        ("SCRUB", scrub, [(rate,) for rate in SCRUB]),
    ],
    "least squares": [("subtract", subtract, [()])],
}


def candidates(head: Head, way: Way, forgotten: Rows, rest: Rows) -> Iterable[tuple[Head, float, Any]]:
    """Copies of a head after forgetting, one for each candidate, with milliseconds and arguments."""
    _, forget, grid = way
    for words in grid:
        changed = copy.deepcopy(head)
        started = time.perf_counter()
        forget(changed, forgotten, rest, *words)
        yield changed, 1000 * (time.perf_counter() - started), words


# ---- ways to add a class ----


def add_class(head: Any, examples: Rows, rate: float, steps: int, only_new: bool) -> Head:
    """Trains a copy of a trained head on the examples of a new class; `only_new` trains its row alone, from zero."""
    head, label = copy.deepcopy(head), int(examples.labels[0])
    if only_new:
        head.layer.weight.data[label], head.layer.bias.data[label] = 0, 0
    optimizer = head.optimizer(rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(examples), examples.labels).backward()
        for parameter in head.parameters() if only_new else ():
            parameter.grad[torch.arange(len(parameter.grad)) != label] = 0
        optimizer.step()
    return head
