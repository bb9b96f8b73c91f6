"""Distills an image classifier with a discrete key-value bottleneck into a smaller one.

    python image-classification/scripts/distill_bottleneck.py --keys new --dataset cifar10

The student's maps match the teacher's as in SimKD. Its keys are carried, fitted (`new`) or random; `--keys reused`
takes the teacher's values too. The control has new keys and no teacher.
"""

from kd.common.cli import parse, run, show_help
from kd.image_classification.student_model.arguments import (
    BottleneckTrainingArguments,
    ImageBottleneckArguments,
    PairArguments,
    SimKDArguments,
)
from kd.image_classification.student_model.data_arguments import (
    PairDataArguments,
)

ARGUMENTS = ImageBottleneckArguments, PairArguments, SimKDArguments, PairDataArguments, BottleneckTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from transformers import set_seed

from kd.common.bottleneck.module import meta_bottleneck
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.bottleneck import replace_head
from kd.image_classification.student_model.distillation import ImageRun
from kd.image_classification.student_model.simkd import simkd, simkd_student


def main() -> None:
    bottleneck, pair, matching, data_args, training = parse(*ARGUMENTS)
    pair.apply_pair(data_args, training)
    bottleneck.check_training(training)
    data, factor = data_args.load(), matching.projector_factor
    encoder, data, pretrained, known = pair.load_teacher(data, training)
    student = simkd_student(pair.student, encoder, data, factor)  # raises UserError if they do not fit
    simkd(student, encoder, matching, training.temperature).for_labels(data.splits["train"].labels)
    if encoder.config.bottleneck:
        raise UserError(f"teacher {pair.teacher} already has a bottleneck: pass one with a linear head")
    width: int = encoder.head.in_features
    meta_bottleneck(width, len(data.label_names), bottleneck.shape())

    name, instances = f"keys_{bottleneck.keys}", (bottleneck, pair, matching, data_args)
    run = ImageRun(name, training, data, *instances, teacher=encoder if pretrained else None)
    if not pretrained:
        encoder = run.train_on_labels("teacher_encoder", encoder, pair.epochs_of_teacher(training))
    run.evaluate_teacher(pair.teacher, encoder, known)
    teacher = replace_head(run, data, "teacher", encoder, bottleneck, "new")
    teacher_results = run.evaluate_teacher(f"{pair.teacher} + bottleneck", teacher)

    for seed_run in run.each_seed():
        control = None
        if not training.no_control:
            set_seed(seed_run.args.seed)
            control = simkd_student(pair.student, encoder, data, factor, reuse_head=False)
            control = seed_run.train_on_labels("control_encoder", control)
            control = replace_head(seed_run, data, "control", control, bottleneck, "new")

        set_seed(seed_run.args.seed)
        student = simkd_student(pair.student, encoder, data, factor)
        method = simkd(student, encoder, matching, training.temperature)
        student = seed_run.distill("student_encoder", student, method, encoder)
        student = replace_head(seed_run, data, "student", student, bottleneck, bottleneck.keys, teacher)

        models = {
            "control": (f"{pair.student} + projector + bottleneck, labels only", control),
            "student": (f"{pair.student} + projector + bottleneck, keys {bottleneck.keys}", student),
        }
        seed_run.report(name, models, teacher_results)
    run.summarize()


if __name__ == "__main__":
    run(main)
