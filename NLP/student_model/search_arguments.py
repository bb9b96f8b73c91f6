"""Arguments of a hyperparameter search. Nothing here imports torch or transformers."""

import math
from dataclasses import dataclass, field

from kd.common.cli import reject_unused
from kd.common.utils.ranges import Count, Positive, Share
from kd.nlp.student_model.arguments import ClassifierTrainingArguments

Ranges = dict[str, tuple[float, float]]  # training argument -> lowest and highest value; equal if it is fixed
SEARCHABLE = ("alpha", "temperature", "learning_rate")


@dataclass
class SearchTrainingArguments(ClassifierTrainingArguments):
    """The defaults of the trials of a search."""

    output_dir: str | None = "runs/NLP/search"


@dataclass
class SearchArguments:
    """Teacher, student and search."""

    teacher: str = field(metadata={"help": "Folder or name on the Hub of a classifier trained on these labels."})
    student: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the student (default: a cut of the teacher)."}
    )
    student_layers: Count | None = field(
        default=None, metadata={"help": "Number of the teacher's layers that a cut keeps (default: half)."}
    )
    trials: Count = field(default=20, metadata={"help": "Number of trials, including pruned ones."})
    search: list[str] = field(default_factory=lambda: list(SEARCHABLE), metadata={"help": "Arguments to search."})
    alpha_range: list[Share] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Lowest and highest --alpha."}
    )
    temperature_range: list[Positive] = field(
        default_factory=lambda: [1.0, 20.0], metadata={"help": "Lowest and highest --temperature."}
    )
    learning_rate_range: list[Positive] = field(
        default_factory=lambda: [1e-5, 1e-3],
        metadata={"help": "Lowest and highest --learning_rate, searched on a logarithmic scale."},
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
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(
                f"--{name}_range takes two numbers, the lower one first, got {' '.join(map(str, limits))}"
            )

    @property
    def ranges(self) -> Ranges:
        return {name: tuple(getattr(self, f"{name}_range")) for name in SEARCHABLE if name in self.search}

    @property
    def control_ranges(self) -> Ranges:
        """Fixed values: labels alone, and the geometric mean of the range of learning rates."""
        ranges = {"alpha": (1.0, 1.0)}
        if "learning_rate" in self.search:
            rate = math.sqrt(math.prod(self.learning_rate_range))
            ranges["learning_rate"] = (rate, rate)
        return ranges
