"""Distills a BERT teacher into a smaller student with a discrete key-value bottleneck; the teacher may have one too.

    python NLP/scripts/distill_bottleneck.py NLP/scripts/keys_carried.yaml
    python NLP/scripts/distill_bottleneck.py NLP/scripts/new_keys.yaml --dataset clinc_oos --teacher bert-base-uncased

The recipes keys_carried, new_keys and student_only are three of the four systems; `distill_*.sh` name them. The other,
base, without any bottleneck, is distill_classifier.py.
"""

from pathlib import Path

from transformers import PreTrainedModel

from kd.common.cli import parse, reject_unused, run
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.nlp.student_model.arguments import BottleneckArguments, PairArguments, TextArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.fill import train_bottleneck
from kd.nlp.student_model.inputs import Inputs, inputs_of_seed, load_inputs, validate_arguments, validate_bottleneck
from kd.nlp.student_model.report import evaluate_teacher, report
from kd.nlp.student_model.training import (
    align,
    load_or_train_teacher,
    open_run,
    student_from,
    teacher_logits,
    train_control,
)
from kd.nlp.teacher_model.teacher import encoder_of


def main() -> None:
    text, pair, bottleneck, training = parse(TextArguments, PairArguments, BottleneckArguments, KDTrainingArguments)
    reject_unused("the stages have --teacher_epochs, --align_epochs and --value_epochs", training, "num_train_epochs")
    if bottleneck.keys == "reused":
        reject_unused("--keys reused trains no student's values", training, "alpha", "temperature")
    inputs = load_inputs(text, pair, training, text.load())
    validate_arguments(inputs, pair, training)
    validate_bottleneck(inputs, pair, bottleneck)
    whole = open_run(inputs, training, text, pair, bottleneck)

    teacher = train_teacher(whole, inputs, pair, bottleneck)
    measured_teacher = evaluate_teacher(whole, inputs, teacher, pair.teacher)
    for one in whole.each_seed():
        inputs = inputs_of_seed(inputs, text, pair, training, one.args.seed)
        control = None if training.no_control else train_bottleneck_control(one, inputs, pair, bottleneck)
        student = distill(one, inputs, pair, bottleneck, teacher)
        report(one, inputs, bottleneck.system, pair.student, teacher, measured_teacher, control, student)
    whole.summarize()


def train_teacher(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, bottleneck: BottleneckArguments, folder: Path | None = None
) -> PreTrainedModel:
    """A fine-tuned classifier, whose head a bottleneck replaces where the system has the teacher have one."""
    classifier = (
        inputs.teacher.model
        if bottleneck.freeze_teacher_encoder
        else load_or_train_teacher(run, inputs, pair, "teacher_encoder", folder)
    )
    if bottleneck.bottleneck == "student" or isinstance(classifier, BottleneckClassifier):
        return classifier
    return train_bottleneck(run, "teacher", encoder_of(classifier), inputs.texts, bottleneck, "new", folder=folder)


def train_bottleneck_control(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: BottleneckArguments,
    encoder_epochs: float | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """A bottleneck behind the student's encoder, both trained on labels alone; the encoder by default for as many
    epochs as the student's is aligned.
    """
    epochs = pair.align_epochs if encoder_epochs is None else encoder_epochs
    classifier = train_control(run, inputs, pair, epochs, "control_encoder", folder)
    encoder = encoder_of(classifier)
    return train_bottleneck(run, "control", encoder, inputs.student_texts, bottleneck, "new", folder=folder)


def distill(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: BottleneckArguments,
    teacher: PreTrainedModel,
    folder: Path | None = None,
) -> PreTrainedModel:
    """The student: its encoder aligned with the teacher's, then its values trained on labels and the teacher's logits.
    `folder`: where runs of other systems find the aligned encoder and the teacher's outputs.
    """
    keys = bottleneck.keys
    encoder = align(run, encoder_of(student_from(inputs, encoder_of(teacher))), teacher, inputs, pair,
                    bottleneck.pooling, folder)  # fmt: skip
    return train_bottleneck(
        run,
        "student",
        encoder,
        inputs.student_texts,
        bottleneck,
        keys,
        source=teacher if isinstance(teacher, BottleneckClassifier) else None,
        teacher_outputs=None if keys == "reused" else teacher_logits(run, teacher, inputs.texts, folder),
    )


if __name__ == "__main__":
    run(main)
