"""Many students of one teacher: methods x projectors x losses x learning rates x seeds, in one table and one plot.

    python image-classification/scripts/sweep.py --teacher runs/image-classification/teacher --seeds 0 1 2
    python image-classification/scripts/sweep.py image-classification/scripts/fast.yaml --dataset cifar10 \\
        --teacher runs/image-classification/teacher_cifar10 --methods none control kd simkd --learning_rates 0.1

The same command again, also with more values on an axis, trains only what is missing.
"""

import copy
from itertools import groupby
from pathlib import Path
from typing import Any

from common.cli import parse, run
from common.results import RECIPE
from common.utils.errors import UserError
from common.utils.files import read_json
from image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from image_classification.student_model.evaluation import evaluate
from image_classification.student_model.experiment import Experiment
from image_classification.student_model.simkd import SimKDWeights
from image_classification.student_model.sweep import (
    Cell,
    SweepArguments,
    cells_of,
    control_of,
    group_arguments,
    losses_of,
    student_of,
    train_side_by_side,
)
from image_classification.student_model.sweep_report import results_file, show
from image_classification.teacher_model.teacher import given_teacher, teacher_sketch


def main() -> None:
    axes, pair, weights, data_args, training = parse(
        SweepArguments, PairArguments, SimKDWeights, DataArguments, ImageTrainingArguments
    )
    if training.max_grad_norm:
        raise UserError("students side by side would be coupled by clipping: --max_grad_norm must be 0")
    folder, data = Path(training.output_dir or "runs/image-classification/sweep"), data_args.load()
    cells, teacher_name = list(cells_of(axes)), pair.teacher
    sketch, seen = teacher_sketch(teacher_name, data)  # refuses now what would fail after hours of training
    for cell in {cell.key: cell for cell in cells}.values():
        student_of(cell, pair.student, sketch, seen, training, weights)
    if given_teacher(teacher_name, data) is None:
        args = copy.copy(training)
        args.output_dir = teacher_name = str(folder / "teacher")
        args.resume_from_checkpoint = (folder / "teacher" / RECIPE).exists()
        Experiment("teacher", args, data, pair, data_args).teacher(pair.teacher, pair.teacher_epochs)

    given = given_teacher(teacher_name, data)
    assert given is not None, "it has just been trained"
    teacher, data = given
    missing = [cell for cell in cells if not results_file(folder, cell).exists()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are finished already")
    measured, said = evaluate(pair.teacher, teacher, data) if missing else ({}, {})
    for _, members in groupby(missing, lambda cell: (cell.learning_rate, cell.seed)):
        group = list(members)
        experiment = Experiment("sweep", group_arguments(training, folder, group), data, pair, weights, data_args)
        students = train_side_by_side(experiment, group, pair.student, teacher, weights)
        for cell in group:
            student = students[cell.key]
            entries = {"teacher": measured, "control": _control(folder, cell)}
            entries["student"], _ = evaluate(f"{pair.student}, {cell.label}", student, data, said)
            experiment.write(
                results_file(folder, cell).parent,
                cell.label,
                entries,
                student,
                {"student": losses_of(cell, experiment.run.history["student"])},
                side_by_side_with=", ".join(other.label for other in group if other != cell) or "none",
            )
    show(folder, cells)


def _control(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The finished control of a cell, where the sweep has one."""
    control = control_of(cell)
    if control is None or not results_file(folder, control).exists():
        return None
    return read_json(results_file(folder, control))["models"]["student"]


if __name__ == "__main__":
    run(main)
