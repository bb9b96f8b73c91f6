"""Distills a causal language model into a smaller one, with a control.

    python NLP/scripts/distill_gpt.py
    python NLP/scripts/distill_gpt.py --divergence reverse --student scratch --student_layers 2
    python NLP/scripts/distill_gpt.py NLP/scripts/gpt.yaml   # GPT-2 on WikiText, from the Hub

The student learns the teacher's distribution over each next token of the corpus, with the forward KL divergence
(arXiv:1503.02531), the reverse KL divergence (arXiv:2306.08543) or the generalized Jensen-Shannon divergence
(arXiv:2306.13649).
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd.common.cli import parse, reject_unused
from kd.common.cli import run as run_main
from kd.common.data.sources import print_notes
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, ProperShare, Range, ShareBelow1
from kd.nlp.data.corpora import EMBEDDED, load_corpus
from kd.nlp.student_model.generation import CUT, open_run
from kd.nlp.student_model.language_model import LanguageTask, load_named_models
from kd.nlp.teacher_model.generative import HEAD_WIDTH, MIN_VOCABULARY_SIZE, SCRATCH


@dataclass
class Arguments:
    """What is distilled from what, and by which divergence."""

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "python (embedded), Hub name[:config], or folder with .txt, parquet, ..."}
    )
    text_column: str | None = None
    block_size: Annotated[int, Range(2, MOST)] = field(default=128, metadata={"help": "tokens of a training sequence"})

    teacher: str = field(default="scratch", metadata={"help": "Hub name or folder; scratch: GPT-2, random weights"})
    teacher_epochs: NotNegative = field(
        default=6, metadata={"help": "0: a teacher that was named is taken as it comes"}
    )
    teacher_layers: Count = field(default=4, metadata={"help": "of a teacher from scratch"})
    teacher_width: Count = field(default=128, metadata={"help": "of a teacher from scratch"})
    vocabulary_size: Annotated[int, Range(MIN_VOCABULARY_SIZE, MOST)] = field(
        default=2048,
        metadata={"help": "byte-level BPE of a teacher from scratch: the bytes, the end of text, and more"},
    )

    student: str = field(
        default="cut", metadata={"help": "cut: evenly spaced layers of the teacher; scratch; Hub name or folder"}
    )
    student_layers: Count = field(default=1, metadata={"help": "of a student that is cut or from scratch"})
    student_width: Count = field(default=64, metadata={"help": "of a student from scratch"})
    dropout: ShareBelow1 = field(default=0.1, metadata={"help": "of models from scratch, while they have no teacher"})
    from_scratch_learning_rate: Positive = field(default=2e-3, metadata={"help": "--learning_rate for random weights"})

    divergence: Literal["forward", "reverse", "js"] = field(
        default="forward", metadata={"help": "KL(teacher || student), KL(student || teacher), or Jensen-Shannon"}
    )
    js_beta: ProperShare = field(default=0.5, metadata={"help": "weight of the teacher's side of --divergence js"})
    hidden_weight: NotNegative = field(
        default=0.0, metadata={"help": "weight of matching hidden states, L2 and cosine"}
    )

    def __post_init__(self) -> None:
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(f"--{name} must be a multiple of {HEAD_WIDTH}, got {getattr(self, name)}")
        if self.teacher == "scratch" and self.teacher_epochs == 0:
            raise ValueError("--teacher_epochs 0 leaves a teacher from scratch untrained: name one, or train it")

    def check_unused_flags(self) -> None:
        if self.teacher != SCRATCH:
            reject_unused("--teacher names a model", self, "teacher_layers", "teacher_width", "vocabulary_size")
        if self.student != SCRATCH:
            reject_unused("--student is not scratch", self, "student_width")
        if self.student not in (CUT, SCRATCH):
            reject_unused("--student names a model", self, "student_layers")
        if SCRATCH not in (self.teacher, self.student):
            reject_unused("no model has random weights", self, "dropout", "from_scratch_learning_rate")
        if self.divergence != "js":
            reject_unused("--divergence is not js", self, "js_beta")


@dataclass
class LanguageTrainingArguments(KDTrainingArguments):
    """Training as small GPTs are used to it."""

    output_dir: str | None = "runs/NLP/gpt"
    num_train_epochs: float = field(default=2, metadata={"help": "of the student, and of its control"})
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    learning_rate: float = field(default=1e-4, metadata={"help": "of models that were pretrained"})
    weight_decay: float = 0.1


def main() -> None:
    args, training = parse(Arguments, LanguageTrainingArguments)
    reject_unused("a language model has no bottleneck", training, "value_learning_rate")
    if args.teacher == SCRATCH and args.student in (CUT, SCRATCH):
        reject_unused(
            "models of random weights are trained at --from_scratch_learning_rate", training, "learning_rate"
        )
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
