"""Arguments of the reinforcement-learning scripts."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from kd.common.cli import reject_unused
from kd.common.training.arguments import RunArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    ProperShare,
    Range,
    check_declared,
)
from kd.reinforcement_learning.teacher_model.recipes import TrainingRecipe, training_recipe

Algorithm = Literal["ppo", "dqn", "sac"]


@dataclass
class TeacherTraining:
    """How a teacher is trained here. Raises ValueError, one line, for what cannot be."""

    algorithm: Algorithm = field(default="ppo", metadata={"help": "of a teacher that is trained here"})
    teacher_steps: Count | None = field(
        default=None, metadata={"help": "environment steps of its training, instead of those of hyperparameters.yaml"}
    )
    hyperparameters: str | None = field(
        default=None, metadata={"help": "JSON on top of hyperparameters.yaml, such as '{\"gamma\": 0.99}'"}
    )

    def __post_init__(self) -> None:
        self.recipe("CartPole-v1")  # refuses now what is malformed

    def recipe(self, environment: str) -> TrainingRecipe:
        changes: Any = {} if self.hyperparameters is None else json.loads(self.hyperparameters)
        if not isinstance(changes, dict):
            raise ValueError(f"--hyperparameters must be a JSON object, such as '{{\"gamma\": 0.99}}', got {changes}")
        if self.teacher_steps is not None:
            changes["steps"] = self.teacher_steps
        return training_recipe(self.algorithm, environment, changes)


@dataclass
class TeacherTask:
    """Where a teacher is trained."""

    environment: str = field(default="CartPole-v1", metadata={"help": "Gymnasium's id"})
    episodes: Count = field(default=100, metadata={"help": "of evaluation at the end"})
    watch_episodes: Count = field(default=10, metadata={"help": "of each evaluation for the curves"})


@dataclass
class StudentArguments:
    """What the student is: always a PPO of Stable-Baselines3."""

    student: list[Count] = field(
        default_factory=lambda: [16, 16],
        metadata={"help": "widths of its hidden layers; of frames, first that of the layer behind the convolutions"},
    )
    student_value: list[Count] | None = field(
        default=None, metadata={"help": "of its value network (default: the same); nothing for one linear layer"}
    )
    channels: list[Count] = field(
        default_factory=lambda: [16, 16, 16], metadata={"help": "of its three convolutions, where it sees frames"}
    )
    codebooks: CountOrNone = field(
        default=0, metadata={"help": "of a key-value bottleneck that its layers are put behind; 0 for none"}
    )
    pairs: Annotated[int, Range(1, 2**16)] = field(default=64, metadata={"help": "of key and value in each codebook"})
    key_dim: Count | None = field(
        default=None, metadata={"help": "width of a key (default: that of an observation divided by --codebooks)"}
    )

    def __post_init__(self) -> None:
        check_declared(self)
        if len(self.channels) != 3:
            raise ValueError(f"--channels takes the widths of three convolutions, got {self.channels}")

    def check_unused_flags(self) -> None:
        if not self.codebooks:
            reject_unused("--codebooks is 0", self, "pairs", "key_dim")

    def check(self, environment: str, observations: spaces.Space) -> None:
        """Raises UserError where such a student cannot see what an environment shows."""
        if not is_image_space(observations):
            reject_unused(f"{environment} shows no frames", self, "channels")
        if is_image_space(observations) and not self.student:
            raise UserError(f"{environment} shows frames: give --student the width of the layer behind convolutions")
        if self.codebooks and len(observations.shape or ()) != 1:
            raise UserError(
                f"a key-value bottleneck looks up vectors, and {environment} shows observations of shape "
                f"{observations.shape}: leave out --codebooks"
            )


@dataclass
class ExperimentArguments(RunArguments):
    """What is distilled, how often, and how it is judged."""

    environment: list[str] = field(
        default_factory=lambda: ["CartPole-v1"],
        metadata={"help": "Gymnasium's ids; of several, one student body with a head for each is distilled"},
    )
    teacher: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={
            "help": "per environment: a .zip of Stable-Baselines3, a folder, owner/name on the Hub, or `train`: "
            "trained here unless it was before"
        },
    )
    vecnormalize: list[str] | None = field(
        default=None,
        metadata={
            "help": "per environment: the file that VecNormalize.save wrote for the teacher, or none (default: the "
            "file next to it that is named like it)"
        },
    )
    teacher_temperature: Positive | None = field(
        default=None, metadata={"help": "of the teacher's logits; below 1 sharpens (default: 1, of a DQN by entropy)"}
    )
    teacher_entropy: ProperShare = field(
        default=0.1, metadata={"help": "of a DQN's soft actions, as a share of the greatest possible"}
    )
    episodes: Count = field(default=100, metadata={"help": "of evaluation at the end"})
    watch_episodes: Count = field(default=10, metadata={"help": "of each evaluation for the curves"})
    method: Literal["distill", "ppd"] = field(
        default="distill",
        metadata={
            "help": "ppd: proximal policy distillation, for teachers that can be passed; of the flags of distilling "
            "it takes --steps alone"
        },
    )
    teacher_weight: NotNegative = field(
        default=1.0,
        metadata={"help": "of the teacher at the start of proximal policy distillation; it falls linearly to 0"},
    )
    no_control: bool = field(
        default=False, metadata={"help": "skip the same student from reward alone and the behaviour cloning"}
    )
    trust_pickle: bool = field(
        default=False, metadata={"help": "let Stable-Baselines3 unpickle the teacher, which can run any code"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.teacher) == 1:
            self.teacher = self.teacher * len(self.environment)
        if not self.environment or len(self.teacher) != len(self.environment):
            raise ValueError(f"give one --teacher per --environment, got {len(self.teacher)}")
        if self.vecnormalize is not None and len(self.vecnormalize) != len(self.environment):
            raise ValueError(f"give one --vecnormalize per --environment, got {len(self.vecnormalize)}")
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
            reject_unused("--teacher_temperature is given", self, "teacher_entropy")
        if self.method == "ppd":
            reject_unused("--method ppd sets its loss and its driver", self, "loss", "driver", "value_weight")
            if self.no_control:
                reason = (
                    "--method ppd trains with PPO's hyper-parameters, and --no_control leaves out behaviour cloning"
                )
                reject_unused(reason, self, "learning_rate", "updates", "batch_size", "buffer_size")
        else:
            reject_unused("--method is not ppd", self, "teacher_weight")
        super().check_unused_flags()
