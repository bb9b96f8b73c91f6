"""Distills a classifier of signals into a smaller one by soft targets, with its teacher and a control.

    python example-domain/scripts/distill.py --dataset FOLDER --student_width 16
    python example-domain/scripts/distill.py example-domain/scripts/soft.yaml

The second takes its flags from a recipe; `distill_soft.sh` is short for it.
"""

from dataclasses import dataclass, field
from typing import Literal

from kd.common.cli import parse, reject_unused, run
from kd.common.objective import Objective, labels_and_soft_targets, task_loss
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import Count
from kd.example_domain.data.loading import load_data
from kd.example_domain.student_model.distillation import Distillation
from kd.example_domain.teacher_model.teacher import load_trained


@dataclass
class Arguments:
    """Which signals, and who teaches whom."""

    dataset: str = field(default="tones", metadata={"help": "tones, a folder of parquet or JSON files, or a Hub name"})
    teacher: str | None = field(default=None, metadata={"help": "folder of a trained classifier (default: train one)"})
    teacher_width: Count = field(default=64, metadata={"help": "channels of a teacher that is trained here"})
    student_width: Count = field(default=12, metadata={"help": "channels of the student and of its control"})


@dataclass
class TrainingArguments(KDTrainingArguments):
    """The same for teacher, control and student."""

    output_dir: str | None = field(default="runs/example-domain/distill", metadata={"help": "the run's folder"})
    num_train_epochs: float = 10
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 250
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "cosine"
    train_sampling_strategy: Literal["random", "sequential"] = "random"  # all signals are of one length


def main() -> None:
    args, training = parse(Arguments, TrainingArguments)
    if args.teacher:
        reject_unused("--teacher names a trained classifier", training, "teacher_width")
    reject_unused(
        "neither labels are smoothed nor values trained", training, "label_smoothing_factor", "value_learning_rate"
    )
    data = load_data(args.dataset)
    given = load_trained(args.teacher, data) if args.teacher else None
    labels_only = Objective(task=(1.0, task_loss()))
    distillation = Distillation(data, given, training, args)
    teacher = given or distillation.trained("teacher", args.teacher_width, labels_only)
    distillation.warn_of_guessing(teacher)
    control = None if training.no_control else distillation.trained("control", args.student_width, labels_only)
    objective = labels_and_soft_targets(training.alpha, training.temperature)
    said = distillation.listen(teacher)
    student = distillation.trained("student", args.student_width, objective, teacher_outputs=said)
    distillation.report("kd", teacher, control, student)


if __name__ == "__main__":
    run(main)
