"""A student that is to be taken away, as its domain describes it, and whether an export answers as the student does.

A domain has one function for it, `load(name, task) -> Exportable` in its `student_model/exportable.py`; the rest is
common/export/__main__.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.export.onnx import Axes, answer_of, axes_by_input
from kd.common.utils.errors import UserError

TOLERANCE = 1e-3  # of a logit, so a prediction may only change where the two largest are closer than twice that
TIES = 1e-3  # share of rows beyond it under a bottleneck: where two keys are equally near, rounding chooses


def nothing(folder: Path) -> None:
    """Writes no files."""


@dataclass
class Exportable:
    """A student, inputs that it knows, and code that uses it.

    model: in eval mode on the CPU; `model(**inputs)` answers with a tensor (batch, ...), or with logits.
    inputs: the example that is followed, by name, each (batch, ...), with 2 or more along `axes`.
    others: what the export is checked on: inputs of other sizes than the example along all of `axes`.
    axes: which may change their size, as of `kd.common.export.onnx.to_onnx`.
    usage: Python that goes on from `folder` and `model(inputs)`, from arrays by name to one array; needs nothing of
        this project.
    output: what the answer is called.
    beside: writes the files that `usage` reads into a folder.
    original: what the export is compared with; the model itself, unless the student comes from another library.
    tolerance: by how much a number of the answer may differ.

    Raises ValueError where `others` try no other size of some axis.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    others: list[dict[str, Tensor]]
    axes: Axes | dict[str, Axes]
    usage: str
    output: str = "logits"
    beside: Callable[[Path], None] = nothing
    original: Callable[..., Tensor] | None = None
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name, axes in axes_by_input(self.inputs, self.axes).items():
            for axis, meaning in axes.items():
                if {other[name].shape[axis] for other in self.others} <= {self.inputs[name].shape[axis]}:
                    raise ValueError(f"no other size of {name}'s {meaning} is tried")

    @property
    def tied(self) -> float:
        """Share of the rows, rounded up, that may differ by more."""
        return share_of_ties(self.model)

    @torch.no_grad()
    def answer(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the student itself says."""
        return answer_of((self.original or self.model)(**inputs))


def share_of_ties(model: nn.Module) -> float:
    """TIES of a model with a bottleneck, else 0."""
    return TIES if any(isinstance(part, DiscreteKeyValueBottleneck) for part in model.modules()) else 0.0


@dataclass(frozen=True)
class Check:
    """One of `others`: sizes of the inputs and of the answer, and by how much the export's answer differs at most."""

    inputs: dict[str, list[int]]
    answer: list[int]
    difference: float


@torch.no_grad()
def checks(name: str, student: Exportable, exported: Callable[..., Tensor]) -> list[Check]:
    """Compares an export with its student. Raises UserError unless it answers alike."""
    found, distances = [], []
    for inputs in student.others:
        said = student.answer(inputs)
        distances.append(apart(said.numpy(), exported(**inputs).numpy()))
        shapes = {key: list(value.shape) for key, value in inputs.items()}
        found.append(Check(shapes, list(said.shape), float(distances[-1].max())))
    refuse_other_answers(name, np.concatenate(distances), "rows", student.tolerance, student.tied)
    return found


def apart(said: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The largest difference in each row (rows,) of two answers (rows, ...); infinite where their shapes differ."""
    if said.shape != other.shape:
        return np.full(len(said), np.inf)
    return np.abs(said.astype(np.float64) - other).reshape(len(said), -1).max(axis=1)


def refuse_other_answers(
    name: str, distances: np.ndarray, rows: str, tolerance: float = TOLERANCE, tied: float = 0.0
) -> None:
    """Raises UserError unless the `distances` (rows,) of `apart` are within the tolerance, but for a share `tied`."""
    wrong = ~(distances <= tolerance)  # NaN is wrong too
    if wrong.sum() > np.ceil(tied * len(wrong)):
        raise UserError(
            f"the export of {name} does not say what the model says: on {wrong.sum()} of {len(wrong)} {rows} it "
            f"differs by more than {tolerance:g}, at most by {distances.max():.3g}; nothing is written"
        )


def check_table(found: list[Check], output: str) -> tuple[list[str], list[list[str]]]:
    """Sizes of what was checked, and by how much the answers differ at most."""
    rows = []
    for check in found:
        cells = [sizes(size) for size in (*check.inputs.values(), check.answer)]
        rows.append([*cells, f"{check.difference:.1e}"])
    return [*found[0].inputs, output, "largest difference"], rows


def sizes(axes: list[Any]) -> str:
    """(2, 7) as `2 x 7`; an axis may have a name instead."""
    return " x ".join(map(str, axes))
