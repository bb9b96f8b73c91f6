"""Distills a BERT teacher into a smaller student with a discrete key-value bottleneck; the teacher may have one too.

    python NLP/scripts/distill_bottleneck.py NLP/scripts/keys_carried.yaml
    python NLP/scripts/distill_bottleneck.py NLP/scripts/new_keys.yaml --dataset clinc_oos --teacher bert-base-uncased

The recipes keys_carried, new_keys and student_only are three of the four systems; `distill_*.sh` name them. The other,
base, without any bottleneck, is distill_classifier.py.
"""

from kd.common.cli import parse, reject_unused, run
from kd.common.training.arguments import KDTrainingArguments
from kd.nlp.student_model.arguments import PairArguments, TextArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_distillation import BottleneckDistillation


def main() -> None:
    text, pair, bottleneck, training = parse(
        TextArguments, PairArguments, TextBottleneckArguments, KDTrainingArguments
    )
    reject_unused("the stages have --teacher_epochs, --align_epochs and --value_epochs", training, "num_train_epochs")
    if bottleneck.keys == "reused":
        reject_unused("--keys reused trains no student's values", training, "alpha", "temperature")
    data = text.load()
    distillation = BottleneckDistillation(text, pair, bottleneck, training, data)
    teacher = distillation.teacher()
    control = None if training.no_control else distillation.control()
    student = distillation.student(teacher)
    distillation.report(teacher, control, student)


if __name__ == "__main__":
    run(main)
