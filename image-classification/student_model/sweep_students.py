"""The axes of a sweep."""

from dataclasses import dataclass, field
from typing import get_args

from kd.common.cli import reject_unused
from kd.common.methods import parse_method
from kd.common.utils.ranges import Positive, check_declared
from kd.image_classification.student_model.methods import CONTROL, CONTROLS, METHODS, SIMKD
from kd.image_classification.student_model.simkd import FeatureLossName, Variant


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
