"""SimKD: distills a teacher into a student that reuses the teacher's classifier, with a control.

    python image-classification/scripts/train_simkd.py
    python image-classification/scripts/train_simkd.py --projector all-layer
    python image-classification/scripts/train_simkd.py image-classification/scripts/paper.yaml --dataset cifar100 \\
        --teacher runs/image-classification/teacher_cifar100 --student resnet8x4

The control is the same network, projector included, trained on the labels alone.
"""

from kd.common.cli import parse, reject_unused, run
from kd.image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.experiment import Experiment
from kd.image_classification.student_model.simkd import SimKDArguments, simkd, simkd_student
from kd.image_classification.teacher_model.teacher import teacher_sketch


def main() -> None:
    pair, args, data_args, training = parse(PairArguments, SimKDArguments, DataArguments, ImageTrainingArguments)
    reject_unused("SimKD has --feature_weight, --cls_weight and --kl_weight", training, "alpha", "value_learning_rate")
    if not args.kl_weight:
        reject_unused("--kl_weight is 0", training, "temperature")
    data = data_args.load()
    sketch, seen = teacher_sketch(pair.teacher, data)  # refuses now what would fail after hours of training
    student = simkd_student(pair.student, sketch, seen, args.projector_factor)
    how = simkd(student, sketch, seen, args, training.temperature)
    experiment = Experiment(f"simkd_{args.projector}", training, data, pair, args, data_args)
    teacher = experiment.teacher(pair.teacher, pair.teacher_epochs)
    experiment.measure(pair.teacher, teacher)
    data, factor = experiment.data, args.projector_factor

    control = None
    if not training.no_control:
        control = experiment.labels_only("control", lambda: simkd_student(pair.student, teacher, data, factor, False))
    student = experiment.distill(
        teacher,
        lambda: simkd_student(pair.student, teacher, data, factor),
        lambda student: simkd(student, teacher, data, args, training.temperature),
    )
    experiment.report(
        parameters_beside=how.auxiliary_parameters,
        teacher=(pair.teacher, teacher),
        control=None if control is None else (f"{pair.student} + projector, labels only", control),
        student=(f"{pair.student} + projector + teacher's head", student),
    )


if __name__ == "__main__":
    run(main)
