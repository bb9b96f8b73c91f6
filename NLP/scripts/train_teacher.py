"""Fine-tunes a text classifier on labels alone: a teacher, or a student of distill_mlm.py.

    python NLP/scripts/train_teacher.py
    python NLP/scripts/train_teacher.py --teacher runs/NLP/mlm/student --learning_rate 1e-3

The model is in RUN/stages/teacher. Pass it as --teacher to the other scripts.
"""

from dataclasses import dataclass, field

from kd.common.cli import parse, reject_unused, run, show_help
from kd.common.utils.ranges import Positive
from kd.nlp.student_model.arguments import ClassifierTrainingArguments, LabelledTextArguments
from kd.nlp.teacher_model import TINY_BERT


@dataclass
class Arguments:
    """Teacher."""

    teacher: str = field(
        default=TINY_BERT, metadata={"help": f"Encoder: Hub name, folder, or the embedded {TINY_BERT}."}
    )
    from_scratch_learning_rate: Positive = field(
        default=2e-3, metadata={"help": f"Learning rate of {TINY_BERT}, which has random weights."}
    )


@dataclass
class TeacherTrainingArguments(ClassifierTrainingArguments):
    """Training."""

    output_dir: str | None = "runs/NLP/teacher"
    num_train_epochs: Positive = field(default=6, metadata={"help": "Number of epochs."})


ARGUMENTS = LabelledTextArguments, Arguments, TeacherTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.nlp.student_model.evaluation import evaluate_teacher, report
from kd.nlp.student_model.inputs import load_encoder_inputs
from kd.nlp.student_model.training import open_run, train_teacher

ONLY_LABELS = "alpha", "temperature", "no_control", "value_learning_rate", "margin"


def main() -> None:
    text, args, training = parse(*ARGUMENTS)
    reject_unused("a teacher is trained on labels alone", training, *ONLY_LABELS)
    unused = (training, "learning_rate") if args.teacher == TINY_BERT else (args, "from_scratch_learning_rate")
    reject_unused(f"--teacher is {args.teacher}", *unused)
    data = text.load()
    inputs = load_encoder_inputs(args.teacher, text, training, data)
    parent_run = open_run(inputs, training, text, args)
    for seed_run in parent_run.each_seed():
        inputs = load_encoder_inputs(args.teacher, text, seed_run.args, data)  # the weights of the head differ
        from_scratch = inputs.teacher.from_scratch
        rate = args.from_scratch_learning_rate if from_scratch else training.learning_rate
        teacher = train_teacher(seed_run, inputs, epochs=training.num_train_epochs, learning_rate=rate)
        report(seed_run, inputs, "teacher", None, teacher, evaluate_teacher(seed_run, inputs, teacher, args.teacher))
    parent_run.summarize()


if __name__ == "__main__":
    run(main)
