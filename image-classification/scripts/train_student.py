"""Distills a teacher into a plain student by a method that leaves nothing behind in it, with a control.

    python image-classification/scripts/train_student.py --method kd
    python image-classification/scripts/train_student.py --method dkd:beta=2:warmup=0
    python image-classification/scripts/train_student.py --methods kd,dkd,dist --seeds 0,1,2
    python image-classification/scripts/train_student.py image-classification/scripts/paper.yaml --dataset cifar100 \\
        --teacher runs/image-classification/teacher_cifar100 --method attention

`--method none` trains the student on the labels alone: what the other methods have as their control. Several
`--methods` are trained side by side on the same batches, from one pass of the teacher, into one table.
"""

from dataclasses import dataclass, field
from pathlib import Path

from kd.common.cli import parse, reject_unused, run
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.cells import CONTROL, PLAIN, SIMKD, SweepArguments
from kd.image_classification.student_model.experiment import Experiment, check_teacher_views
from kd.image_classification.student_model.methods import METHODS, Pair
from kd.image_classification.student_model.simkd import SimKDWeights
from kd.image_classification.student_model.sweep import for_pair, method_of, refuse_unheard_flags, sweep
from kd.image_classification.teacher_model.classifier import new_classifier
from kd.image_classification.teacher_model.teacher import teacher_sketch


@dataclass
class Arguments:
    """How the teacher is listened to."""

    method: str = field(
        default="kd",
        metadata={"help": f"NAME or NAME:setting=value:...; {PLAIN} (labels only), {', '.join(METHODS)}"},
    )
    methods: list[str] = field(
        default_factory=list, metadata={"help": "several, also simkd, trained side by side into one table"}
    )
    teacher_views: Path | None = field(
        default=None,
        metadata={
            "help": "folder for a table of the teacher's logits of each view, for methods that need no more of it; "
            "later runs only read it"
        },
    )

    def axes(self, training: ImageTrainingArguments) -> SweepArguments:
        """Of the sweep that several methods are."""
        methods = ",".join(self.methods).split(",")
        wanted = [PLAIN, CONTROL] if SIMKD in methods else [PLAIN]
        controls = [] if training.no_control else [name for name in wanted if name not in methods]
        try:
            axes = SweepArguments(
                [*controls, *methods], projectors=["single"], learning_rates=[training.learning_rate]
            )
        except ValueError as error:
            raise UserError(f"--methods: {error}") from error
        axes.seeds, training.seeds = training.seeds or [training.seed], None
        return axes


def main() -> None:
    args, pair, weights, data_args, training = parse(
        Arguments, PairArguments, SimKDWeights, DataArguments, ImageTrainingArguments
    )
    if training.seeds and not args.methods:
        raise UserError("--seeds are those of several --methods: pass --seed for one --method")
    if weights != SimKDWeights() and SIMKD not in ",".join(args.methods).split(","):
        raise UserError(
            "the weights and the projector of features are those of simkd, which is none of the methods: "
            "name it in --methods, or give a method its own settings, as in fitnet:weight=10"
        )
    reject_unused("a plain student has no bottleneck", training, "value_learning_rate")
    if args.methods:
        reject_unused("--methods is given", training, "method")
        sweep(args.axes(training), pair, weights, data_args, training, args.teacher_views)
        return
    if args.method == SIMKD:
        raise UserError("simkd alone is train_simkd.py; here it is one of several --methods")
    args.method = for_pair(args.method, pair)
    refuse_unheard_flags([args.method], training)
    data = data_args.load()
    if args.teacher_views:
        check_teacher_views(args.teacher_views, data, training)
    if args.method == PLAIN:
        reject_unused(f"--method {PLAIN} has no teacher", training, "teacher", "teacher_epochs", "no_control")
        new_classifier(pair.student, data.config)  # an unknown one is refused before anything is written
        experiment = Experiment(args.method, training, data, args, pair, data_args)
        student = experiment.labels_only("student", lambda: new_classifier(pair.student, data.config))
        experiment.report(student=(f"{pair.student}, labels only", student), labels_only=True)
        return
    method = method_of(args.method, training)
    sketch, seen = teacher_sketch(pair.teacher, data)  # refuses now what would fail after hours of training
    how = method(Pair(new_classifier(pair.student, seen.config), sketch, seen, training.views))
    if args.teacher_views is not None and not how.logits_only:
        raise UserError(f"--teacher_views keeps logits, --method {args.method} needs more of the teacher")
    experiment = Experiment(args.method, training, data, args, pair, data_args)
    teacher = experiment.teacher(pair.teacher, pair.teacher_epochs)
    experiment.measure(pair.teacher, teacher)
    data = experiment.data
    control = None
    if not training.no_control:
        control = experiment.labels_only("control", lambda: new_classifier(pair.student, data.config))
    student = experiment.distill(
        teacher,
        lambda: new_classifier(pair.student, data.config),
        lambda student: method(Pair(student, teacher, data, training.views)),
        args.teacher_views,
    )
    experiment.report(
        parameters_beside=how.parameters_beside,
        teacher=(pair.teacher, teacher),
        control=None if control is None else (f"{pair.student}, labels only", control),
        student=(f"{pair.student}, {args.method}", student),
    )


if __name__ == "__main__":
    run(main)
