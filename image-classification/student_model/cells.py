"""The students of a sweep: every method, loss, learning rate and seed asked for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import get_args

from kd.common.cli import reject_unused
from kd.common.methods import chosen
from kd.common.utils.ranges import Positive, check_declared
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.simkd import FeatureLossName, Variant

PLAIN, CONTROL, SIMKD = "none", "control", "simkd"
CONTROLS = (PLAIN, CONTROL)  # see labels only


@dataclass
class SweepArguments:
    """The axes of a sweep."""

    methods: list[str] = field(
        default_factory=lambda: [CONTROL, SIMKD],
        metadata={
            "help": "none (labels only), control (labels only, with a projector), simkd, or any method of "
            "train_student.py, also with settings, as dkd:beta=2"
        },
    )
    projectors: list[str] = field(default_factory=lambda: ["single", "multi", "all-layer"])
    feature_losses: list[str] = field(
        default_factory=lambda: ["l2"], metadata={"help": "l2, kl-channel, kl-spatial, cosine"}
    )
    learning_rates: list[Positive] = field(default_factory=lambda: [0.001, 0.005, 0.01, 0.05, 0.1])
    seeds: list[int] = field(default_factory=lambda: [0], init=False)  # those of --seeds

    def __post_init__(self) -> None:
        known = {
            "projectors": get_args(Variant),
            "feature_losses": get_args(FeatureLossName),
        }
        for name in ("methods", "projectors", "feature_losses", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one value, and none twice, got {values}")
            wrong = [value for value in values if name in known and value not in known[name]]
            if wrong:
                raise ValueError(f"--{name} knows no {wrong[0]!r}: choose from {', '.join(known[name])}")
        check_declared(self)
        for method in self.methods:
            if method not in (*CONTROLS, SIMKD):
                chosen(method, METHODS)

    def check_unused_flags(self) -> None:
        if SIMKD not in self.methods:
            reject_unused(f"--methods leaves out {SIMKD}", self, "projectors", "feature_losses")


@dataclass(frozen=True)
class Cell:
    """One student of a sweep."""

    method: str
    projector: str | None
    feature_loss: str | None
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.projector, self.feature_loss)))

    @property
    def key(self) -> str:
        """Tells the cells of one learning rate and seed apart, in names of files and modules."""
        return re.sub(r"[^\w-]", "_", self.label)

    @property
    def name(self) -> str:
        return f"{self.key}_lr{self.learning_rate:g}_seed{self.seed}"


def cells_of(args: SweepArguments) -> Iterator[Cell]:
    """Those of one learning rate and seed one after the other, controls first."""
    first = sorted(args.methods, key=lambda method: method not in CONTROLS)
    for rate, seed, method in product(args.learning_rates, args.seeds, first):
        if method != SIMKD:
            yield Cell(method, None, None, rate, seed)
            continue
        for projector, loss in product(args.projectors, args.feature_losses):
            yield Cell(method, projector, loss, rate, seed)


def control_of(cell: Cell) -> Cell | None:
    """The cell that trains the same network on the labels alone."""
    if cell.method in CONTROLS:
        return None
    method = CONTROL if cell.method == SIMKD else PLAIN
    return replace(cell, method=method, projector=None, feature_loss=None)


def results_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.name / "results.json"


def lost_file(folder: Path, cell: Cell) -> Path:
    """Stands in the place of results where a student's loss was not finite, and says in which epoch that was."""
    return results_file(folder, cell).with_name("lost.json")


def is_finished(folder: Path, cell: Cell) -> bool:
    return results_file(folder, cell).exists() or lost_file(folder, cell).exists()
