"""Distills a text classifier into a smaller one: soft targets, and whatever inside is to be matched.

    python NLP/scripts/distill_classifier.py NLP/scripts/base.yaml
    python NLP/scripts/distill_classifier.py NLP/scripts/base.yaml --dataset sst2 --teacher bert-base-uncased \\
        --student distilbert-base-uncased --align_epochs 0 --hidden_weight 1 --alpha 0.1 --temperature 4

The recipes base, clinc and sentiment have `distill_*.sh` of their names.
"""

from kd.common.cli import parse, reject_unused, run
from kd.common.methods import flags_of
from kd.common.training.arguments import KDTrainingArguments
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments
from kd.nlp.student_model.classifier_distillation import ClassifierDistillation


def main() -> None:
    text, pair, matching, training = parse(TextArguments, PairArguments, MatchingArguments, KDTrainingArguments)
    reject_unused("a plain student has no bottleneck", training, "value_learning_rate")
    own = {"alpha", "temperature"} - flags_of(matching.method, training).keys()
    reject_unused(f"--method {matching.method} has settings of its own", training, *sorted(own))
    data = text.load()
    distillation = ClassifierDistillation(text, pair, matching, training, data)
    teacher = distillation.teacher()
    control = None if training.no_control else distillation.control()
    student = distillation.student(teacher)
    distillation.report(teacher, control, student)


if __name__ == "__main__":
    run(main)
