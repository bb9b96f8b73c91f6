"""Distills an encoder-decoder translator into a smaller one, with a control (Kim and Rush 2016, arXiv:1606.07947).

    python NLP/scripts/distill_translation.py
    python NLP/scripts/distill_translation.py --method word
    python NLP/scripts/distill_translation.py NLP/scripts/multi30k.yaml --dataset bentrevett/multi30k
    python NLP/scripts/distill_translation.py --dataset FOLDER --teacher Helsinki-NLP/opus-mt-en-de \\
        --student cut --student_encoder_layers 3 --student_decoder_layers 1 --learning_rate 3e-4

`word`: the teacher's distribution over each next token of the references; `sequence`: the teacher's beam-search
translations instead of the references; `both`: its distributions over its translations.
"""

from dataclasses import dataclass, field
from typing import Literal

from kd.common.cli import parse, reject_unused
from kd.common.cli import run as run_main
from kd.common.data.sources import print_notes
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import Count, NotNegative, Positive, ShareBelow1
from kd.nlp.data.translation import NUMBER_WORDS, load_translation_data
from kd.nlp.student_model.generation import CUT, open_run
from kd.nlp.student_model.translation import TranslationTask, load_named_models
from kd.nlp.teacher_model.generative import HEAD_WIDTH, SCRATCH

SCRATCH_EPOCHS = 5


@dataclass
class Arguments:
    """What is distilled from what, and how."""

    method: Literal["word", "sequence", "both"] = field(
        default="both", metadata={"help": "the teacher's next-token distributions, its translations, or both"}
    )
    dataset: str = field(default=NUMBER_WORDS, metadata={"help": "number_words, Hub name[:config] or local folder"})
    source: str = field(default="en", metadata={"help": "column of the source, or its key in a column `translation`"})
    target: str = field(default="de", metadata={"help": "column of the target, likewise"})
    source_prefix: str = field(default="", metadata={"help": "put before every source, where a T5 wants to be asked"})
    max_length: Count = field(default=128, metadata={"help": "longer sentences are cut, in tokens"})
    beams: Count = field(default=5, metadata={"help": "of beam search, for the teacher's translations and *_beam"})

    teacher: str = field(default=SCRATCH, metadata={"help": "Hub name or folder; scratch: Marian, random weights"})
    teacher_epochs: NotNegative | None = field(
        default=None,
        metadata={"help": f"default: {SCRATCH_EPOCHS} from scratch; 0, as it comes, for one that is named"},
    )
    teacher_learning_rate: Positive | None = field(default=None, metadata={"help": "default: --learning_rate"})
    teacher_layers: Count = field(default=2, metadata={"help": "of encoder and of decoder each, if from scratch"})
    teacher_width: Count = 128
    vocabulary_size: Count = field(default=600, metadata={"help": "joint byte-pair encoding of a scratch teacher"})

    student: str = field(default=SCRATCH, metadata={"help": "scratch; cut: layers of the teacher; Hub name or folder"})
    student_encoder_layers: Count = field(default=1, metadata={"help": "of a student from scratch, or of a cut"})
    student_decoder_layers: Count = 1
    student_width: Count = field(default=64, metadata={"help": "of a student from scratch"})
    dropout: ShareBelow1 = field(default=0.1, metadata={"help": "of models from scratch"})

    def __post_init__(self) -> None:
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(f"--{name} must be a multiple of {HEAD_WIDTH}, got {getattr(self, name)}")
        if self.teacher_epochs is None:
            self.teacher_epochs = SCRATCH_EPOCHS if self.teacher == SCRATCH else 0
        if self.teacher == SCRATCH and self.teacher_epochs == 0:
            raise ValueError("--teacher_epochs 0 leaves a teacher from scratch untrained: name one, or train it")

    def check_unused_flags(self) -> None:
        if self.teacher != SCRATCH:
            reject_unused("--teacher names a model", self, "teacher_layers", "teacher_width", "vocabulary_size")
        if not self.teacher_epochs:
            reject_unused("--teacher_epochs is 0", self, "teacher_learning_rate")
        if self.student != SCRATCH:
            reject_unused("--student is not scratch", self, "student_width")
        if self.student not in (CUT, SCRATCH):
            reject_unused("--student names a model", self, "student_encoder_layers", "student_decoder_layers")
        if SCRATCH not in (self.teacher, self.student):
            reject_unused("no model is from scratch", self, "dropout")
        if self.method == "sequence":
            reject_unused("--method sequence learns from translations alone", self, "alpha", "temperature")


@dataclass
class TranslationTrainingArguments(KDTrainingArguments):
    """Training as small transformers are used to it. Defaults are for models from random weights."""

    output_dir: str | None = "runs/NLP/translation"
    num_train_epochs: float = field(default=6, metadata={"help": "of the student, and of its control"})
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 128
    learning_rate: float = 2e-3
    adam_beta2: float = 0.98
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "of labels; the teacher's words have none"})
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="fp32",
        metadata={"help": "auto: bf16 where the hardware computes it, for larger models than the default"},
    )
    temperature: float = field(default=1.0, metadata={"help": "softens teacher's and student's logits alike"})


def main() -> None:
    args, training = parse(Arguments, TranslationTrainingArguments)
    reject_unused("a translator has no bottleneck", training, "value_learning_rate")
    data = load_translation_data(args.dataset, args.source, args.target)
    print_notes(data.name, data.notes)
    named_models = load_named_models(args)
    run = open_run(training, args, data, *named_models)
    task = TranslationTask.of(run, args, data, *named_models)

    teacher = task.train_teacher(run)
    evaluations = {"teacher": task.evaluate(run, "teacher", teacher)}
    translations = None if args.method == "word" else task.translate_training_set(run, teacher)
    for seed_run in run.each_seed():
        if not training.no_control:
            control = task.train_control(seed_run, teacher)
            evaluations["control"] = task.evaluate(seed_run, "control", control)
        student = task.train_student(seed_run, teacher, translations)
        evaluations["student"] = task.evaluate(seed_run, "student", student)
        task.report(seed_run, evaluations, student)
    run.summarize()


if __name__ == "__main__":
    run_main(main)
