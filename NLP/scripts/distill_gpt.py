"""Distills a causal language model into a smaller one, with a control.

    python NLP/scripts/distill_gpt.py
    python NLP/scripts/distill_gpt.py --method reverse_kl --student scratch --student_layers 2
    python NLP/scripts/distill_gpt.py NLP/scripts/gpt.yaml   # GPT-2 on WikiText, from the Hub

The student learns the teacher's distribution over each next token of the corpus, with the forward KL divergence (kd,
arXiv:1503.02531), the reverse KL divergence (reverse_kl, arXiv:2306.08543) or the generalized Jensen-Shannon
divergence (js, arXiv:2306.13649).
"""

from dataclasses import dataclass, field
from typing import Annotated

from kd.common.cli import parse, reject_unused, show_help
from kd.common.cli import run as run_main
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, ShareBelow1
from kd.nlp.student_model.arguments import CUT
from kd.nlp.teacher_model import HEAD_WIDTH, MIN_VOCABULARY_SIZE, SCRATCH


@dataclass
class Arguments:
    """Data, teacher, student and method."""

    dataset: str = field(
        default="python",
        metadata={"help": "Embedded corpus python, Hub name[:config], or folder of .txt, parquet, CSV or JSON files."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts (default: inferred)."})
    block_size: Annotated[int, Range(2, MOST)] = field(
        default=128, metadata={"help": "Number of tokens in a training block."}
    )

    teacher: str = field(
        default=SCRATCH,
        metadata={"help": "Hub name or folder of the teacher, or scratch for a GPT-2 with random weights."},
    )
    teacher_epochs: NotNegative = field(
        default=6, metadata={"help": "Epochs of training the teacher; 0 to leave a pretrained teacher unchanged."}
    )
    teacher_layers: Count = field(default=4, metadata={"help": "Number of layers of a teacher with random weights."})
    teacher_width: Count = field(default=128, metadata={"help": "Hidden size of a teacher with random weights."})
    vocabulary_size: Annotated[int, Range(MIN_VOCABULARY_SIZE, MOST)] = field(
        default=2048, metadata={"help": "Vocabulary size of the BPE tokenizer of a teacher with random weights."}
    )

    student: str = field(
        default=CUT,
        metadata={
            "help": "Hub name or folder of the student, scratch for random weights, or cut for layers of the teacher."
        },
    )
    student_layers: Count = field(
        default=1, metadata={"help": "Number of layers of a student that is cut or has random weights."}
    )
    student_width: Count = field(default=64, metadata={"help": "Hidden size of a student with random weights."})
    dropout: ShareBelow1 = field(
        default=0.1, metadata={"help": "Dropout of models with random weights while they train on labels alone."}
    )
    from_scratch_learning_rate: Positive = field(
        default=2e-3, metadata={"help": "Learning rate of models with random weights."}
    )

    method: str = field(
        default="kd", metadata={"help": "Divergence from the teacher: kd, reverse_kl, or js:beta=0.5."}
    )
    hidden_weight: NotNegative = field(
        default=0.0, metadata={"help": "Weight of matching hidden states by L2 and cosine."}
    )

    def __post_init__(self) -> None:
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(f"--{name} must be a multiple of {HEAD_WIDTH}, got {getattr(self, name)}")
        if self.teacher == SCRATCH and self.teacher_epochs == 0:
            raise ValueError(
                "--teacher_epochs 0 leaves a teacher with random weights untrained: pass --teacher NAME, or train it"
            )

    def check_unused_flags(self) -> None:
        if self.teacher != SCRATCH:
            reject_unused("--teacher names a model", self, "teacher_layers", "teacher_width", "vocabulary_size")
        if self.student != SCRATCH:
            reject_unused("--student is not scratch", self, "student_width")
        if self.student not in (CUT, SCRATCH):
            reject_unused("--student names a model", self, "student_layers")
        if SCRATCH not in (self.teacher, self.student):
            reject_unused("no model has random weights", self, "dropout", "from_scratch_learning_rate")


@dataclass
class LanguageTrainingArguments(KDTrainingArguments):
    """Training with the defaults of small GPTs."""

    output_dir: str | None = "runs/NLP/gpt"
    num_train_epochs: Positive = 2
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 16
    learning_rate: Positive = field(default=1e-4, metadata={"help": "Learning rate of pretrained models."})
    weight_decay: NotNegative = 0.1


ARGUMENTS = Arguments, LanguageTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.data.sources import print_notes
from kd.nlp.data.corpora import load_corpus
from kd.nlp.student_model.generation import divergence_of, open_run
from kd.nlp.student_model.language_model import LanguageTask, load_named_models


def main() -> None:
    args, training = parse(*ARGUMENTS)
    reject_unused("a language model has no bottleneck", training, "value_learning_rate")
    if args.teacher == SCRATCH and args.student in (CUT, SCRATCH):
        reject_unused("models with random weights train at --from_scratch_learning_rate", training, "learning_rate")
    divergence_of(args.method, training.temperature)  # raises UserError for an unknown method
    corpus = load_corpus(args.dataset, args.text_column)
    print_notes(corpus.name, corpus.notes)
    named_models = load_named_models(args)
    run = open_run(training, args, corpus, *named_models)
    task = LanguageTask.of(run, args, corpus, *named_models)

    teacher = task.train_teacher(run)
    measured_teacher = task.evaluate(run, "teacher", teacher)
    for seed_run in run.each_seed():
        models, evaluations = {"teacher": teacher}, {"teacher": measured_teacher}
        if not training.no_control:
            models["control"] = task.train_control(seed_run, teacher)
            evaluations["control"] = task.evaluate(seed_run, "control", models["control"], measured_teacher)
        models["student"] = task.train_student(seed_run, teacher)
        evaluations["student"] = task.evaluate(seed_run, "student", models["student"], measured_teacher)
        task.report(seed_run, evaluations, models)
    run.summarize()


if __name__ == "__main__":
    run_main(main)
