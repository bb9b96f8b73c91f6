"""Distills a text classifier into a smaller one, with soft targets or another method, and optionally with features.

    python NLP/scripts/distill_classifier.py
    python NLP/scripts/distill_classifier.py --seeds 0 1 2
    python NLP/scripts/distill_classifier.py --dataset sst2 --teacher bert-base-uncased \\
        --student distilbert-base-uncased --align_epochs 0 --hidden_weight 1 --temperature 4
    python NLP/scripts/distill_classifier.py NLP/scripts/multilabel.yaml
    python NLP/scripts/distill_classifier.py --dataset synthetic_entities --from_scratch_epochs 6
    python NLP/scripts/distill_classifier.py --teacher gpt2 --student distilbert-base-uncased
    python NLP/scripts/distill_classifier.py --dataset answers.csv --teacher_columns "p_*"

The label column determines the task: one class or score per text, any number of labels per text (multi-label), or a
tag for each word (token classification). Teacher and student may have different tokenizers.

`distill_base.sh`, `distill_clinc.sh` and `distill_sentiment.sh` run it with the recipes of these names.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.nlp.student_model.arguments import (
    ClassifierTrainingArguments,
    MatchingArguments,
    PairArguments,
    TeacherColumnArguments,
)

ARGUMENTS = TeacherColumnArguments, PairArguments, MatchingArguments, ClassifierTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.methods import kd_flags
from kd.nlp.student_model.evaluation import evaluate_teacher, report
from kd.nlp.student_model.inputs import inputs_of_seed, load_inputs, validate_arguments, validate_matching
from kd.nlp.student_model.teacher_columns import distill_from_columns
from kd.nlp.student_model.training import (
    load_or_train_teacher,
    open_run,
    train_control,
    train_student,
)


def main() -> None:
    text, pair, matching, training = parse(*ARGUMENTS)
    reject_unused("a plain student has no bottleneck", training, "value_learning_rate")
    unused = {"alpha", "temperature"} - kd_flags(matching.method, training).keys()
    reject_unused(f"--method {matching.method} does not use it", training, *sorted(unused))
    if text.teacher_columns:
        return distill_from_columns(text, pair, matching, training)
    inputs = load_inputs(text, pair, training, text.load(), matching.ensemble_teachers)
    validate_arguments(inputs, pair, training)
    validate_matching(inputs, pair, matching, training)
    parent_run = open_run(inputs, training, text, pair, matching)

    teacher = load_or_train_teacher(parent_run, inputs, pair)
    measured_teacher = evaluate_teacher(parent_run, inputs, teacher, pair.teacher, matching)
    for seed_run in parent_run.each_seed():
        inputs = inputs_of_seed(inputs, text, pair, training, seed_run.args.seed)
        control = None
        if not training.no_control:
            epochs = (pair.align_epochs or 0) + training.num_train_epochs
            control = train_control(seed_run, inputs, pair, epochs)
        student = train_student(seed_run, inputs, pair, matching, teacher)
        report(seed_run, inputs, matching.method, pair.student, teacher, measured_teacher, control, student)
    parent_run.summarize()


if __name__ == "__main__":
    run(main)
