"""Trains students of one teacher for all methods x projectors x losses x learning rates x seeds.

    python image-classification/scripts/sweep.py --teacher runs/image-classification/teacher --seeds 0 1 2
    python image-classification/scripts/sweep.py image-classification/scripts/fast.yaml --dataset cifar10 \\
        --teacher runs/image-classification/teacher_cifar10 --methods none control kd simkd --learning_rates 0.1

The result is one table and one plot. Running the command again, also with more values, trains only missing students.
"""

from dataclasses import dataclass, field
from typing import get_args

from accelerate import PartialState

from kd.common.cli import parse, reject_unused, run
from kd.common.utils.ranges import Positive, check_declared
from kd.image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.methods import CONTROL, SIMKD, with_pair_arguments
from kd.image_classification.student_model.simkd import FeatureLossName, SimKDWeights, Variant
from kd.image_classification.student_model.sweep import students_of, sweep
from kd.image_classification.student_model.sweep_report import show


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

    def check_unused_flags(self) -> None:
        if SIMKD not in self.methods:
            reject_unused(f"--methods leaves out {SIMKD}", self, "projectors", "feature_losses")


def main() -> None:
    axes, pair, weights, data_args, training = parse(
        SweepArguments, PairArguments, SimKDWeights, DataArguments, ImageTrainingArguments
    )
    reject_unused("a sweep has --learning_rates", training, "learning_rate")
    pair.apply_pair(data_args, training)
    methods = [with_pair_arguments(spec, pair) for spec in axes.methods]
    students = students_of(methods, axes.projectors, axes.feature_losses, axes.learning_rates)

    folder = sweep(students, pair, weights, data_args, training)
    if PartialState().is_main_process:
        show(folder, students, training.seeds or [training.seed])


if __name__ == "__main__":
    run(main)
