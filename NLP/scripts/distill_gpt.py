"""Distills a causal language model into a smaller one, with a control.

    python NLP/scripts/distill_gpt.py
    python NLP/scripts/distill_gpt.py --method reverse_kl --student scratch --student_layers 2
    python NLP/scripts/distill_gpt.py --method uld --student scratch --student_vocabulary_size 512
    python NLP/scripts/distill_gpt.py NLP/scripts/answers.yaml   # prompts and short answers
    python NLP/scripts/distill_gpt.py NLP/scripts/gpt.yaml   # GPT-2 on WikiText, from the Hub

The student learns the teacher's distribution over each next token of the corpus, with the forward KL divergence (kd,
arXiv:1503.02531), the reverse KL divergence (reverse_kl, arXiv:2306.08543), the generalized Jensen-Shannon divergence
(js, arXiv:2306.13649), the skewed KL divergences (skew_kl and skew_reverse_kl, arXiv:2402.03898), the total variation
distance (tv, arXiv:2307.15190) or the alpha-beta divergence (abkd, arXiv:2505.04560).
With --on_policy_share, some updates are on samples of the student (arXiv:2306.13649).
Of prompts and completions, or of chats, only completions, or the assistant's messages, count in losses and metrics.
"""

from dataclasses import dataclass, field
from typing import Annotated

from kd.common.cli import parse, reject_unused, show_help
from kd.common.cli import run as run_main
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, ShareBelow1
from kd.nlp.student_model.arguments import CUT, DIVERGENCE_NAMES, VOCABULARY_METHODS, StoredLogitsArguments
from kd.nlp.student_model.on_policy_arguments import OnPolicyArguments
from kd.nlp.teacher_model import MIN_VOCABULARY_SIZE, SCRATCH


@dataclass
class Arguments(StoredLogitsArguments, OnPolicyArguments):
    """Data, layers and method."""

    dataset: str = field(
        default="python",
        metadata={
            "help": "Embedded python (texts) or answers (prompts), Hub name[:config], or folder of .txt, parquet, CSV "
            "or JSON files."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Further texts to evaluate on: as --dataset, or a .txt file."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts (default: inferred)."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts (default: prompt)."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of completions, which alone count (default: completion)."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of chats, lists of role and content (default: messages)."}
    )
    max_train_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of training documents, rows or .txt lines."}
    )
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of documents or rows in each other split."}
    )
    block_size: Annotated[int, Range(2, MOST)] = field(
        default=128, metadata={"help": "Number of tokens in a training block."}
    )

    teacher_epochs: NotNegative = 2
    teacher_width: Count = 96
    dropout: ShareBelow1 = 0.0
    vocabulary_size: Annotated[int, Range(MIN_VOCABULARY_SIZE, MOST)] = 1024
    student_vocabulary_size: Annotated[int, Range(MIN_VOCABULARY_SIZE, MOST)] | None = field(
        default=None, metadata={"help": "Size of a BPE vocabulary of the student, for uld and shared_tokens."}
    )
    student_layers: Count = field(
        default=1, metadata={"help": "Number of layers of a student that is cut or has random weights."}
    )
    from_scratch_learning_rate: Positive = field(
        default=2e-3, metadata={"help": "Learning rate of models with random weights."}
    )

    method: str = field(
        default="kd",
        metadata={
            "help": f"Divergence from the teacher, NAME[:key=value:...], as in js:beta=0.1: "
            f"{', '.join(DIVERGENCE_NAMES)}. For another vocabulary: {', '.join(VOCABULARY_METHODS)}."
        },
    )
    hidden_weight: NotNegative = field(
        default=0.0, metadata={"help": "Weight of matching hidden states by L2 and cosine."}
    )
    prompt_length: Count | None = field(
        default=None, metadata={"help": "Tokens of a block before a sample (default: half of --block_size)."}
    )

    @property
    def across_vocabularies(self) -> bool:
        """Whether the method allows a student with another vocabulary than the teacher."""
        return self.method.split(":")[0] in VOCABULARY_METHODS

    def __post_init__(self) -> None:
        super().__post_init__()
        methods = " or ".join(f"--method {name}" for name in VOCABULARY_METHODS)
        if self.student_vocabulary_size is not None and not self.across_vocabularies:
            raise ValueError(f"--student_vocabulary_size needs a method for different vocabularies: pass {methods}")
        for name in ("hidden_weight", "on_policy_share"):
            if getattr(self, name) and self.across_vocabularies:
                raise ValueError(f"--{name} needs the same tokens of student and teacher: leave it out with {methods}")

    def check_unused_flags(self) -> None:
        super().check_unused_flags()
        if self.student != SCRATCH:
            reject_unused("--student is not scratch", self, "student_vocabulary_size")
        if self.text_column:
            prompts = "prompt_column", "completion_column", "messages_column"
            reject_unused("--text_column names the column of plain texts", self, *prompts)


@dataclass
class LanguageTrainingArguments(KDTrainingArguments):
    """Training with the defaults of small GPTs."""

    output_dir: str | None = "runs/NLP/gpt"
    num_train_epochs: Positive = 1
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 16
    learning_rate: Positive = field(default=1e-4, metadata={"help": "Learning rate of pretrained models."})
    weight_decay: NotNegative = 0.1


ARGUMENTS = Arguments, LanguageTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.data.sources import print_notes
from kd.common.methods import check_name, parse_method
from kd.common.utils.devices import use_one_thread
from kd.common.utils.errors import UserError
from kd.nlp.data.prompts import PromptData, load_language_data
from kd.nlp.student_model.across_vocabularies import METHODS, AcrossVocabularies
from kd.nlp.student_model.generation import open_run
from kd.nlp.student_model.language_model import LanguageTask, load_named_models
from kd.nlp.student_model.prompts import PromptTask
from kd.nlp.student_model.teacher_logits import check_stored_logits
from kd.nlp.student_model.token_objective import divergence_of


def main() -> None:
    args, training = parse(*ARGUMENTS)
    reject_unused("a language model has no bottleneck", training, "value_learning_rate")
    if args.teacher == SCRATCH and args.student in (CUT, SCRATCH):
        reject_unused("models with random weights train at --from_scratch_learning_rate", training, "learning_rate")
    check_name(args.method, (*DIVERGENCE_NAMES, *VOCABULARY_METHODS))
    if args.across_vocabularies:
        parse_method(args.method, METHODS, temperature=training.temperature)  # raises UserError for an invalid method
    else:
        divergence_of(args.method, training.temperature)  # likewise
    check_stored_logits(args, training, args.method)
    data = load_language_data(args)
    print_notes(data.name, data.notes)
    named_models = teacher, _ = load_named_models(args)
    task: type[LanguageTask] = AcrossVocabularies if args.across_vocabularies else LanguageTask
    if isinstance(data, PromptData):
        if args.across_vocabularies:
            raise UserError(f"--method {args.method} learns from plain texts, not from prompts: pass --text_column")
        reject_unused("the prompts of samples are those of the data", args, "prompt_length")
        reject_unused("models of prompts are not evaluated on plain texts", args, "eval_dataset")
        data.check_template(teacher and teacher.tokenizer)
        task = PromptTask
    if args.teacher == SCRATCH and args.teacher_width < 128:
        use_one_thread()
    run = open_run(training, args, data, *named_models)
    task.of(run, args, data, *named_models).distill(run)


if __name__ == "__main__":
    run_main(main)
