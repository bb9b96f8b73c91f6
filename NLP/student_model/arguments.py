"""Arguments that the scripts for text classifiers share."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd.common.cli import reject_unused
from kd.common.data.sources import print_notes
from kd.common.methods import METHODS
from kd.common.training.arguments import BottleneckArguments, KDTrainingArguments
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, Share
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.student_model.methods import HiddenLoss, LayerMap

Ranges = dict[str, tuple[float, float]]  # training argument -> from, to; from == to is no choice
SEARCHABLE = ("alpha", "temperature", "learning_rate")
SHORTEST = 8  # tokens of a text; up to four of them are special, and the rest is the text


@dataclass
class ClassifierTrainingArguments(KDTrainingArguments):
    """Training as suits BERT and smaller encoders."""

    output_dir: str | None = "runs/NLP/base"
    learning_rate: float = field(default=1.5e-4, metadata={"help": "of encoders that learn a task"})
    per_device_train_batch_size: int = 48
    per_device_eval_batch_size: int = 256


@dataclass
class BottleneckTrainingArguments(ClassifierTrainingArguments):
    """Likewise, for a student with a bottleneck."""

    output_dir: str | None = "runs/NLP/keys_carried"
    value_learning_rate: Positive | None = field(default=3e-2, metadata={"help": "of a bottleneck's values"})


@dataclass
class SearchTrainingArguments(ClassifierTrainingArguments):
    """Likewise, for the trials of a search."""

    output_dir: str | None = "runs/NLP/search"


@dataclass
class TextArguments:
    """Which texts."""

    dataset: str = field(default="intents", metadata={"help": "embedded name, Hub name[:config], folder or file"})
    text_columns: list[str] | None = field(default=None, metadata={"help": "one column, or two for pairs"})
    label_column: str | None = None
    task: Literal["classification", "regression"] | None = field(
        default=None, metadata={"help": "what the labels are, where they could be classes as well as scores"}
    )
    max_length: Annotated[int, Range(SHORTEST, MOST)] = field(
        default=128, metadata={"help": "longer texts are cut, in tokens"}
    )

    def load(self) -> TextData:
        """The data; prints what was inferred of them."""
        data = load_text_data(self.dataset, self.text_columns, self.label_column, self.task)
        print_notes(data.name, data.notes)
        return data


@dataclass
class PairArguments:
    """Who teaches whom."""

    teacher: str = field(default="tiny-bert", metadata={"help": "Hub name, local folder, or the embedded tiny-bert"})
    teacher_epochs: Positive = field(
        default=6, metadata={"help": "fine-tuning; a teacher of these labels is kept as is"}
    )
    student: str | None = field(default=None, metadata={"help": "Hub name or folder; else cut from the teacher"})
    student_layers: Count | None = field(default=None, metadata={"help": "layers of the cut (default: half)"})
    control_init: str | None = field(
        default=None, metadata={"help": "encoder that the control is cut from, where --teacher is trained already"}
    )
    from_scratch_epochs: Positive = field(
        default=20, metadata={"help": "--teacher_epochs for random weights (tiny-bert)"}
    )
    from_scratch_learning_rate: Positive = field(default=1e-3, metadata={"help": "--learning_rate for random weights"})
    align_epochs: NotNegative = field(default=6, metadata={"help": "matching the teacher's hidden states; 0: none"})
    align_learning_rate: Positive = field(default=5e-4, metadata={"help": "matching bears more than fine-tuning does"})

    def __post_init__(self) -> None:
        if self.student and self.student_layers:
            raise ValueError("--student names a whole model, --student_layers cuts one from the teacher: choose one")

    def check_unused_flags(self) -> None:
        if not self.align_epochs:
            reject_unused("--align_epochs is 0", self, "align_learning_rate")
        if self.student:
            reject_unused("the control starts as --student does", self, "control_init")

    def reject_unused_flags(self, teacher_is_trained: bool, teacher_from_scratch: bool, from_scratch: bool) -> None:
        """Raises UserError for flags that are not those of what was loaded: `teacher_...`, or any model."""
        if teacher_is_trained:
            reject_unused(f"teacher {self.teacher} is trained already", self, "teacher_epochs", "from_scratch_epochs")
        elif teacher_from_scratch:
            reject_unused(f"{self.teacher} has random weights and --from_scratch_epochs", self, "teacher_epochs")
        else:
            reject_unused(f"{self.teacher} has no random weights", self, "from_scratch_epochs")
        if not from_scratch:
            reject_unused("no model has random weights", self, "from_scratch_learning_rate")


@dataclass
class TextBottleneckArguments(BottleneckArguments):
    """Which of the models have a bottleneck, and its shape."""

    bottleneck: Literal["both", "student"] = field(default="both", metadata={"help": "who has one"})
    freeze_teacher_encoder: bool = field(default=False, metadata={"help": "train only the teacher's bottleneck"})
    pooling: Literal["mean", "cls", "tokens"] = "mean"

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
    """What a plain student learns besides labels and soft targets, and from whom."""

    ensemble_teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "folders of classifiers of these labels, whose logits are averaged with those of --teacher"},
    )
    method: str = field(
        default="kd",
        metadata={"help": f"NAME or NAME:setting=value:...; {', '.join(METHODS)}"},
    )
    student_from: Literal["teacher", "pretrained"] = field(
        default="teacher", metadata={"help": "the student is cut from the fine-tuned teacher, or from what it was"}
    )
    student_learning_rate: Positive | None = field(
        default=None, metadata={"help": "of a student that learns from a teacher; default: --learning_rate"}
    )
    hidden_weight: NotNegative = field(
        default=0.0, metadata={"help": "weight of matching hidden states while fine-tuning"}
    )
    hidden_loss: HiddenLoss = field(default="both", metadata={"help": "l2, cosine, or the sum of both"})
    embedding_weight: NotNegative = field(default=0.0, metadata={"help": "weight of matching the embeddings' output"})
    attention_weight: NotNegative = field(default=0.0, metadata={"help": "weight of matching attention distributions"})
    layer_map: LayerMap = field(
        default="uniform", metadata={"help": "layers at the same relative depth, or PKD's last or skip"}
    )

    def check_unused_flags(self) -> None:
        if not self.hidden_weight and not self.embedding_weight:
            reject_unused("--hidden_weight and --embedding_weight are 0", self, "hidden_loss")
        if not self.hidden_weight and not self.attention_weight:
            reject_unused("--hidden_weight and --attention_weight are 0", self, "layer_map")


@dataclass
class SearchArguments:
    """What is distilled into what, and what is searched where."""

    teacher: str = field(metadata={"help": "folder or Hub name of a trained classifier of these labels"})
    student: str | None = field(default=None, metadata={"help": "Hub name or folder; else cut from the teacher"})
    student_layers: Count | None = field(default=None, metadata={"help": "layers of the cut (default: half)"})
    trials: Count = field(default=20, metadata={"help": "finished trials at the end, pruned ones included"})
    search: list[str] = field(
        default_factory=lambda: list(SEARCHABLE), metadata={"help": "any of alpha, temperature, learning_rate"}
    )
    alpha_range: list[Share] = field(default_factory=lambda: [0.0, 1.0], metadata={"help": "from, to"})
    temperature_range: list[Positive] = field(default_factory=lambda: [1.0, 20.0], metadata={"help": "from, to"})
    learning_rate_range: list[Positive] = field(
        default_factory=lambda: [1e-5, 1e-3], metadata={"help": "from, to; searched on a logarithmic scale"}
    )

    def __post_init__(self) -> None:
        if self.student and self.student_layers:
            raise ValueError("--student names a whole model, --student_layers cuts one from the teacher: choose one")
        unknown = [name for name in self.search if name not in SEARCHABLE]
        if unknown or not self.search:
            raise ValueError(
                f"--search takes one or more of {', '.join(SEARCHABLE)}, got {' '.join(unknown) or 'none'}"
            )
        for name in self.search:
            self._check_range(name, getattr(self, f"{name}_range"))

    def check_unused_flags(self) -> None:
        for name in SEARCHABLE:
            if name not in self.search:
                reject_unused(f"--search leaves out {name}", self, f"{name}_range")

    def _check_range(self, name: str, limits: list[float]) -> None:
        shown = " ".join(map(str, limits))
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"--{name}_range takes two numbers, the lower one first, got {shown}")

    @property
    def ranges(self) -> Ranges:
        return {name: tuple(getattr(self, f"{name}_range")) for name in SEARCHABLE if name in self.search}

    @property
    def control_ranges(self) -> Ranges:
        """Labels alone, at the middle of the learning rates: a single point."""
        ranges = {"alpha": (1.0, 1.0)}
        if "learning_rate" in self.search:
            rate = math.sqrt(math.prod(self.learning_rate_range))
            ranges["learning_rate"] = (rate, rate)
        return ranges
