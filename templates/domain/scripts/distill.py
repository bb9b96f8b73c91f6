"""Distills a classifier of signals into a smaller one by soft targets. Also trains the teacher and a control.

    python example-domain/scripts/distill.py --dataset FOLDER --student_width 16
    python example-domain/scripts/distill.py example-domain/scripts/soft.yaml

The second command reads its flags from a recipe; `distill_soft.sh` runs it.
"""

from dataclasses import dataclass, field
from typing import Literal

from kd.common.cli import parse, reject_unused, run, show_help
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import Count


@dataclass
class Arguments:
    """Data, teacher and student."""

    dataset: str = field(default="tones", metadata={"help": "Embedded dataset (tones), folder of files, or Hub name."})
    teacher: str | None = field(
        default=None, metadata={"help": "Folder of a trained classifier (default: train one)."}
    )
    teacher_width: Count = field(default=64, metadata={"help": "Channels of a teacher that this run trains."})
    student_width: Count = field(default=12, metadata={"help": "Channels of the student and of the control."})
    max_train_samples: Count | None = field(default=None, metadata={"help": "Maximum number of training signals."})
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of signals in each of the other splits."}
    )


@dataclass
class TrainingArguments(KDTrainingArguments):
    """Training arguments of teacher, control and student."""

    output_dir: str | None = field(default="runs/example-domain/distill", metadata={"help": "Folder of the run."})
    num_train_epochs: float = 10
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 250
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "cosine"
    train_sampling_strategy: Literal["random", "sequential"] = "random"  # all signals are of one length


ARGUMENTS = Arguments, TrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from transformers import default_data_collator

from kd.common.methods import labels, labels_and_soft_targets
from kd.common.training.teacher_outputs import cache_teacher_outputs
from kd.common.training.trainer_run import TrainerRun
from kd.example_domain.data.loading import load_data
from kd.example_domain.student_model.distillation import chance_warning, evaluate, report, train
from kd.example_domain.teacher_model.classifier import load_trained


def main() -> None:
    args, training = parse(*ARGUMENTS)
    if args.teacher:
        reject_unused("--teacher is already trained", training, "teacher_width")
    reject_unused(
        "this domain has no label smoothing and no bottleneck",
        training,
        "label_smoothing_factor",
        "value_learning_rate",
    )
    data = load_data(args.dataset, args.max_train_samples, args.max_eval_samples)
    pretrained = load_trained(args.teacher, data) if args.teacher else None
    whole = TrainerRun(training, args)
    whole.check_inputs(data.fingerprint, teacher=pretrained)

    teacher = pretrained or train(whole, "teacher", args.teacher_width, data, labels())
    evaluations = {"teacher": evaluate(f"width {teacher.config.width}", teacher, data)}
    whole.warn(chance_warning(evaluations["teacher"].entry, data))
    with whole.timed("teacher_outputs"):
        folder = whole.folder / "teacher_outputs"
        outputs = cache_teacher_outputs(teacher, data.splits["train"], default_data_collator, folder, batch_size=256)

    method = labels_and_soft_targets(training.alpha, training.temperature)
    for seed_run in whole.each_seed():
        if not training.no_control:
            control = train(seed_run, "control", args.student_width, data, labels())
            evaluations["control"] = evaluate(f"width {args.student_width}, labels only", control, data, teacher)
        student = train(seed_run, "student", args.student_width, data, method, teacher_outputs=outputs)
        evaluations["student"] = evaluate(f"width {args.student_width}, kd", student, data, teacher)
        report(seed_run, data, student, evaluations)
    whole.summarize()


if __name__ == "__main__":
    run(main)
