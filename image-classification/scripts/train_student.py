"""Distills a teacher into a plain student by a method that leaves nothing behind in it, with a control.

    python image-classification/scripts/train_student.py --method kd
    python image-classification/scripts/train_student.py image-classification/scripts/paper.yaml --dataset cifar100 \\
        --teacher runs/image-classification/teacher_cifar100 --method attention

`--method none` trains the student on the labels alone: what the other methods have as their control.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.cli import parse, run
from common.utils.errors import UserError
from image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from image_classification.student_model.baselines import METHODS
from image_classification.student_model.experiment import Experiment
from image_classification.teacher_model.classifier import new_classifier
from image_classification.teacher_model.teacher import teacher_sketch


@dataclass
class Arguments:
    """How the teacher is listened to."""

    method: Literal["none", "kd", "fitnet", "attention"] = field(
        default="kd", metadata={"help": "nothing, soft targets, a hint at the middle stage, attention maps"}
    )
    teacher_views: Path | None = field(
        default=None,
        metadata={"help": "folder for a table of what the teacher says about each view (kd); later runs only read it"},
    )


def main() -> None:
    args, pair, data_args, training = parse(Arguments, PairArguments, DataArguments, ImageTrainingArguments)
    data = data_args.load()
    if args.method == "none":
        new_classifier(pair.student, data.config)  # an unknown one is refused before anything is written
        experiment = Experiment(args.method, training, data, args, pair, data_args)
        student = experiment.labels_only("student", lambda: new_classifier(pair.student, data.config))
        experiment.report(student=(f"{pair.student}, labels only", student))
        return
    sketch, seen = teacher_sketch(pair.teacher, data)  # refuses now what would fail after hours of training
    method = METHODS[args.method]
    how = method(new_classifier(pair.student, seen.config), sketch, seen, training.alpha, training.temperature)
    if args.teacher_views is not None and not how.logits_only:
        raise UserError(f"--teacher_views keeps logits, --method {args.method} needs more of the teacher")
    experiment = Experiment(args.method, training, data, args, pair, data_args)
    teacher = experiment.teacher(pair.teacher, pair.teacher_epochs)
    data = experiment.data
    control = None
    if not training.no_control:
        control = experiment.labels_only("control", lambda: new_classifier(pair.student, data.config))
    student = experiment.distill(
        teacher,
        lambda: new_classifier(pair.student, data.config),
        lambda student: method(student, teacher, data, training.alpha, training.temperature),
        args.teacher_views,
    )
    experiment.report(
        teacher=(pair.teacher, teacher),
        control=None if control is None else (f"{pair.student}, labels only", control),
        student=(f"{pair.student}, {args.method}", student),
    )


if __name__ == "__main__":
    run(main)
