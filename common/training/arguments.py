"""Arguments of a distillation run: all of transformers' TrainingArguments and what distillation adds."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from kd.common.cli import reject_unused
from kd.common.training.checks import RANGES, check_optimizer, check_report_to, check_supported
from kd.common.utils.devices import resolve_precision
from kd.common.utils.ranges import Positive, Range, Seed, Share, check_declared

SEEDS_HELP = "seeds of several runs, such as 0,1,2, whose mean and standard deviation are reported"


def check_seeds(args: Any) -> None:
    """Raises ValueError for a seed that is named twice in `args.seeds`. The first seed also trains what all share."""
    seeds: list[int] | None = args.seeds
    if seeds is None:
        return
    if not seeds:
        raise ValueError("--seeds must name at least one seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be different seeds, each named once, got {', '.join(map(str, seeds))}")
    args.seed = seeds[0]


@dataclass
class RunArguments:
    """What every run must know, for those that transformers' Trainer does not train."""

    output_dir: str | None = field(
        default=None, metadata={"help": "where the run's folder is made (default: runs/<domain>/<name>)"}
    )
    seed: Seed = field(default=0, metadata={"help": "of everything random in the run"})
    seeds: list[Seed] | None = field(default=None, metadata={"help": SEEDS_HELP})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start over in an output folder that holds an earlier run"}
    )
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "continue the run in the output folder where it stopped"}
    )
    precision: ClassVar[Literal["fp32"]] = "fp32"

    def __post_init__(self) -> None:
        check_declared(self)
        check_seeds(self)

    def check_unused_flags(self) -> None:
        """Raises UserError for a flag of the command line that another flag leaves without effect."""
        if self.seeds:
            reject_unused("--seeds is set", self, "seed")


@dataclass
class KDTrainingArguments(TrainingArguments):
    """Everything about training that is not about one domain. Raises ValueError, one line, for what cannot be."""

    INHERITED_RANGES: ClassVar[dict[str, Range]] = RANGES

    alpha: Share = field(
        default=0.5, metadata={"help": "weight of the labels' loss; the teacher's soft targets get 1 - alpha"}
    )
    temperature: Positive = field(default=2.0, metadata={"help": "softens teacher's and student's logits alike"})
    value_learning_rate: Positive | None = field(
        default=None, metadata={"help": "learning rate of a bottleneck's values; default: --learning_rate"}
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "where curves go as they grow: tensorboard, none, wandb, ..."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    logging_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep of a running stage"})
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = field(
        default="group_by_length", metadata={"help": "group_by_length for little padding"}
    )
    remove_unused_columns: bool = False  # `sample_id` is no argument of any model
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    logging_nan_inf_filter: bool = False  # the trainer stops on a loss that is not finite instead of hiding it
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 a share of all steps"})
    lr_milestones: list[Positive] | None = field(
        default=None, metadata={"help": "epochs after which the learning rate falls to a tenth, instead of a schedule"}
    )
    decay_norm_and_bias: bool = field(
        default=False, metadata={"help": "weight decay on biases and norms too, as older protocols have it"}
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto", metadata={"help": "auto: bf16 where the hardware computes it natively, else fp32"}
    )
    seeds: list[Seed] | None = field(default=None, metadata={"help": SEEDS_HELP})
    no_control: bool = field(
        default=False, metadata={"help": "skip the same student trained without the teacher (not recommended)"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start over in an output folder that holds an earlier run"}
    )
    resume_from_checkpoint: bool = field(  # type: ignore[assignment]
        default=False, metadata={"help": "continue the run in the output folder where it stopped"}
    )

    def __post_init__(self) -> None:
        check_declared(self)
        check_seeds(self)
        if self.lr_milestones is not None and self.max_steps > 0:
            raise ValueError("--lr_milestones are epochs: give --num_train_epochs, not --max_steps")
        if self.lr_milestones is not None and sorted(set(self.lr_milestones)) != self.lr_milestones:
            raise ValueError(f"--lr_milestones must be in order, each once, got {self.lr_milestones}")
        cuda = torch.cuda.is_available() and not self.use_cpu
        self.precision = resolve_precision(self.precision, torch.device("cuda" if cuda else "cpu"))
        check_supported(self)
        self.bf16, self.use_cpu = self.precision == "bf16", not cuda
        super().__post_init__()
        self.do_eval = False  # what the parent derives, and nothing here reads
        check_report_to(self)
        check_optimizer(self)
        if self.load_best_model_at_end and str(self.metric_for_best_model).endswith("loss"):
            raise ValueError(
                "--load_best_model_at_end needs --metric_for_best_model with a metric of the report (and, where less "
                "of it is better, --greater_is_better false): there is no loss on validation"
            )

    def check_unused_flags(self) -> None:
        """Raises UserError for a flag of the command line that another flag leaves without effect."""
        if self.seeds:
            reject_unused("--seeds is set", self, "seed")
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
        """For the report: which epoch of its stages was kept, and by which metric."""
        if not self.load_best_model_at_end:
            return "last epoch of every stage; no split chose anything"
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        return (
            f"best checkpoint by {metric} of every stage that is validated; validation chose, so its figures flatter"
        )
