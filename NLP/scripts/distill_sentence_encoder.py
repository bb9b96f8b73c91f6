"""Distills a sentence encoder into a smaller one on texts without labels, with a control.

    python NLP/scripts/distill_sentence_encoder.py
    python NLP/scripts/distill_sentence_encoder.py --student_width 192 --learning_rate 1e-3 --num_train_epochs 2
    python NLP/scripts/distill_sentence_encoder.py --texts questions.txt products.csv --dataset my_pairs.csv
    python NLP/scripts/distill_sentence_encoder.py --teacher tiny-bert --texts intents --dataset intent_pairs

The student has some layers of the teacher, and perhaps a smaller width. It learns the teacher's embedding of each text
(embedding) and the relations between the texts of a batch (similarity, rkd, sp, pkt). The control is the same network,
trained by unsupervised SimCSE (arXiv:2104.08821) on the same texts for as many updates. All models are evaluated by
the rank correlation of cosine similarities with the scores of --dataset, whose texts are left out of the training.
"""

from dataclasses import dataclass, field
from typing import Annotated

from kd.common.cli import parse, reject_unused, show_help
from kd.common.cli import run as run_main
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, ShareBelow1
from kd.nlp.student_model.arguments import MIN_LENGTH, SENTENCE_METHODS


@dataclass
class DataArguments:
    """Data."""

    texts: list[str] = field(
        default_factory=lambda: ["qqp", "sst2"],
        metadata={"help": "Texts to train on: embedded datasets, Hub names, folders or files, also of lines (.txt)."},
    )
    texts_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of --texts that hold texts (default: inferred)."}
    )
    dataset: str = field(
        default="stsb",
        metadata={"help": "Pairs of texts with scores, for evaluation: embedded, Hub name, folder or file."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The two columns of texts of --dataset (default: inferred)."}
    )
    label_column: list[str] | None = field(
        default=None, metadata={"help": "The column of scores of --dataset (default: inferred)."}
    )
    max_length: Annotated[int, Range(MIN_LENGTH, MOST)] = field(
        default=128, metadata={"help": "Maximum number of tokens of a text."}
    )
    max_train_samples: Count | None = field(
        default=20_000, metadata={"help": "Maximum number of training texts, a fixed sample."}
    )
    max_eval_samples: Count | None = field(default=None, metadata={"help": "Maximum number of pairs in each split."})


@dataclass
class StudentArguments:
    """Teacher and student."""

    teacher: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Hub name or folder of a sentence encoder, or tiny-bert for random weights."},
    )
    student_layers: Count = field(
        default=3, metadata={"help": "Number of layers: evenly spaced ones of the teacher, with the first and last."}
    )
    kept_layers: list[Annotated[int, Range(0, MOST)]] | None = field(
        default=None, metadata={"help": "Layers of the teacher, from 0, instead of --student_layers."}
    )
    student_width: Count | None = field(
        default=None, metadata={"help": "Width of the student and of its embeddings (default: the teacher's)."}
    )
    method: str = field(
        default="embedding+similarity",
        metadata={"help": f"NAME[:argument=value] joined with +; of {', '.join(SENTENCE_METHODS)}."},
    )
    control_learning_rate: Positive = field(default=3e-5, metadata={"help": "Learning rate of the control."})
    dropout: ShareBelow1 = field(
        default=0.1, metadata={"help": "Dropout of the control, which makes two views of a text."}
    )

    def check_unused_flags(self) -> None:
        if self.kept_layers:
            reject_unused("--kept_layers names the layers", self, "student_layers")


@dataclass
class SentenceTrainingArguments(KDTrainingArguments):
    """Training with the defaults of small sentence encoders."""

    output_dir: str | None = "runs/NLP/sentence_encoder"
    num_train_epochs: Positive = 1
    per_device_train_batch_size: Count = 64
    learning_rate: Positive = field(default=2e-4, metadata={"help": "Learning rate of the student."})
    weight_decay: NotNegative = 0.0
    temperature: Positive = field(default=0.05, metadata={"help": "Temperature of SimCSE, the control."})


ARGUMENTS = DataArguments, StudentArguments, SentenceTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.nlp.student_model.sentence_evaluation import Evaluation
from kd.nlp.student_model.sentence_training import SentenceTask

UNUSED = "alpha", "label_smoothing_factor", "value_learning_rate"


def main() -> None:
    data, student, training = parse(*ARGUMENTS)
    reject_unused("a sentence encoder trains on texts without labels", training, *UNUSED)
    if training.no_control:
        reject_unused("--no_control is set", student, "control_learning_rate", "dropout")
        reject_unused("--no_control is set", training, "temperature")
    task = SentenceTask.load(data, student)
    run = task.open_run(training)

    shared: dict[str, Evaluation] = {"teacher": task.evaluate(task.teacher, student.teacher)}
    shared["untrained"] = task.evaluate(task.untrained, f"{task.student_name}, untrained", shared["teacher"])
    for seed_run in run.each_seed():
        evaluations = dict(shared)
        if not training.no_control:
            control = task.train_control(seed_run)
            evaluations["control"] = task.evaluate(control, f"{task.student_name}, SimCSE", shared["teacher"])
        trained = task.train_student(seed_run)
        evaluations["student"] = task.evaluate(trained, f"{task.student_name}, {student.method}", shared["teacher"])
        task.report(seed_run, evaluations, trained)
    run.summarize()


if __name__ == "__main__":
    run_main(main)
