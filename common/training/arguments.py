"""Arguments that the domains share: the run, training, and the discrete key-value bottleneck.

Nothing here imports torch or transformers, so that `--help` is quick.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kd.common.cli import Parser, reject_unused
from kd.common.utils.ranges import MOST, Count, NotNegative, Positive, Range, Seed, Share, ShareBelow1, check_declared

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object

# The names in kd.common.methods.METHODS, which imports torch.
METHOD_NAMES = (
    *("kd", "dkd", "dist", "lskd", "dkd_ls", "mlkd", "mlkd_ls", "ctkd", "wkd", "rld", "abkd", "vrm"),
    *("rkd", "sp", "pkt", "cc"),
)
LABELS = "task"  # the part of an objective that compares with the labels
Keys = Literal["carried", "new", "random", "reused"]
CodebookSize = Annotated[int, Range(1, 2**16)]
Strategy = Literal["no", "steps", "epoch"]


@dataclass
class RunArguments:
    """Run."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run (default: runs/DOMAIN/NAME)."})
    seed: Seed = field(default=0, metadata={"help": "Random seed of initialization, data order and dropout."})
    seeds: list[Seed] | None = field(
        default=None, metadata={"help": "Random seeds: one run per seed, and their means."}
    )
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Continue the run in --output_dir where it stopped."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete the earlier run in --output_dir."})
    margin: Positive | None = field(
        default=None,
        metadata={"help": "Non-inferiority margin (default: 1% of teacher minus chance)."},
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(default="fp32", init=False)

    def __post_init__(self) -> None:
        check_declared(self)
        if self.seeds is None:
            return
        if not self.seeds:
            raise ValueError("--seeds must name at least one seed")
        if len(set(self.seeds)) < len(self.seeds):
            shown = ", ".join(map(str, self.seeds))
            raise ValueError(f"--seeds must be different seeds, each named once, got {shown}")
        self.seed = self.seeds[0]  # also for the stages that all seeds share

    def check_unused_flags(self) -> None:
        """Raises UserError for a flag of the command line that another flag leaves without effect."""
        if self.seeds:
            reject_unused("--seeds is set", self, "seed")


@dataclass
class KDTrainingArguments(RunArguments, TrainingArguments):  # type: ignore[misc]
    """Training.

    An instance is a `transformers.TrainingArguments` too, with all of its arguments; see `complete`. Raises ValueError
    with one line for invalid arguments, and for those that cannot have an effect.
    """

    num_train_epochs: Positive = field(default=3.0, metadata={"help": "Epochs of the student and of the control."})
    max_steps: Annotated[int, Range(1, MOST, or_else=-1)] = field(
        default=-1, metadata={"help": "Optimizer steps per stage; -1 to count in epochs."}
    )
    per_device_train_batch_size: Count = field(default=8, metadata={"help": "Training samples per device and step."})
    per_device_eval_batch_size: Count = field(default=8, metadata={"help": "Evaluation samples per device and step."})
    learning_rate: Positive = field(default=5e-5, metadata={"help": "Learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule, such as cosine."})
    lr_milestones: list[Positive] | None = field(
        default=None,
        metadata={"help": "Epochs at which to divide the learning rate by 10."},
    )
    warmup_steps: NotNegative = field(
        default=0.1, metadata={"help": "Warmup steps, or a share of all steps if below 1."}
    )
    weight_decay: NotNegative = field(default=0.0, metadata={"help": "Weight decay."})
    decay_norm_and_bias: bool = field(default=False, metadata={"help": "Apply weight decay to norms and biases too."})
    alpha: Share = field(default=0.5, metadata={"help": "Weight of the labels; soft targets have 1 - alpha."})
    temperature: Positive = field(default=2.0, metadata={"help": "Temperature of the soft targets."})
    value_learning_rate: Positive | None = None  # of a bottleneck's values; None: --learning_rate
    dot_delta: NotNegative | None = field(default=None, init=False)  # of DistillationOrientedSGD, instead of SGD
    label_smoothing_factor: ShareBelow1 = field(
        default=0.0, metadata={"help": "Label smoothing factor; 0 for no smoothing."}
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Precision; auto is the fastest."}
    )
    no_control: bool = field(
        default=False, metadata={"help": "Skip the control, the student trained without the teacher."}
    )
    eval_strategy: Strategy = field(default="epoch", metadata={"help": "When to evaluate."})
    logging_strategy: Strategy = "epoch"
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Keep the checkpoint with the best validation metric."}
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Trackers: tensorboard, wandb, none, ..."}
    )
    save_total_limit: Count | None = 2
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "group_by_length"
    remove_unused_columns: bool = False  # `sample_id` is no argument of any model
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], init=False)  # names of columns
    logging_nan_inf_filter: bool = False  # the trainer stops at a non-finite loss instead of filtering it

    @classmethod
    def complete(cls) -> type["KDTrainingArguments"]:
        """The type of instances: a subclass of this class and of `transformers.TrainingArguments`, which takes seconds
        to import and is not needed for `--help`.
        """
        complete: type[KDTrainingArguments] = _complete(cls)  # type: ignore[arg-type]
        return complete

    def __new__(cls, *args: Any, **kwargs: Any) -> "KDTrainingArguments":
        return object.__new__(cls.complete())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as an instance of the class with a module-level name."""
        return KDTrainingArguments.__new__, (type(self).__base__,), vars(self)

    def __post_init__(self) -> None:
        from transformers import TrainingArguments

        from kd.common.training.checks import (
            check_dot,
            check_optimizer,
            check_report_to,
            check_supported,
            resolve_device,
        )

        super().__post_init__()
        if self.lr_milestones is not None and self.max_steps > 0:
            raise ValueError("--lr_milestones are epochs: pass --num_train_epochs instead of --max_steps")
        if self.lr_milestones is not None and sorted(set(self.lr_milestones)) != self.lr_milestones:
            raise ValueError(f"--lr_milestones must be in order, each once, got {self.lr_milestones}")
        resolve_device(self)
        check_supported(self)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"  # fp16 with loss scaling
        TrainingArguments.__post_init__(self)
        self.do_eval = False  # the parent derives it, and no code here reads it
        check_report_to(self)
        check_optimizer(self)
        check_dot(self)
        if self.load_best_model_at_end and str(self.metric_for_best_model).endswith("loss"):
            raise ValueError(
                "--load_best_model_at_end needs --metric_for_best_model with a metric of the report (and "
                "--greater_is_better false if lower is better), because no loss is computed on validation"
            )

    def check_unused_flags(self) -> None:
        """Raises UserError for a flag of the command line that another flag leaves without effect."""
        super().check_unused_flags()
        if self.max_steps > 0:
            reject_unused("--max_steps sets the length of every stage", self, "num_train_epochs")
        for name in ("eval", "logging", "save"):
            if getattr(self, f"{name}_strategy") != "steps":
                reject_unused(f"--{name}_strategy is not steps", self, f"{name}_steps")
        if self.lr_milestones is not None:
            reason = "--lr_milestones are the schedule"
            reject_unused(reason, self, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")

    @property
    def selection(self) -> str:
        """The description, for the report, of the epoch that is kept in each stage and the metric that selects it."""
        if not self.load_best_model_at_end:
            return "last epoch of every stage"
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        return (
            f"best checkpoint by validation {metric} of every stage that is evaluated, so the validation metrics are "
            "optimistic"
        )


@cache
def _complete(kind: Any) -> Any:
    from transformers import TrainingArguments

    from kd.common.training.checks import RANGES

    if issubclass(kind, TrainingArguments):
        return kind
    body = {"__module__": kind.__module__, "__doc__": kind.__doc__, "INHERITED_RANGES": RANGES}
    return dataclass(type(kind.__name__, (kind, TrainingArguments), body))


def add_evaluation_arguments(parser: Parser, model: str, predictions: str) -> None:
    """Adds the arguments of the scripts that evaluate a saved model. `model` describes the models that are no run, and
    `predictions` the columns of the file.
    """
    parser.add_argument("model", help=f"A run (its student is evaluated), {model}.")
    parser.add_argument("--predictions", metavar="FILE", help=f"Write {predictions} to this .csv or .jsonl file.")
    parser.add_argument("--json", metavar="FILE", help="Write the metrics to this file.")


def add_changed_student_arguments(parser: Parser) -> None:
    """Adds the arguments of scripts that change the bottleneck of a student. They also have --examples."""
    parser.add_argument("model", help="A run (its student), or the folder of a student with a bottleneck.")
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="New folder for the changed student.")


def ensemble_weights() -> Any:
    """The field of the weights of several teachers. `check_ensemble_weights` checks their number."""
    return field(default=None, metadata={"help": "Weights of --teacher and of these teachers (default: equal)."})


def check_ensemble_weights(teachers: list[str], weights: list[float] | None) -> None:
    """Raises ValueError unless there is one weight for --teacher and for each of --ensemble_teachers."""
    if weights is None:
        return
    if not teachers:
        raise ValueError("--ensemble_weights needs several teachers: pass --ensemble_teachers")
    if len(weights) != len(teachers) + 1:
        raise ValueError(
            f"--ensemble_weights needs {len(teachers) + 1} weights, for --teacher and each of --ensemble_teachers, "
            f"got {len(weights)}"
        )


def only_with(script: str) -> dict[str, str]:
    """`elsewhere` of the data of scripts that do not have the flags of `TeacherOutputArguments`, as `script` has."""
    return dict.fromkeys(
        ("teacher_columns", "teacher_values"),
        f"only {script} distills from a teacher's outputs in the data; use it, or leave the flag out",
    )


@dataclass
class TeacherOutputArguments:
    """Data. Its columns with the outputs of a teacher."""

    teacher_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns with a teacher's outputs, or a pattern such as p_*."},
    )
    teacher_values: Literal["probabilities", "percentages", "log_probabilities", "logits"] | None = field(
        default=None, metadata={"help": "Numbers in --teacher_columns (default: inferred)."}
    )

    def check_unused_flags(self) -> None:
        if not self.teacher_columns:
            reject_unused("there are no --teacher_columns", self, "teacher_values")


@dataclass
class CodebookArguments:
    """Discrete key-value bottleneck."""

    codebooks: Count = field(default=32, metadata={"help": "Number of codebooks."})
    codebook_size: CodebookSize = field(default=512, metadata={"help": "Number of keys, and of values, per codebook."})
    key_dim: Count | None = field(
        default=None, metadata={"help": "Width of a key, if embeddings are projected to keys."}
    )


@dataclass
class BottleneckArguments(CodebookArguments):
    """Discrete key-value bottleneck. Keys and values."""

    keys: Keys = field(default="carried", metadata={"help": "Source of the keys."})
    split: Literal["segment", "projection"] = field(default="segment", metadata={"help": "Split of an embedding."})
    decoder: Literal["linear", "mean"] = field(default="linear", metadata={"help": "Map from values to logits."})
    value_dim: Count = field(default=16, metadata={"help": "Width of a value under --decoder linear."})
    values: Literal["trained", "counted"] = field(
        default="trained", metadata={"help": "Trained, or counts of labels."}
    )
    value_epochs: Positive = field(default=10, metadata={"help": "Epochs of training the values on cached codes."})
    value_batch_size: Count = field(default=256, metadata={"help": "Samples per training step of the values."})

    def check_unused_flags(self) -> None:
        if self.split == "segment":
            reject_unused("--split segment makes a key as wide as a segment", self, "key_dim")
        if self.decoder == "mean":
            reject_unused("--decoder mean makes a value as wide as the logits", self, "value_dim")
        if self.values == "counted":
            reject_unused("--values counted counts labels in one pass", self, "value_epochs", "value_batch_size")

    def check_training(self, training: KDTrainingArguments) -> None:
        """Raises UserError for a flag of `training` without effect, because nothing trains the student's values."""
        if self.keys == "reused":
            reject_unused("--keys reused does not train the student's values", training, "alpha", "temperature")
        if self.values == "counted":
            names = "alpha", "temperature", "value_learning_rate"
            reject_unused("--values counted counts labels and has no soft targets", training, *names)

    @property
    def has_soft_targets(self) -> bool:
        """Whether the student's values are trained on the teacher's outputs."""
        return self.keys != "reused" and self.values == "trained"

    def shape(self) -> dict[str, Any]:
        """The arguments of DiscreteKeyValueBottleneck other than its widths."""
        names = ("codebooks", "codebook_size", "split", "key_dim", "decoder", "value_dim", "values")
        return {name: getattr(self, name) for name in names}

    def value_arguments(self, rate: float) -> dict[str, Any]:
        """Training arguments of the values: learning rate `rate` for the values and a tenth of it for the decoder.
        Every sample updates the decoder, but only samples that select its key update a value.
        """
        return {
            "num_train_epochs": self.value_epochs,
            "per_device_train_batch_size": self.value_batch_size,
            "learning_rate": rate / 10,
            "value_learning_rate": rate,
        }
