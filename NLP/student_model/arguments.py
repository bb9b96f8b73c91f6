"""Arguments that the scripts for text classifiers share. Nothing here imports torch or transformers."""

from argparse import SUPPRESS
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from kd.common.cli import Parser, reject_unused
from kd.common.training.arguments import (
    METHOD_NAMES,
    BottleneckArguments,
    KDTrainingArguments,
    Keys,
    TeacherOutputArguments,
    check_ensemble_weights,
    ensemble_weights,
    only_with,
)
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, Seed, ShareBelow1
from kd.nlp.teacher_model import HEAD_WIDTH, SCRATCH, TINY_BERT

if TYPE_CHECKING:
    from kd.nlp.data.loading import TextData

LayerMap = Literal["uniform", "last", "skip"]
HiddenLoss = Literal["l2", "cosine", "both"]
METHOD_HELP = f"NAME[:key=value:...]: {', '.join(METHOD_NAMES)}."
SEPARATOR_HELP = "Separator of several labels in the label column, such as a comma."
PLACEHOLDER_HELP = "Placeholders in the label column for a missing label."
LABEL_NAMES_HELP = "Labels, by id, of classifiers that name theirs LABEL_0, LABEL_1, ..."
LABEL_ORDER_HELP = "Such classifiers have the labels of the data, in their order."
COLUMNS_HELP = "Label column, or several of 0 and 1 (default: inferred)."
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb")
SYSTEMS = {"base": "KD", "keys_carried": "keys carried", "new_keys": "new keys", "student_only": "student only"}
SENTENCE_METHODS = ("embedding", "similarity", "rkd", "sp", "pkt")
VOCABULARY_METHODS = ("uld", "shared_tokens")  # for a student with another vocabulary than the teacher
DIVERGENCE_NAMES = ("kd", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "tv", "abkd")
SEQUENCE_KD = "sequence_kd"  # value of --method of a translator that learns from the teacher's translations
CUT = "cut"  # value of --student for a student with some of the teacher's layers
MIN_LENGTH = 8  # minimum of --max_length in tokens, of which up to four are special tokens


@dataclass
class ClassifierTrainingArguments(KDTrainingArguments):
    """Training with the defaults of BERT and smaller encoders."""

    output_dir: str | None = "runs/NLP/base"
    learning_rate: Positive = 1.5e-4
    per_device_train_batch_size: Count = 48
    per_device_eval_batch_size: Count = 256


@dataclass
class BottleneckTrainingArguments(ClassifierTrainingArguments):
    """The defaults of a student with a bottleneck."""

    output_dir: str | None = "runs/NLP/keys_carried"
    num_train_epochs: Positive = field(default=3.0, metadata={"help": SUPPRESS})  # stages have their own
    value_learning_rate: Positive | None = field(default=3e-2, metadata={"help": "Learning rate of the values."})


@dataclass
class TextArguments:
    """Data."""

    elsewhere: ClassVar = only_with("distill_classifier.py")
    dataset: str = field(default="intents", metadata={"help": "Embedded dataset, Hub name, folder or file."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Column of texts, or two for text pairs (default: inferred)."}
    )
    label_column: list[str] | None = field(default=None, metadata={"help": COLUMNS_HELP})
    task: Literal["classification", "regression", "multi_label"] | None = field(
        default=None, metadata={"help": "Type of task, if ambiguous."}
    )
    max_length: Annotated[int, Range(MIN_LENGTH, MOST)] = field(
        default=128, metadata={"help": "Maximum number of tokens of a text."}
    )
    max_train_samples: Count | None = field(default=None, metadata={"help": "Maximum number of training texts."})
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of texts in each of the other splits."}
    )

    def load(self) -> "TextData":
        """Loads the data and prints what was inferred."""
        from kd.common.data.sources import print_notes
        from kd.nlp.data.loading import load_text_data

        data = load_text_data(
            self.dataset,
            self.text_columns,
            self.label_column,
            self.task,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            **self.label_options,
        )
        print_notes(data.name, data.notes)
        return data

    @property
    def label_options(self) -> dict[str, Any]:
        """Further arguments of `load_text_data`."""
        return {}


@dataclass
class LabelledTextArguments(TextArguments):
    """Data."""

    unlabelled_label: list[str] | None = field(default=None, metadata={"help": PLACEHOLDER_HELP})
    drop_unlabelled: bool = field(default=False, metadata={"help": "Leave out training texts without a label."})
    label_separator: str | None = field(default=None, metadata={"help": SEPARATOR_HELP})
    label_names: list[str] | None = field(default=None, metadata={"help": LABEL_NAMES_HELP})
    trust_label_order: bool = field(default=False, metadata={"help": LABEL_ORDER_HELP})

    def __post_init__(self) -> None:
        if self.label_names and self.trust_label_order:
            raise ValueError("--label_names and --trust_label_order both order the labels: pass one of them")

    @property
    def label_options(self) -> dict[str, Any]:
        names = "unlabelled_label", "drop_unlabelled", "label_names", "trust_label_order", "label_separator"
        return {name: getattr(self, name) for name in names}


@dataclass
class TeacherColumnArguments(TeacherOutputArguments, LabelledTextArguments):
    """Data."""

    @property
    def label_options(self) -> dict[str, Any]:
        columns = {"teacher_columns": self.teacher_columns, "teacher_values": self.teacher_values}
        return super().label_options | columns


# The flags of add_data_arguments that a run's recipe may set.
DATA_ARGUMENTS = (
    "dataset",
    "text_columns",
    "label_column",
    "label_separator",
    "unlabelled_label",
    "max_eval_samples",
)


def add_data_arguments(
    parser: Parser,
    flag: str = "--dataset",
    help: str = "Embedded dataset, Hub name, folder or file (default: that of the run).",
) -> None:
    """Adds the data flags of scripts that evaluate or change a trained classifier. `flag` names the dataset."""
    parser.add_argument(flag, dest="dataset", help=help)
    parser.add_argument(
        "--text_columns", nargs="*", help="Column of texts, or two for text pairs (default: inferred)."
    )
    parser.add_argument("--label_column", nargs="*", help=COLUMNS_HELP)
    parser.add_argument("--label_separator", help=SEPARATOR_HELP)
    parser.add_argument("--unlabelled_label", nargs="*", help=PLACEHOLDER_HELP)
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--label_names", nargs="*", help=LABEL_NAMES_HELP)
    names.add_argument("--trust_label_order", action="store_true", help=LABEL_ORDER_HELP)
    parser.add_argument(
        "--max_eval_samples", type=int, within=Range(1, MOST), help="Maximum number of texts in each split."
    )


@dataclass
class PairArguments:
    """Teacher and student."""

    teacher: str = field(
        default=TINY_BERT,
        metadata={"help": f"Hub name, folder, or the embedded {TINY_BERT}."},
    )
    teacher_epochs: Positive = field(default=6, metadata={"help": "Epochs of fine-tuning a pretrained teacher."})
    student: str | None = field(
        default=None, metadata={"help": "Hub name, folder or TYPE:key=value:... (default: cut from teacher)."}
    )
    student_layers: Count | None = field(
        default=None, metadata={"help": "Number of the teacher's layers that a cut keeps (default: half)."}
    )
    control_init: str | None = field(
        default=None,
        metadata={"help": "Model that the control is cut from, for a trained teacher."},
    )
    from_scratch_epochs: Positive = field(default=2, metadata={"help": "Epochs of a teacher with random weights."})
    from_scratch_learning_rate: Positive = field(
        default=2e-3, metadata={"help": "Learning rate of models with random weights."}
    )
    align_epochs: NotNegative | None = field(
        default=None, metadata={"help": "Epochs of aligning hidden states (default: 6; tiny-bert: 1)."}
    )
    align_learning_rate: Positive | None = field(
        default=None, metadata={"help": "Learning rate of the alignment (default: 5e-4; tiny-bert: 2e-3)."}
    )

    def __post_init__(self) -> None:
        is_tiny = self.teacher == TINY_BERT
        if self.align_epochs is None:
            self.align_epochs = 1 if is_tiny else 6
        if self.align_learning_rate is None:
            self.align_learning_rate = 2e-3 if is_tiny else 5e-4
        if self.student and self.student_layers:
            raise ValueError("--student names a whole model, --student_layers cuts one from the teacher: choose one")

    def check_unused_flags(self) -> None:
        if not self.align_epochs:
            reject_unused("--align_epochs is 0", self, "align_learning_rate")
        if self.student:
            reject_unused("the control starts from the model of --student", self, "control_init")

    def reject_unused_flags(self, teacher_is_trained: bool, teacher_from_scratch: bool, from_scratch: bool) -> None:
        """Raises UserError for flags without effect on the loaded teacher, or on all models (`from_scratch`)."""
        if teacher_is_trained:
            reject_unused(f"teacher {self.teacher} is trained already", self, "teacher_epochs", "from_scratch_epochs")
        elif teacher_from_scratch:
            reject_unused(
                f"{self.teacher} has random weights and is trained for --from_scratch_epochs", self, "teacher_epochs"
            )
        else:
            reject_unused(f"{self.teacher} has pretrained weights", self, "from_scratch_epochs")
        if not from_scratch:
            reject_unused("no model has random weights", self, "from_scratch_learning_rate")


@dataclass
class TextBottleneckArguments(BottleneckArguments):
    """Discrete key-value bottleneck."""

    bottleneck: Literal["both", "student"] = field(default="both", metadata={"help": "Models with a bottleneck."})
    freeze_teacher_encoder: bool = field(
        default=False, metadata={"help": "Train only the bottleneck of the teacher, not its encoder."}
    )
    pooling: Literal["mean", "cls", "tokens"] = field(
        default="mean", metadata={"help": "Pooling of the hidden states."}
    )

    def __post_init__(self) -> None:
        if self.keys in ("carried", "reused") and self.bottleneck == "student":
            raise ValueError(f"--keys {self.keys} needs a teacher with a bottleneck: --bottleneck both, or --keys new")
        if self.freeze_teacher_encoder and self.bottleneck != "both":
            raise ValueError("--freeze_teacher_encoder leaves a plain teacher untrained: it needs --bottleneck both")

    @property
    def system(self) -> str:
        return f"keys_{self.keys}" if self.bottleneck == "both" else "student_only"


@dataclass
class MatchingArguments:
    """Method."""

    method: str = field(default="kd", metadata={"help": METHOD_HELP})
    ensemble_teachers: list[str] = field(
        default_factory=list, metadata={"help": "Further teachers, whose logits are averaged with those of --teacher."}
    )
    ensemble_weights: list[Positive] | None = ensemble_weights()
    student_from: Literal["teacher", "pretrained"] = field(
        default="teacher",
        metadata={"help": "Weights of a cut student."},
    )
    student_learning_rate: Positive | None = field(
        default=None, metadata={"help": "Learning rate of the student (default: --learning_rate)."}
    )
    hidden_weight: NotNegative = field(default=0.0, metadata={"help": "Weight of matching hidden states."})
    hidden_loss: HiddenLoss = field(default="both", metadata={"help": "Hidden state loss; both is the sum."})
    embedding_weight: NotNegative = field(default=0.0, metadata={"help": "Weight of matching the embedding layer."})
    attention_weight: NotNegative = field(
        default=0.0, metadata={"help": "Weight of matching attention distributions."}
    )
    layer_map: LayerMap = field(default="uniform", metadata={"help": "Map to the teacher's layers."})

    def __post_init__(self) -> None:
        check_ensemble_weights(self.ensemble_teachers, self.ensemble_weights)

    def check_unused_flags(self) -> None:
        if not self.hidden_weight and not self.embedding_weight:
            reject_unused("--hidden_weight and --embedding_weight are 0", self, "hidden_loss")
        if not self.hidden_weight and not self.attention_weight:
            reject_unused("--hidden_weight and --attention_weight are 0", self, "layer_map")


@dataclass
class GlueBottleneckArguments(TextBottleneckArguments):
    """Discrete key-value bottleneck."""

    bottleneck: Literal["both", "student"] = field(default="both", metadata={"help": SUPPRESS})  # --systems sets both
    values: Literal["trained", "counted"] = field(default="trained", metadata={"help": SUPPRESS})  # not for STS-B
    keys: Keys = field(default="carried", metadata={"help": SUPPRESS})


@dataclass
class GlueTrainingArguments(KDTrainingArguments):
    """The defaults of every task and system of GLUE."""

    output_dir: str | None = "runs/NLP/glue"
    value_learning_rate: Positive | None = field(default=None, metadata={"help": "Learning rate of the values."})
    seeds: list[Seed] | None = field(default_factory=lambda: [0])


@dataclass
class GlueArguments:
    """Tasks and systems."""

    tasks: list[str] = field(default_factory=lambda: list(GLUE_TASKS), metadata={"help": "GLUE tasks."})
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": "Systems to train."})
    glue_folder: Path | None = field(
        default=None, metadata={"help": "Folder with one folder per task (default: download)."}
    )
    max_samples_seen: Count = field(
        default=200_000,
        metadata={"help": "Maximum texts over all epochs of a stage."},
    )

    def __post_init__(self) -> None:
        for name, known in (("tasks", list(GLUE_TASKS)), ("systems", list(SYSTEMS))):
            words = getattr(self, name)
            if not words or set(words) - set(known):
                raise ValueError(f"--{name} must be some of {', '.join(known)}, got {', '.join(words) or 'none'}")

    def source(self, task: str) -> str:
        """Returns the value of --dataset for a task."""
        if self.glue_folder is None:
            return task
        found = [self.glue_folder / name for name in (task, f"glue_{task}") if (self.glue_folder / name).is_dir()]
        if not found:
            raise UserError(f"--glue_folder {self.glue_folder} contains neither {task} nor glue_{task}")
        return str(found[0])


@dataclass
class GenerativePairArguments:
    """Teacher and student."""

    teacher: str = field(
        default=SCRATCH, metadata={"help": "Hub name or folder of the teacher, or scratch for random weights."}
    )
    teacher_epochs: NotNegative | None = field(
        default=None, metadata={"help": "Epochs of training the teacher; 0 to leave a pretrained teacher unchanged."}
    )
    teacher_layers: Count = field(default=2, metadata={"help": "Number of layers of a teacher with random weights."})
    teacher_width: Count = field(default=128, metadata={"help": "Hidden size of a teacher with random weights."})
    vocabulary_size: Count = field(
        default=2048, metadata={"help": "Size of the BPE vocabulary of a teacher with random weights."}
    )
    student: str = field(
        default=CUT,
        metadata={
            "help": "Hub name or folder of the student, scratch for random weights, or cut for layers of the teacher."
        },
    )
    student_width: Count = field(default=64, metadata={"help": "Hidden size of a student with random weights."})
    dropout: ShareBelow1 = field(default=0.1, metadata={"help": "Dropout of models with random weights."})
    on_policy_share = 0.0  # a flag of OnPolicyArguments

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
            layers = "student_layers", "student_encoder_layers", "student_decoder_layers"
            reject_unused("--student names a model", self, *layers)
        if SCRATCH not in (self.teacher, self.student):
            reject_unused("no model has random weights", self, "dropout", "from_scratch_learning_rate")


@dataclass
class StoredLogitsArguments(GenerativePairArguments):
    """Teacher and student."""

    teacher_logits: str | None = field(
        default=None,
        metadata={"help": "Store some probabilities of the teacher: top:k=64 or sample:k=16."},
    )
    teacher_logits_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of --teacher_logits (default: in --output_dir)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_logits is None:
            return
        method: str = self.method  # type: ignore[attr-defined]
        if method.removeprefix(f"{SEQUENCE_KD}+").partition(":")[0] != "kd":
            raise ValueError(
                f"--teacher_logits serves the forward divergence alone, which --method {method} is not: pass --method "
                "kd, or leave --teacher_logits out"
            )
        for flag in ("hidden_weight", "on_policy_share"):
            if getattr(self, flag, 0):
                raise ValueError(f"--{flag} needs the teacher in every step: leave --teacher_logits out")

    def check_unused_flags(self) -> None:
        super().check_unused_flags()
        if self.teacher_logits is None:
            reject_unused("--teacher_logits is not set", self, "teacher_logits_folder")
