"""The ways in which `forgetting.py` removes examples from heads or adds a class."""

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from heads import Head, Ridge, Rows, shuffled, step
from torch import Tensor

# Grids of the competitors. Rates are for a linear head; `Trained.optimizer` scales them for values.
ASCENT = [(rate, steps) for rate in (1e-2, 1e-1) for steps in (1, 5, 20)]
SCRUB = [1e-2, 1e-1]
SCRUB_EPOCHS, ASCENT_EPOCHS = 2, 1  # epochs on the rest, and those with a preceding epoch on the forgotten examples
PAIRS = [10, 100, 1000, 10**9]  # the most selected pairs whose values are set to zero

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
