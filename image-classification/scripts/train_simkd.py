"""Trains a student with SimKD, which reuses the teacher's classifier, and a control without the teacher.

    python image-classification/scripts/train_simkd.py
    python image-classification/scripts/train_simkd.py --projector all-layer
    python image-classification/scripts/train_simkd.py image-classification/scripts/paper.yaml --dataset cifar100 \\
        --teacher runs/image-classification/teacher_cifar100 --student resnet8x4 \\
        --feature_weight 1 --kl_weight 0

The control is the same network, including the projector, trained on the labels alone.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.image_classification.student_model.arguments import (
    ImageTrainingArguments,
    PairArguments,
    SimKDArguments,
)
from kd.image_classification.student_model.data_arguments import (
    PairDataArguments,
)

ARGUMENTS = PairArguments, SimKDArguments, PairDataArguments, ImageTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from transformers import set_seed

from kd.image_classification.student_model.distillation import ImageRun
from kd.image_classification.student_model.simkd import simkd, simkd_student


def main() -> None:
    pair, args, data_args, training = parse(*ARGUMENTS)
    pair.apply_pair(data_args, training)
    reject_unused("SimKD has --feature_weight, --cls_weight and --kl_weight", training, "alpha", "value_learning_rate")
    if not args.kl_weight:
        reject_unused("--kl_weight is 0", training, "temperature")
    data = data_args.load()
    teacher, data, pretrained, known = pair.load_teacher(data, training)
    student = simkd_student(pair.student, teacher, data, args.projector_factor)  # raises UserError if they do not fit
    simkd(student, teacher, args, training.temperature).for_labels(data.splits["train"].labels)

    name = f"simkd_{args.projector}"
    run = ImageRun(name, training, data, pair, args, data_args, teacher=teacher if pretrained else None)
    if not pretrained:
        teacher = run.train_on_labels("teacher", teacher, pair.epochs_of_teacher(training))
    teacher_results = run.evaluate_teacher(pair.teacher, teacher, known)

    for seed_run in run.each_seed():
        control = None
        if not training.no_control:
            set_seed(seed_run.args.seed)
            control = simkd_student(pair.student, teacher, data, args.projector_factor, reuse_head=False)
            control = seed_run.train_on_labels("control", control)

        set_seed(seed_run.args.seed)
        student = simkd_student(pair.student, teacher, data, args.projector_factor)
        method = simkd(student, teacher, args, training.temperature)
        student = seed_run.distill("student", student, method, teacher)

        models = {
            "control": (f"{pair.student} + projector, labels only", control),
            "student": (f"{pair.student} + projector + teacher's head", student),
        }
        seed_run.report(name, models, teacher_results, method.auxiliary_parameters)
    run.summarize()


if __name__ == "__main__":
    run(main)
