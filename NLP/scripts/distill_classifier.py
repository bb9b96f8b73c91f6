"""Distills a text classifier into a smaller one: soft targets, or another method, and the features to be matched.

    python NLP/scripts/distill_classifier.py NLP/scripts/base.yaml
    python NLP/scripts/distill_classifier.py NLP/scripts/base.yaml --seeds 0 1 2
    python NLP/scripts/distill_classifier.py NLP/scripts/base.yaml --dataset sst2 --teacher bert-base-uncased \\
        --student distilbert-base-uncased --align_epochs 0 --hidden_weight 1 --alpha 0.1 --temperature 4

The recipes base, clinc and sentiment have `distill_*.sh` of their names.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kd.common.cli import parse, reject_unused, run
from kd.common.methods import flags_of
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments
from kd.nlp.student_model.inputs import Inputs, inputs_of_seed, load_inputs, validate_arguments, validate_matching
from kd.nlp.student_model.report import evaluate_teacher, report
from kd.nlp.student_model.training import (
    align,
    classifier_method,
    fine_tune,
    initial_rate,
    load_or_train_teacher,
    open_run,
    student_from,
    teacher_kwargs,
    train_control,
)
from kd.nlp.teacher_model.teacher import encoder_of


def main() -> None:
    text, pair, matching, training = parse(TextArguments, PairArguments, MatchingArguments, KDTrainingArguments)
    reject_unused("a plain student has no bottleneck", training, "value_learning_rate")
    foreign = {"alpha", "temperature"} - flags_of(matching.method, training).keys()
    reject_unused(f"--method {matching.method} has settings of its own", training, *sorted(foreign))
    inputs = load_inputs(text, pair, training, text.load(), matching.more_teachers)
    validate_arguments(inputs, pair, training)
    validate_matching(inputs, pair, matching, training)
    whole = open_run(inputs, training, text, pair, matching)

    teacher = load_or_train_teacher(whole, inputs, pair)
    measured_teacher = evaluate_teacher(whole, inputs, teacher, pair.teacher, matching.more_teachers)
    for one in whole.each_seed():
        inputs = inputs_of_seed(inputs, text, pair, training, one.args.seed)
        control = None if training.no_control else train_control(one, inputs, pair, control_epochs(one, pair))
        student = distill(one, inputs, pair, matching, teacher)
        report(one, inputs, matching.method, pair.student, teacher, measured_teacher, control, student)
    whole.summarize()


def control_epochs(run: TrainerRun, pair: PairArguments) -> float:
    """As many as the student has, of alignment and of fine-tuning."""
    return pair.align_epochs + run.args.num_train_epochs


def distill(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    matching: MatchingArguments,
    teacher: PreTrainedModel,
    folder: Path | None = None,
) -> PreTrainedModel:
    """The student: its encoder aligned with the teacher's, then all of it trained on labels and the teacher's outputs.
    `folder`: where runs of other systems find the aligned encoder and the teacher's outputs.
    """
    texts = inputs.texts if inputs.same_tokens else inputs.student_texts
    student = student_from(inputs, teacher, matching.student_from)
    align(run, encoder_of(student), teacher, inputs, pair, "cls", folder)
    method = classifier_method(matching, run.args, student, teacher, inputs.texts)
    ensemble = [(other.model, Texts.of(inputs.data, other.tokenizer)) for other in inputs.ensemble]
    outputs: dict[str, Any] = teacher_kwargs(run, teacher, inputs.texts, method, ensemble=ensemble, folder=folder)
    rate = matching.student_learning_rate
    return fine_tune(
        run,
        "student",
        student,
        texts,
        method,
        epochs=run.args.num_train_epochs,
        learning_rate=initial_rate(inputs.student or inputs.teacher, pair, run.args) if rate is None else rate,
        teacher=outputs,
        tokenizer=inputs.student_texts.collate.tokenizer,
    )


if __name__ == "__main__":
    run(main)
