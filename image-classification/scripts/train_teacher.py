"""Trains a teacher: an image classifier, on labels alone.

    python image-classification/scripts/train_teacher.py
    python image-classification/scripts/train_teacher.py image-classification/scripts/paper.yaml \\
        --dataset cifar100 --architecture resnet32x4 --output_dir runs/image-classification/teacher_cifar100

Pass the run's folder as --teacher to the other scripts.
"""

from dataclasses import dataclass, field

from kd.common.cli import parse, reject_unused, run, show_help
from kd.common.utils.ranges import Positive
from kd.image_classification.student_model.arguments import (
    TEACHER_EPOCHS,
    ImageTrainingArguments,
)
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)


@dataclass
class Arguments:
    """Teacher."""

    architecture: str = field(
        default="resnet32x4", metadata={"help": "Architecture of the teacher: wrn_40_2, vgg13, timm:NAME, ..."}
    )


@dataclass
class TeacherTrainingArguments(ImageTrainingArguments):
    """Training."""

    num_train_epochs: Positive = field(
        default=TEACHER_EPOCHS * ImageTrainingArguments.num_train_epochs, metadata={"help": "Number of epochs."}
    )


ARGUMENTS = Arguments, DataArguments, TeacherTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from transformers import set_seed

from kd.image_classification.student_model.distillation import ImageRun
from kd.image_classification.teacher_model.classifier import new_classifier


def main() -> None:
    args, data_args, training = parse(*ARGUMENTS)
    reject_unused(
        "a teacher is trained on labels alone",
        training,
        "alpha",
        "temperature",
        "no_control",
        "value_learning_rate",
        "margin",
    )
    data = data_args.load()
    new_classifier(args.architecture, data.config)  # raises UserError before anything is written

    run = ImageRun("teacher", training, data, args, data_args)
    for seed_run in run.each_seed():
        set_seed(seed_run.args.seed)
        teacher = new_classifier(args.architecture, data.config)
        teacher = seed_run.train_on_labels("teacher", teacher)
        seed_run.report("teacher", {"teacher": (args.architecture, teacher)})
    run.summarize()


if __name__ == "__main__":
    run(main)
