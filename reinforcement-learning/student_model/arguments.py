"""Arguments of the student and of a distillation run.

This module does not import torch, so that `--help` is fast.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from kd.common.cli import reject_unused
from kd.common.training.arguments import (
    CodebookArguments,
    CodebookSize,
    check_ensemble_weights,
    ensemble_weights,
)
from kd.common.utils.ranges import (
    FINITE,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    ProperShare,
    Share,
    check_declared,
)
from kd.reinforcement_learning.data.environment_ids import Part, student_wrappers
from kd.reinforcement_learning.teacher_model.recipes import PolicyRunArguments, folder_name

Loss = Literal["kl", "nll", "mse", "huber"]
RolloutPolicy = Literal["teacher", "student", "dagger", "mixed"]


@dataclass
class StudentArguments(CodebookArguments):
    """Student, a PPO model of Stable-Baselines3."""

    student: list[Count] = field(
        default_factory=lambda: [16, 16],
        metadata={"help": "Widths of the hidden layers; for frames, the first is the layer after the convolutions."},
    )
    student_share: ProperShare | None = field(
        default=None,
        metadata={
            "help": "Instead of --student: two hidden layers of equal width, with at most this share of the "
            "parameters of the teacher's actor."
        },
    )
    student_value: list[Count] | None = field(
        default=None,
        metadata={
            "help": "Widths of the hidden layers of the value network (default: --student); none for a linear one."
        },
    )
    channels: list[Count] = field(
        default_factory=lambda: [16, 16, 16],
        metadata={"help": "Channels of the convolutions, for frames."},
    )
    codebooks: CountOrZero = field(
        default=0,
        metadata={"help": "Number of codebooks of the bottleneck; 0 for a plain MLP."},
    )
    codebook_size: CodebookSize = 64
    student_observation: list[str] = field(
        default_factory=list,
        metadata={"help": "Indices (0 2-5), keys or wrappers of the student's observations (default: all)."},
    )
    frame_stack: Count = field(default=1, metadata={"help": "Number of last observations that it gets."})

    def __post_init__(self) -> None:
        check_declared(self)
        self.view()  # raises for malformed values
        if len(self.channels) != 3:
            raise ValueError(f"--channels takes the widths of three convolutions, got {self.channels}")

    def view(self) -> tuple[Part, ...]:
        """The wrappers that make the student's observations of the teacher's."""
        return student_wrappers(self.student_observation, self.frame_stack)

    def check_unused_flags(self) -> None:
        if self.student_share is not None:
            reject_unused("--student_share sets the widths of an MLP", self, "student", "codebooks")
        if not self.codebooks:
            reject_unused("--codebooks is 0", self, "codebook_size", "key_dim")


@dataclass
class DistillArguments:
    """Distillation."""

    rollout_policy: RolloutPolicy = field(
        default="dagger", metadata={"help": "Policy that selects the actions while observations are collected."}
    )
    greedy_share: Share = field(
        default=0.0, metadata={"help": "Share of the environments where the student acts greedily."}
    )
    loss: Loss = field(default="kl", metadata={"help": "Loss between the action distributions."})
    steps: Count = field(default=20_000, metadata={"help": "Total number of environment steps."})
    rounds: Count = field(default=10, metadata={"help": "Number of rounds of collecting and training."})
    updates: Count = field(default=100, metadata={"help": "Number of update steps per round."})
    batch_size: Count = field(default=256, metadata={"help": "Number of observations per update step."})
    learning_rate: Positive = field(default=3e-3, metadata={"help": "Initial learning rate of Adam; it falls to 0."})
    value_weight: NotNegative = field(
        default=0.5, metadata={"help": "Weight of the loss between the teacher's and the student's values."}
    )
    num_envs: Count = field(default=8, metadata={"help": "Number of parallel environments."})
    buffer_size: Count = field(default=1_000_000, metadata={"help": "Maximum number of observations to keep."})


@dataclass
class PolicyArguments(PolicyRunArguments):
    """Environment, teacher and method."""

    environment: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Gymnasium ids; several give a student with a head for each (default: the teachers', or "
            "CartPole-v1)."
        },
    )
    teacher: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={
            "help": "Teacher of each environment: a .zip of Stable-Baselines3, a folder, owner/name on the Hub, or "
            "`train`."
        },
    )
    ensemble_teachers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Further teachers of a single environment, whose outputs are averaged with the first one's."
        },
    )
    ensemble_weights: list[Positive] | None = ensemble_weights()
    vecnormalize: list[str] | None = field(
        default=None,
        metadata={
            "help": "VecNormalize file, or none, for each --teacher, then for each of --ensemble_teachers (default: "
            "the file named like the teacher)."
        },
    )
    teacher_return: list[Annotated[float, FINITE]] | None = field(
        default=None, metadata={"help": "Published return of each --teacher, to compare."}
    )
    teacher_temperature: Positive | None = field(
        default=None,
        metadata={"help": "Temperature of the teacher's logits (default: 1; for a DQN, set by --teacher_entropy)."},
    )
    teacher_entropy: ProperShare = field(
        default=0.1, metadata={"help": "Mean entropy of a DQN's action probabilities, as a share of the maximum."}
    )
    method: Literal["kd", "ppd"] = field(
        default="kd",
        metadata={
            "help": "Policy distillation (kd), or proximal policy distillation (ppd), which also uses the reward; of "
            "the distillation flags, ppd uses only --steps."
        },
    )
    teacher_weight: NotNegative = field(
        default=1.0,
        metadata={"help": "Initial weight of the teacher with ppd; it falls to 0."},
    )
    no_control: bool = field(
        default=False, metadata={"help": "Skip the control, trained from reward alone, and behaviour cloning."}
    )
    control_cpu_time: bool = field(
        default=False, metadata={"help": "Also train a control for as much CPU time as the student."}
    )
    trust_pickle: bool = field(
        default=False, metadata={"help": "Let Stable-Baselines3 unpickle the teacher, which can run any code."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.teacher) == 1:
            self.teacher = self.teacher * max(len(self.environment), 1)
        count = len(self.environment or self.teacher)
        if len(self.teacher) != count:
            raise ValueError(f"pass one --teacher per --environment, got {len(self.teacher)}")
        if self.teacher_return is not None and len(self.teacher_return) != count:
            raise ValueError(f"pass one --teacher_return per --environment, got {len(self.teacher_return)}")
        if self.ensemble_teachers and count > 1:
            raise ValueError("--ensemble_teachers supports a single --environment: leave it out for several")
        if self.ensemble_teachers and self.method == "ppd":
            raise ValueError("--method ppd needs a single teacher: leave out --ensemble_teachers")
        check_ensemble_weights(self.ensemble_teachers, self.ensemble_weights)
        statistics = count + len(self.ensemble_teachers)
        if self.vecnormalize is not None and len(self.vecnormalize) != statistics:
            further = " and one for each of --ensemble_teachers" if self.ensemble_teachers else ""
            raise ValueError(f"pass one --vecnormalize for each --environment{further}, got {len(self.vecnormalize)}")
        if self.vecnormalize is not None and "train" in self.teacher:
            raise ValueError(
                "--vecnormalize applies to a --teacher that is a file or folder: leave it out for --teacher train"
            )
        if len(set(self.environment)) != len(self.environment):
            raise ValueError("--environment has the same id twice: name each environment once")
        if self.method == "ppd" and count > 1:
            raise ValueError("--method ppd distills one --environment at a time")

    def check_unused_flags(self) -> None:
        if "train" not in self.teacher:
            reject_unused("no --teacher is trained here", self, "algorithm", "teacher_steps", "hyperparameters")
        if self.no_control:
            reject_unused("--no_control leaves out every control", self, "control_cpu_time")
        if self.teacher_temperature is not None:
            reject_unused("--teacher_temperature is set", self, "teacher_entropy")
        if self.method == "ppd":
            names = ("loss", "rollout_policy", "greedy_share", "value_weight")
            reject_unused("--method ppd sets its loss and rollout policy", self, *names)
            if self.no_control:
                reason = (
                    "--method ppd trains with PPO's hyper-parameters, and --no_control leaves out behaviour cloning"
                )
                reject_unused(reason, self, "learning_rate", "updates", "batch_size", "buffer_size")
        else:
            reject_unused("--method is not ppd", self, "teacher_weight")
        super().check_unused_flags()

    def default_folder(self, environments: list[str]) -> Path:
        """`environments`: those of the students."""
        name = "distill" if self.method == "kd" else self.method
        return Path("runs/reinforcement-learning", f"{name}_{'+'.join(map(folder_name, environments))}")
