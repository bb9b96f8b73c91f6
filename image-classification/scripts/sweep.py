"""Trains students of one teacher for all methods x projectors x losses x learning rates x seeds.

    python image-classification/scripts/sweep.py --teacher runs/image-classification/teacher --seeds 0 1 2
    python image-classification/scripts/sweep.py image-classification/scripts/fast.yaml --dataset cifar10 \\
        --teacher runs/image-classification/teacher_cifar10 --methods none control kd simkd --learning_rates 0.1

The result is one table and one plot. Running the command again, also with more values, trains only missing students.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.image_classification.student_model.arguments import (
    PairArguments,
    SimKDWeights,
    StudentTrainingArguments,
    SweepArguments,
)
from kd.image_classification.student_model.data_arguments import (
    PairDataArguments,
)

ARGUMENTS = SweepArguments, PairArguments, SimKDWeights, PairDataArguments, StudentTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from accelerate import PartialState

from kd.image_classification.student_model.methods import with_pair_arguments
from kd.image_classification.student_model.sweep import students_of, sweep
from kd.image_classification.student_model.sweep_report import write_sweep_report


def main() -> None:
    axes, pair, weights, data_args, training = parse(*ARGUMENTS)
    reject_unused("a sweep has --learning_rates", training, "learning_rate")
    pair.apply_pair(data_args, training)
    methods = [with_pair_arguments(spec, pair) for spec in axes.methods]
    students = students_of(methods, axes.projectors, axes.feature_losses, axes.learning_rates)

    folder = sweep(students, pair, weights, data_args, training)
    if PartialState().is_main_process:
        write_sweep_report(folder, students, training.seeds or [training.seed])


if __name__ == "__main__":
    run(main)
