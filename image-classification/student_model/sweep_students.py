"""The students of a sweep: each combination of method, projector, loss and learning rate, and its files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import get_args

from kd.common.cli import reject_unused
from kd.common.methods import parse_method
from kd.common.reporting.results import RESULTS
from kd.common.utils.ranges import Positive, check_declared
from kd.image_classification.student_model.methods import CONTROL, CONTROLS, METHODS, PLAIN, SIMKD
from kd.image_classification.student_model.simkd import FeatureLossName, Variant

DIVERGED = "diverged.json"  # replaces the results of a student that diverged; contains the epoch


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

    def __post_init__(self) -> None:
        known = {"projectors": get_args(Variant), "feature_losses": get_args(FeatureLossName)}
        for name in ("methods", "projectors", "feature_losses", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one value, and none twice, got {values}")
            wrong = [value for value in values if name in known and value not in known[name]]
            if wrong:
                raise ValueError(f"unknown --{name} {wrong[0]!r}: choose from {', '.join(known[name])}")
        check_declared(self)
        for method in self.methods:
            if method not in (*CONTROLS, SIMKD):
                parse_method(method, METHODS)

    def check_unused_flags(self) -> None:
        if SIMKD not in self.methods:
            reject_unused(f"--methods leaves out {SIMKD}", self, "projectors", "feature_losses")


@dataclass(frozen=True)
class Student:
    """One student of a sweep, for all seeds."""

    method: str
    projector: str | None
    feature_loss: str | None
    learning_rate: float

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.projector, self.feature_loss)))

    @property
    def key(self) -> str:
        """Name of its files and modules, unique among the students of one learning rate."""
        return re.sub(r"[^\w-]", "_", self.label)

    @property
    def is_control(self) -> bool:
        return self.method in CONTROLS

    @property
    def control(self) -> "Student | None":
        """The student with the same network, trained on the labels alone; None for a control."""
        if self.is_control:
            return None
        method = CONTROL if self.method == SIMKD else PLAIN
        return replace(self, method=method, projector=None, feature_loss=None)

    def folder(self, seed_folder: Path) -> Path:
        return seed_folder / "students" / f"{self.key}_lr{self.learning_rate:g}"

    def is_finished(self, seed_folder: Path) -> bool:
        return any((self.folder(seed_folder) / name).exists() for name in (RESULTS, DIVERGED))


def students_of(args: SweepArguments) -> Iterator[Student]:
    """All students, grouped by learning rate, controls first."""
    controls_first = sorted(args.methods, key=lambda method: method not in CONTROLS)
    for rate, method in product(args.learning_rates, controls_first):
        if method != SIMKD:
            yield Student(method, None, None, rate)
            continue
        for projector, loss in product(args.projectors, args.feature_losses):
            yield Student(method, projector, loss, rate)
