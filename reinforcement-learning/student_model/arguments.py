"""Arguments of the student and of a distillation run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from kd.common.cli import reject_unused
from kd.common.training.arguments import CodebookSize, RunArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    ProperShare,
    check_declared,
)
from kd.reinforcement_learning.data.environments import folder_name


@dataclass
class StudentArguments:
    """The student, a PPO of Stable-Baselines3."""

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
    codebook_size: CodebookSize = field(default=64, metadata={"help": "Keys, and values, of each codebook."})
    key_dim: Count | None = field(
        default=None, metadata={"help": "Width of a key (default: that of an observation divided by --codebooks)."}
    )

    def __post_init__(self) -> None:
        check_declared(self)
        if len(self.channels) != 3:
            raise ValueError(f"--channels takes the widths of three convolutions, got {self.channels}")

    def check_unused_flags(self) -> None:
        if not self.codebooks:
            reject_unused("--codebooks is 0", self, "codebook_size", "key_dim")

    def check(self, environment: str, observations: spaces.Space) -> None:
        """Raises UserError for a student that does not fit the observations of an environment."""
        if not is_image_space(observations):
            reject_unused(f"{environment} shows no frames", self, "channels")
        if is_image_space(observations) and not self.student:
            raise UserError(f"{environment} shows frames: pass --student the width after the convolutions")
        if self.codebooks and len(observations.shape or ()) != 1:
            raise UserError(
                f"a key-value bottleneck takes vectors, and {environment} shows observations of shape "
                f"{observations.shape}: leave out --codebooks"
            )


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
    method: Literal["distill", "ppd"] = field(
        default="distill",
        metadata={
            "help": "ppd: proximal policy distillation, for imperfect teachers; of the flags of distillation it uses "
            "--steps only."
        },
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
        return Path("runs/reinforcement-learning", f"{self.method}_{'+'.join(map(folder_name, self.environment))}")
