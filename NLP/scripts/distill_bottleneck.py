"""Distills a text classifier into a smaller one with a discrete key-value bottleneck; the teacher may have one too.

    python NLP/scripts/distill_bottleneck.py
    python NLP/scripts/distill_bottleneck.py NLP/scripts/new_keys.yaml --dataset clinc_oos

`distill_keys_carried.sh` runs it with default arguments; `distill_new_keys.sh` and `distill_student_only.sh` run it
with the recipes of these names. distill_classifier.py distills a student without a bottleneck.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.nlp.student_model.arguments import (
    BottleneckTrainingArguments,
    LabelledTextArguments,
    PairArguments,
    TextBottleneckArguments,
)

ARGUMENTS = LabelledTextArguments, PairArguments, TextBottleneckArguments, BottleneckTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.nlp.student_model.bottleneck_training import (
    train_bottleneck_control,
    train_bottleneck_student,
    train_bottleneck_teacher,
)
from kd.nlp.student_model.evaluation import evaluate_teacher, report
from kd.nlp.student_model.inputs import inputs_of_seed, load_inputs, validate_arguments, validate_bottleneck
from kd.nlp.student_model.training import open_run


def main() -> None:
    text, pair, bottleneck, training = parse(*ARGUMENTS)
    reject_unused("stages train for --teacher_epochs, --align_epochs and --value_epochs", training, "num_train_epochs")
    bottleneck.check_training(training)
    inputs = load_inputs(text, pair, training, text.load())
    validate_arguments(inputs, pair, training)
    validate_bottleneck(inputs, pair, bottleneck)
    parent_run = open_run(inputs, training, text, pair, bottleneck)

    teacher = train_bottleneck_teacher(parent_run, inputs, pair, bottleneck)
    measured_teacher = evaluate_teacher(parent_run, inputs, teacher, pair.teacher)
    for seed_run in parent_run.each_seed():
        inputs = inputs_of_seed(inputs, text, pair, training, seed_run.args.seed)
        control = None
        if not training.no_control:
            control = train_bottleneck_control(seed_run, inputs, pair, bottleneck, pair.align_epochs or 0)
        student = train_bottleneck_student(seed_run, inputs, pair, bottleneck, teacher)
        report(seed_run, inputs, bottleneck.system, pair.student, teacher, measured_teacher, control, student)
    parent_run.summarize()


if __name__ == "__main__":
    run(main)
