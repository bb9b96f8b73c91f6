"""Arguments of the student and of a distillation run.

Nothing here imports torch, so that `--help` is quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kd.common.cli import reject_unused
from kd.common.training.arguments import CodebookArguments, CodebookSize, RunArguments
from kd.common.utils.ranges import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    ProperShare,
    check_declared,
)
from kd.reinforcement_learning.teacher_model.recipes import folder_name

Loss = Literal["kl", "nll", "mse", "huber"]
RolloutPolicy = Literal["teacher", "student", "dagger", "mixed"]


@dataclass
class StudentArguments(CodebookArguments):
    """Student, a PPO of Stable-Baselines3."""

    student: list[Count] = field(
        default_factory=lambda: [16, 16],
        metadata={"help": "Widths of the hidden layers; for frames, first that of the layer after the convolutions."},
    )
    student_value: list[Count] | None = field(
        default=None,
        metadata={"help": "Widths of the value network (default: those of --student); no width for a linear one."},
    )
    channels: list[Count] = field(
        default_factory=lambda: [16, 16, 16], metadata={"help": "Channels of the three convolutions, for frames."}
    )
    codebooks: CountOrNone = field(
        default=0,
        metadata={"help": "Number of codebooks of the student's key-value bottleneck; 0 for a plain MLP."},
    )
    codebook_size: CodebookSize = 64

    def __post_init__(self) -> None:
        check_declared(self)
        if len(self.channels) != 3:
            raise ValueError(f"--channels takes the widths of three convolutions, got {self.channels}")

    def check_unused_flags(self) -> None:
        if not self.codebooks:
            reject_unused("--codebooks is 0", self, "codebook_size", "key_dim")


@dataclass
class DistillArguments:
    """How a student is distilled."""

    rollout_policy: RolloutPolicy = field(
        default="dagger", metadata={"help": "Policy that acts while observations are collected."}
    )
    loss: Loss = field(default="kl", metadata={"help": "Loss between the action distributions."})
    steps: Count = field(default=20_000, metadata={"help": "Environment steps in total."})
    rounds: Count = field(default=10, metadata={"help": "Rounds of collecting and fitting."})
    updates: Count = field(default=200, metadata={"help": "Minibatches per round."})
    batch_size: Count = field(default=256, metadata={"help": "Observations per minibatch."})
    learning_rate: Positive = field(
        default=3e-3, metadata={"help": "Initial learning rate of Adam; it falls linearly to 0."}
    )
    value_weight: NotNegative = field(default=0.5, metadata={"help": "Weight of the loss between the values."})
    num_envs: Count = field(default=8, metadata={"help": "Environments that are stepped in parallel."})
    buffer_size: Count = field(default=1_000_000, metadata={"help": "Observations kept; the oldest are dropped."})


@dataclass
class PolicyArguments(RunArguments):
    """Environments, teachers, method and evaluation of a run."""

    environment: list[str] = field(
        default_factory=lambda: ["CartPole-v1"],
        metadata={"help": "Gymnasium ids; for several, one student body with a head for each."},
    )
    teacher: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={
            "help": "Per environment: a .zip of Stable-Baselines3, a folder, owner/name on the Hub, or `train` for a "
            "teacher that is trained once and kept."
        },
    )
    ensemble_teachers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files, folders or names on the Hub of further teachers of the one environment, whose action "
            "distributions and values are averaged with those of --teacher."
        },
    )
    vecnormalize: list[str] | None = field(
        default=None,
        metadata={
            "help": "Per environment, then per one of --ensemble_teachers: the file that VecNormalize.save wrote for "
            "the teacher, or none (default: the file that is named like the teacher)."
        },
    )
    teacher_temperature: Positive | None = field(
        default=None,
        metadata={"help": "Temperature of the teacher's logits; below 1 sharpens (default: 1, for a DQN by entropy)."},
    )
    teacher_entropy: ProperShare = field(
        default=0.1, metadata={"help": "Mean entropy of a DQN's soft actions, as a share of the maximum."}
    )
    episodes: Count = field(default=100, metadata={"help": "Episodes of the evaluation at the end."})
    eval_episodes: Count = field(default=10, metadata={"help": "Episodes of each evaluation for the curves."})
    method: Literal["kd", "ppd"] = field(
        default="kd",
        metadata={"help": "Policy distillation, or proximal policy distillation for imperfect teachers."},
    )
    teacher_weight: NotNegative = field(
        default=1.0,
        metadata={"help": "Initial weight of the teacher in proximal policy distillation; it falls linearly to 0."},
    )
    no_control: bool = field(
        default=False, metadata={"help": "Skip the student trained from reward alone, and behaviour cloning."}
    )
    trust_pickle: bool = field(
        default=False, metadata={"help": "Let Stable-Baselines3 unpickle the teacher, which can run any code."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.teacher) == 1:
            self.teacher = self.teacher * len(self.environment)
        if not self.environment or len(self.teacher) != len(self.environment):
            raise ValueError(f"pass one --teacher per --environment, got {len(self.teacher)}")
        if self.ensemble_teachers and len(self.environment) > 1:
            raise ValueError("--ensemble_teachers are teachers of one --environment: leave them out for several")
        if self.ensemble_teachers and self.method == "ppd":
            raise ValueError("--method ppd needs a single teacher: leave out --ensemble_teachers")
        statistics = len(self.environment) + len(self.ensemble_teachers)
        if self.vecnormalize is not None and len(self.vecnormalize) != statistics:
            further = " and per one of --ensemble_teachers" if self.ensemble_teachers else ""
            raise ValueError(f"pass one --vecnormalize per --environment{further}, got {len(self.vecnormalize)}")
        if self.vecnormalize is not None and "train" in self.teacher:
            raise ValueError("--vecnormalize belongs to a --teacher that is a file or folder, not to one trained here")
        if len(set(self.environment)) != len(self.environment):
            raise ValueError("each --environment once")
        if self.method == "ppd" and len(self.environment) > 1:
            raise ValueError("--method ppd distills one --environment at a time")

    def check_unused_flags(self) -> None:
        if "train" not in self.teacher:
            reject_unused("no --teacher is trained here", self, "algorithm", "teacher_steps", "hyperparameters")
        if self.teacher_temperature is not None:
            reject_unused("--teacher_temperature is set", self, "teacher_entropy")
        if self.method == "ppd":
            reject_unused(
                "--method ppd sets its loss and rollout policy", self, "loss", "rollout_policy", "value_weight"
            )
            if self.no_control:
                reason = (
                    "--method ppd trains with PPO's hyper-parameters, and --no_control leaves out behaviour cloning"
                )
                reject_unused(reason, self, "learning_rate", "updates", "batch_size", "buffer_size")
        else:
            reject_unused("--method is not ppd", self, "teacher_weight")
        super().check_unused_flags()

    def default_folder(self) -> Path:
        name = "distill" if self.method == "kd" else self.method
        return Path("runs/reinforcement-learning", f"{name}_{'+'.join(map(folder_name, self.environment))}")
