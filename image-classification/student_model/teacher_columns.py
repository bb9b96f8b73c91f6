"""Distillation from the outputs of a teacher that are columns of the data. No teacher model is loaded.

The outputs of an image apply to all of its augmented views, since the teacher predicted the original image.
"""

from dataclasses import replace
from typing import Any

from kd.common.cli import reject_unused
from kd.common.metrics.tasks import task_metrics
from kd.common.training.teacher_columns import check_method, measure_outputs, outputs_of_columns, where_outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.arguments import (
    PLAIN,
    SIMKD,
    ImageTrainingArguments,
    MethodArguments,
    PairArguments,
)
from kd.image_classification.student_model.data_arguments import (
    TeacherColumnArguments,
)
from kd.image_classification.student_model.distillation import ImageRun
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.student_model.methods import check_dot, check_kd_flags, image_method, with_pair_arguments
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier

OF_TEACHERS = (
    *("teacher", "teacher_architecture", "teacher_weights", "teacher_mean", "teacher_std", "teacher_accuracy"),
    *("allow_weak_teacher", "import_module", "teacher_epochs"),
)


def distill_from_columns(
    args: MethodArguments, pair: PairArguments, data_args: TeacherColumnArguments, training: ImageTrainingArguments
) -> None:
    """Trains a student on labels and the outputs in the data, and a control on the labels alone, for each seed."""
    check_flags(args, pair)
    args.method = with_pair_arguments(args.method, pair)
    check_kd_flags([args.method], training)
    method_for = image_method(args.method, training)
    data = data_args.load()
    assert data.teacher is not None
    logits = data.teacher.logits["train"]
    student = new_classifier(pair.student, data.config)
    method = method_for(task_spec(student, student, data, training.views))
    check_method(args.method, bool(method.teacher_features), data.teacher, logits)
    method.for_labels(data.splits["train"].labels)  # raises UserError if it needs labels that the data lack
    auxiliary_parameters = method.auxiliary_parameters
    check_dot(training, method)

    run = ImageRun(args.method, training, data, args, pair, data_args)
    measured = measure_teacher(run, data)

    def distilled(run: ImageRun, student: ImageClassifier) -> ImageClassifier:
        method = method_for(task_spec(student, student, data, training.views))
        method = replace(method, terms=where_outputs(method.terms, logits))
        return run.distill("student", student, method, outputs_of_columns(logits))

    for seed_run in run.each_seed():
        models = seed_run.train_pair(pair.student, args.method, distilled)
        seed_run.report(args.method, models, None, auxiliary_parameters, **measured)
    run.summarize()


def check_flags(args: MethodArguments, pair: PairArguments) -> None:
    """Raises UserError for flags of a teacher model, and for methods that need one."""
    reason = "the teacher is --teacher_columns"
    reject_unused(reason, pair, *OF_TEACHERS)
    reject_unused(reason, args, "ensemble_teachers", "ensemble_weights", "teacher_views")
    if args.methods:
        raise UserError("--methods trains side by side with a teacher, not with --teacher_columns: pass --method")
    if args.method == SIMKD:
        raise UserError(f"--method {SIMKD} needs a teacher's feature maps, not --teacher_columns: pass --method kd")
    if args.method == PLAIN:
        raise UserError(f"--method {PLAIN} does not use a teacher: leave out --teacher_columns, or pass --method kd")


def measure_teacher(run: TrainerRun, data: ImageData) -> dict[str, Any]:
    """The teacher's description and metrics (see `measure_outputs`) for the results."""
    assert data.teacher is not None
    logits = data.teacher.logits
    splits = {split: (data.splits[split].labels.numpy(), logits[split]) for split in logits}
    scores = task_metrics("classification", data.label_names)
    measured = measure_outputs(run, data.teacher, scores, "accuracy", splits)
    return {"teacher_columns": data.teacher.description, "teacher_outputs": measured}
