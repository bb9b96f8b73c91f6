"""Distills a masked language model, as DistilBERT was made: on raw text, for any task, with a control.

    python NLP/scripts/distill_mlm.py
    python NLP/scripts/distill_mlm.py --dataset FOLDER --teacher google-bert/bert-base-uncased
    bash NLP/scripts/distill_mlm.sh   # BERT to six layers on WikiText, from the Hub

The student starts from layers of the teacher (0, 2, 4, 7, 9 and 11 of 12) and learns masked tokens, the teacher's
distributions over the vocabulary and its last hidden states (arXiv:1910.01108). The control starts from the same
layers and learns the masked tokens alone. Fine-tune the student on a task with train_teacher.py --teacher, or distill
a classifier into it with distill_classifier.py --student.
"""

from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd.common.cli import parse, reject_unused, show_help
from kd.common.cli import run as run_main
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, ProperShare, Range, Share, ShareBelow1
from kd.nlp.student_model.arguments import CUT, MIN_LENGTH, GenerativePairArguments
from kd.nlp.teacher_model import SCRATCH

SCRATCH_EPOCHS = 8


@dataclass
class Arguments(GenerativePairArguments):
    """Data, layers and method."""

    dataset: str = field(
        default="intents",
        metadata={"help": "Embedded corpus intents or python, Hub name[:config], or folder of text files."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts (default: inferred)."})
    max_train_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of training texts, or lines of a .txt file."}
    )
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of texts or lines in each of the other splits."}
    )
    block_size: Annotated[int, Range(MIN_LENGTH, MOST)] = field(
        default=128, metadata={"help": "Maximum number of tokens in a row."}
    )
    pack: bool = field(
        default=False, metadata={"help": "Fill rows with consecutive texts, instead of one truncated text per row."}
    )
    mask_share: ProperShare = field(default=0.15, metadata={"help": "Share of tokens, or of words, that is masked."})
    whole_words: bool = field(default=False, metadata={"help": "Mask whole words."})

    teacher_epochs: NotNegative | None = field(
        default=None,
        metadata={"help": f"Epochs of training the teacher (default: 0; scratch: {SCRATCH_EPOCHS})."},
    )
    vocabulary_size: Count = field(
        default=1000, metadata={"help": "Number of word pieces of a teacher with random weights."}
    )
    student_layers: Count | None = field(
        default=None, metadata={"help": "Number of layers of a student that is cut or random (default: half)."}
    )
    dropout: ShareBelow1 = 0.0
    from_scratch_learning_rate: Positive = field(
        default=2e-3, metadata={"help": "Learning rate of models with random weights."}
    )

    alpha_ce: NotNegative = field(default=5.0, metadata={"help": "Weight of the soft targets."})
    alpha_mlm: NotNegative = field(default=2.0, metadata={"help": "Weight of the masked tokens."})
    alpha_cos: NotNegative = field(default=1.0, metadata={"help": "Weight of the cosine of last hidden states."})
    soft_target_positions: Literal["all", "masked"] = field(
        default="all", metadata={"help": "Positions of the soft targets."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_epochs is None:
            self.teacher_epochs = SCRATCH_EPOCHS if self.teacher == SCRATCH else 0

    def check_unused_flags(self) -> None:
        super().check_unused_flags()
        if not self.alpha_ce:
            reject_unused("--alpha_ce is 0", self, "soft_target_positions")


@dataclass
class MaskedTrainingArguments(KDTrainingArguments):
    """Training with the defaults of small BERTs."""

    output_dir: str | None = "runs/NLP/mlm"
    num_train_epochs: Positive = 1
    per_device_train_batch_size: Count = 32
    per_device_eval_batch_size: Count = 64
    learning_rate: Positive = field(default=5e-4, metadata={"help": "Learning rate of pretrained models."})
    alpha: Share = field(default=0.5, metadata={"help": SUPPRESS})  # the script has a weight for each term


ARGUMENTS = Arguments, MaskedTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.data.sources import print_notes
from kd.nlp.data.corpora import load_corpus
from kd.nlp.student_model.generation import open_run
from kd.nlp.student_model.masked_language_model import MaskedLanguageTask, load_named_models


def main() -> None:
    args, training = parse(*ARGUMENTS)
    reject_unused("a language model has no bottleneck", training, "value_learning_rate")
    reject_unused("--alpha_ce, --alpha_mlm and --alpha_cos are the weights", training, "alpha")
    if not args.alpha_ce:
        reject_unused("--alpha_ce is 0", training, "temperature")
    if args.teacher == SCRATCH and args.student in (CUT, SCRATCH):
        reject_unused("models with random weights train at --from_scratch_learning_rate", training, "learning_rate")
    corpus = load_corpus(args.dataset, args.text_column, args.max_train_samples, args.max_eval_samples)
    print_notes(corpus.name, corpus.notes)
    named_models = load_named_models(args)
    run = open_run(training, args, corpus, *named_models)
    MaskedLanguageTask.of(run, args, corpus, *named_models).distill(run)


if __name__ == "__main__":
    run_main(main)
