"""Distills a teacher with a discrete key-value bottleneck into a student with one, on images.

    python image-classification/scripts/distill_bottleneck.py --keys carried
    python image-classification/scripts/distill_bottleneck.py --keys new --dataset cifar10 \\
        --teacher runs/image-classification/teacher_cifar10

The teacher's backbone is trained on labels and frozen, its bottleneck filled. The student's backbone and projector
learn the teacher's maps as in SimKD, without labels; then its bottleneck gets keys (carried from the teacher, new ones
fitted to its own embeddings, random ones) and values, or the teacher's keys and values together (reused). The control
is the same network trained on the labels alone, with a bottleneck of its own.
"""

from dataclasses import dataclass, field

from kd.common.bottleneck.codes import Keys
from kd.common.cli import parse, reject_unused, run
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.bottleneck import BottleneckShape, ValueArguments, fill
from kd.image_classification.student_model.experiment import Experiment
from kd.image_classification.student_model.simkd import SimKDArguments, simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.teacher import teacher_sketch


@dataclass
class Arguments:
    """Whose keys."""

    keys: Keys = field(default="carried", metadata={"help": "where the student's keys come from"})


def main() -> None:
    args, shape, values, pair, matching, data_args, training = parse(
        Arguments,
        BottleneckShape,
        ValueArguments,
        PairArguments,
        SimKDArguments,
        DataArguments,
        ImageTrainingArguments,
    )
    if args.keys == "reused":
        reject_unused("--keys reused trains no student's values", training, "alpha", "temperature")
    data, factor = data_args.load(), matching.projector_factor
    sketch, seen = teacher_sketch(pair.teacher, data)  # refuses now what would fail after hours of training
    simkd(simkd_student(pair.student, sketch, seen, factor), sketch, seen, matching, training.temperature)
    if sketch.config.bottleneck:
        raise UserError(f"teacher {pair.teacher} has a bottleneck already: name one with a linear head")
    shape.check(sketch.head.in_features)
    experiment = Experiment(f"keys_{args.keys}", training, data, args, shape, values, pair, matching, data_args)
    encoder = experiment.teacher(pair.teacher, pair.teacher_epochs, stage="teacher_encoder")
    experiment.measure(pair.teacher, encoder)
    data = experiment.data

    def filled(
        name: str, behind: ImageClassifier, keys: Keys, teacher: ImageClassifier | None = None
    ) -> ImageClassifier:
        return experiment.stage(name, lambda: fill(experiment, name, behind, shape, values, keys, teacher))

    teacher = filled("teacher", encoder, "new")
    experiment.measure(f"{pair.teacher} + bottleneck", teacher)
    control = None
    if not training.no_control:
        own = experiment.labels_only(
            "control_encoder", lambda: simkd_student(pair.student, encoder, data, factor, False)
        )
        control = filled("control", own, "new")
    aligned = experiment.distill(
        encoder,
        lambda: simkd_student(pair.student, encoder, data, factor),
        lambda student: simkd(student, encoder, data, matching, training.temperature),
        stage="student_encoder",
    )
    student = filled("student", aligned, args.keys, teacher)
    experiment.report(
        teacher=(f"{pair.teacher} + bottleneck", teacher),
        control=None if control is None else (f"{pair.student} + projector + bottleneck, labels only", control),
        student=(f"{pair.student} + projector + bottleneck, keys {args.keys}", student),
    )


if __name__ == "__main__":
    run(main)
