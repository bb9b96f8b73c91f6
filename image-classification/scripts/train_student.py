"""Distills a teacher into a student whose architecture the method does not change, with a control.

    python image-classification/scripts/train_student.py --methods kd,dkd --seeds 0,1,2
    python image-classification/scripts/train_student.py --dataset my.csv --teacher_columns "p_*"

`--method none` trains on the labels alone. Several `--methods` share batches and teacher outputs.
"""

from dataclasses import fields

from kd.common.cli import parse, reject_unused, run, show_help
from kd.image_classification.student_model.arguments import (
    CONTROL,
    PLAIN,
    SIMKD,
    MethodArguments,
    PairArguments,
    SimKDWeights,
    StudentTrainingArguments,
)
from kd.image_classification.student_model.data_arguments import (
    TeacherColumnArguments,
)

ARGUMENTS = MethodArguments, PairArguments, SimKDWeights, TeacherColumnArguments, StudentTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from accelerate import PartialState
from transformers import set_seed

from kd.common.methods import Method
from kd.common.outputs import EnsembleTeacher
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.distillation import ImageRun, validate_teacher_views
from kd.image_classification.student_model.matching import image_features, task_spec
from kd.image_classification.student_model.methods import check_dot, check_kd_flags, image_method, with_pair_arguments
from kd.image_classification.student_model.sweep import students_of, sweep
from kd.image_classification.student_model.sweep_report import write_sweep_report
from kd.image_classification.student_model.teacher_columns import distill_from_columns
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.teacher import load_ensemble_teachers


def main() -> None:
    args, pair, weights, data_args, training = parse(*ARGUMENTS)
    pair.apply_pair(data_args, training)
    args.methods = ",".join(args.methods).split(",") if args.methods else []  # --methods kd,dkd
    if SIMKD not in (args.methods or [args.method]):
        reason = f"it applies to {SIMKD} only, and other methods have arguments, as in fitnet:weight=10"
        reject_unused(reason, weights, *(field.name for field in fields(weights)))
    reject_unused("a plain student has no bottleneck", training, "value_learning_rate")
    if data_args.teacher_columns:
        return distill_from_columns(args, pair, data_args, training)
    if args.methods:
        reject_unused("--methods is set", args, "method")
    elif args.method == SIMKD:  # trained side by side with its control, which has the projector too
        args.methods = [SIMKD]
    if args.methods:
        train_side_by_side(args, pair, weights, data_args, training)
    elif args.method == PLAIN:
        train_plain_student(args, pair, data_args, training)
    else:
        distill_student(args, pair, data_args, training)


def train_side_by_side(
    args: MethodArguments,
    pair: PairArguments,
    weights: SimKDWeights,
    data_args: TeacherColumnArguments,
    training: StudentTrainingArguments,
) -> None:
    """Trains the students of several methods and their controls side by side, at one learning rate."""
    reject_unused("students train side by side", args, "ensemble_teachers", "ensemble_weights")
    methods = [with_pair_arguments(spec, pair) for spec in args.methods]
    if not training.no_control:
        controls = [PLAIN, CONTROL] if SIMKD in methods else [PLAIN]
        methods = [*(name for name in controls if name not in methods), *methods]
    students = students_of(methods, ["single"], ["l2"], [training.learning_rate])

    folder = sweep(students, pair, weights, data_args, training, args.teacher_views)
    if PartialState().is_main_process:
        write_sweep_report(folder, students, training.seeds or [training.seed])


def train_plain_student(
    args: MethodArguments, pair: PairArguments, data_args: TeacherColumnArguments, training: StudentTrainingArguments
) -> None:
    """Trains the student on the labels alone, as the control of the other methods, for each seed."""
    check_kd_flags([PLAIN], training)
    reject_unused(
        f"--method {PLAIN} has no teacher", pair, "teacher", "teacher_epochs", "ensemble_teachers", "teacher_views"
    )
    reject_unused(f"--method {PLAIN} has no teacher", training, "no_control", "margin", "dot_delta")
    data = data_args.load()
    new_classifier(pair.student, data.config)  # raises UserError before anything is written

    run = ImageRun(PLAIN, training, data, args, pair, data_args)
    for seed_run in run.each_seed():
        set_seed(seed_run.args.seed)
        student = seed_run.train_on_labels("student", new_classifier(pair.student, data.config))
        models = {"student": (f"{pair.student}, labels only", student)}
        seed_run.report(PLAIN, models, labels_only=True)
    run.summarize()


def distill_student(
    args: MethodArguments, pair: PairArguments, data_args: TeacherColumnArguments, training: StudentTrainingArguments
) -> None:
    """Trains a student and its control, for each seed."""
    args.method = with_pair_arguments(args.method, pair)
    check_kd_flags([args.method], training)
    data = data_args.load()
    if args.teacher_views:
        validate_teacher_views(args.teacher_views, data, training)
    method_for = image_method(args.method, training)
    teacher, data, pretrained, known = pair.load_teacher(data, training)
    others = load_ensemble_teachers(args.ensemble_teachers, data)
    student = new_classifier(pair.student, data.config)
    method = method_for(task_spec(student, teacher, data, training.views))
    method.for_labels(data.splits["train"].labels)  # raises UserError if it needs labels that the data lack
    auxiliary_parameters = method.auxiliary_parameters  # raises UserError if the method has no term
    check_dot(training, method)
    check_compatible(args, method, student, teacher)

    run = ImageRun(
        args.method, training, data, args, pair, data_args,
        teacher=teacher if pretrained else None,
        ensemble_teachers=EnsembleTeacher(others) if others else None,
    )  # fmt: skip
    if not pretrained:
        teacher = run.train_on_labels("teacher", teacher, pair.epochs_of_teacher(training))
    outputs = EnsembleTeacher([teacher, *others], weights=args.ensemble_weights) if others else teacher
    names = " + ".join([pair.teacher, *args.ensemble_teachers])
    teacher_results = run.evaluate_teacher(names, outputs, None if others else known)

    def distilled(run: ImageRun, student: ImageClassifier) -> ImageClassifier:
        method = method_for(task_spec(student, teacher, data, training.views))
        return run.distill("student", student, method, outputs, args.teacher_views)

    for seed_run in run.each_seed():
        models = seed_run.train_pair(pair.student, args.method, distilled)
        seed_run.report(args.method, models, teacher_results, auxiliary_parameters)
    run.summarize()


def check_compatible(
    args: MethodArguments, method: Method, student: ImageClassifier, teacher: ImageClassifier
) -> None:
    """Raises UserError if a network cannot process the images, or the method needs features that flags exclude."""
    for model in (student, teacher):
        image_features(model)
    if args.teacher_views is not None and method.teacher_features:
        raise UserError(f"--teacher_views caches only logits, but --method {args.method} needs features: leave it out")
    if args.ensemble_teachers and method.teacher_features:
        raise UserError(f"--method {args.method} needs a single teacher: leave out --ensemble_teachers")


if __name__ == "__main__":
    run(main)
