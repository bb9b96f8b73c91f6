"""Distills an encoder-decoder translator into a smaller one, with a control (Kim and Rush 2016, arXiv:1606.07947).

    python NLP/scripts/distill_translation.py
    python NLP/scripts/distill_translation.py --method kd
    python NLP/scripts/distill_translation.py NLP/scripts/multi30k.yaml
    python NLP/scripts/distill_translation.py --dataset FOLDER --student cut --learning_rate 3e-4 \\
        --teacher Helsinki-NLP/opus-mt-en-de --student_encoder_layers 3 --student_decoder_layers 1

The student learns the teacher's distribution over each next token of the references (kd), the teacher's beam-search
translations instead of the references (sequence_kd), or the teacher's distributions over its translations
(sequence_kd+kd). The divergences of distill_gpt.py can replace kd, as in sequence_kd+reverse_kl.
With --on_policy_share, some updates are on samples of the student (arXiv:2306.13649).
"""

from dataclasses import dataclass, field
from typing import Literal

from kd.common.cli import parse, reject_unused, show_help
from kd.common.cli import run as run_main
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import Count, NotNegative, Positive, ShareBelow1
from kd.nlp.student_model.arguments import DIVERGENCE_NAMES, SEQUENCE_KD, StoredLogitsArguments
from kd.nlp.student_model.on_policy_arguments import OnPolicyArguments
from kd.nlp.teacher_model import SCRATCH

SCRATCH_EPOCHS = 5


@dataclass
class Arguments(StoredLogitsArguments, OnPolicyArguments):
    """Data, layers and method."""

    dataset: str = field(
        default="number_words", metadata={"help": "Embedded dataset number_words, Hub name[:config] or folder."}
    )
    max_train_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of training sentence pairs."}
    )
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of sentence pairs in each of the other splits."}
    )
    source: str = field(default="en", metadata={"help": "Column of sources, or key in the column translation."})
    target: str = field(default="de", metadata={"help": "Column of targets, or key in the column translation."})
    source_prefix: str = field(
        default="", metadata={"help": "Text before each source sentence, such as T5's task prefix."}
    )
    max_length: Count = field(default=128, metadata={"help": "Number of tokens after which a sentence is truncated."})

    teacher_epochs: NotNegative | None = field(
        default=None,
        metadata={"help": f"Epochs of training the teacher (default: {SCRATCH_EPOCHS} from scratch, else 0)."},
    )
    teacher_learning_rate: Positive | None = field(
        default=None, metadata={"help": "Learning rate of the teacher (default: --learning_rate)."}
    )
    teacher_layers: Count = field(
        default=2,
        metadata={"help": "Number of layers in the encoder and in the decoder of a teacher with random weights."},
    )
    vocabulary_size: Count = 600
    student: str = SCRATCH
    student_encoder_layers: Count = field(
        default=1, metadata={"help": "Number of encoder layers of a student that is cut or has random weights."}
    )
    student_decoder_layers: Count = field(
        default=1, metadata={"help": "Number of decoder layers of a student that is cut or has random weights."}
    )
    method: str = field(
        default=f"{SEQUENCE_KD}+kd",
        metadata={
            "help": f"{SEQUENCE_KD} for the teacher's translations, a divergence of next-token distributions "
            f"({', '.join(DIVERGENCE_NAMES)}; NAME[:key=value:...]), or both as {SEQUENCE_KD}+NAME."
        },
    )
    average: Literal["tokens", "sequences"] = field(
        default="tokens", metadata={"help": "Mean of the losses: over all tokens, or over sentences of their means."}
    )
    beams: Count = field(
        default=5, metadata={"help": "Number of beams for the teacher's translations and the *_beam metrics."}
    )

    def __post_init__(self) -> None:
        if self.teacher_epochs is None:
            self.teacher_epochs = SCRATCH_EPOCHS if self.teacher == SCRATCH else 0
        super().__post_init__()

    def check_unused_flags(self) -> None:
        super().check_unused_flags()
        if not self.teacher_epochs:
            reject_unused("--teacher_epochs is 0", self, "teacher_learning_rate")
        if self.method == SEQUENCE_KD:
            reject_unused("--method sequence_kd trains on translations alone", self, "alpha", "temperature")


@dataclass
class TranslationTrainingArguments(KDTrainingArguments):
    """Training with the defaults of small transformers with random weights."""

    output_dir: str | None = "runs/NLP/translation"
    num_train_epochs: Positive = 6
    per_device_train_batch_size: Count = 64
    per_device_eval_batch_size: Count = 128
    learning_rate: Positive = 2e-3
    adam_beta2: ShareBelow1 = 0.98
    label_smoothing_factor: ShareBelow1 = field(
        default=0.1, metadata={"help": "Label smoothing of the labels, not of the teacher's distributions."}
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    temperature: Positive = 1.0


ARGUMENTS = Arguments, TranslationTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.data.sources import print_notes
from kd.common.methods import check_name
from kd.nlp.data.translation import load_translation_data
from kd.nlp.student_model.generation import open_run
from kd.nlp.student_model.teacher_logits import check_stored_logits
from kd.nlp.student_model.token_objective import divergence_of, parts_of
from kd.nlp.student_model.translation import TranslationTask, load_named_models


def main() -> None:
    args, training = parse(*ARGUMENTS)
    reject_unused("a translator has no bottleneck", training, "value_learning_rate")
    method = parts_of(args.method)
    if method.divergence is not None:
        check_name(method.divergence, DIVERGENCE_NAMES if method.on_translations else (*DIVERGENCE_NAMES, SEQUENCE_KD))
        divergence_of(method.divergence, training.temperature)  # raises UserError for an invalid method
        check_stored_logits(args, training, method.divergence)
    limits = args.max_train_samples, args.max_eval_samples
    data = load_translation_data(args.dataset, args.source, args.target, *limits)
    print_notes(data.name, data.notes)
    named_models = load_named_models(args)
    run = open_run(training, args, data, *named_models)
    task = TranslationTask.of(run, args, data, *named_models)

    teacher = task.train_teacher(run)
    evaluations = {"teacher": task.evaluate(run, "teacher", teacher)}
    translations = task.translate_training_set(run, teacher) if method.on_translations else None
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
