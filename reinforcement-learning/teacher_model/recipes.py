"""Arguments of teacher training, and the hyper-parameters of each algorithm and environment.

The rows of hyperparameters.yaml are keyword arguments of the algorithms' constructors. torch and Stable-Baselines3 are
imported inside of functions, so that `--help` is fast.
"""

import inspect
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from kd.common.training.arguments import RunArguments
from kd.common.training.trackers import check_trackers
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Range
from kd.reinforcement_learning.data.environment_ids import parse_id, parse_wrappers

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

TABLE = Path(__file__).with_name("hyperparameters.yaml")
# Keyword arguments that are not hyper-parameters, or cannot be written as JSON.
RESERVED = {"policy", "env", "seed", "device", "verbose", "tensorboard_log", "stats_window_size", "_init_setup_model"}
RESERVED |= {f"{kind}_buffer_{part}" for kind in ("rollout", "replay") for part in ("class", "kwargs")}
RESERVED |= {"action_noise", "sde_sample_freq", "use_sde_at_warmup"}
MOST = 10**12  # steps or rows
RANGES: dict[str, tuple[type[int] | type[float], Range]] = {
    "environments": (int, Range(1, 4096)),
    "learning_starts": (int, Range(0, MOST)),
    "gradient_steps": (int, Range(1, MOST, or_else=-1)),
    **dict.fromkeys(("steps", "n_steps", "n_epochs", "batch_size", "buffer_size"), (int, Range(1, MOST))),
    **dict.fromkeys(("target_update_interval", "train_freq"), (int, Range(1, MOST))),
    **dict.fromkeys(("learning_rate", "clip_range", "clip_range_vf", "max_grad_norm"), (float, Range(0, above=True))),
    **dict.fromkeys(("target_kl", "ent_coef", "vf_coef"), (float, Range(0))),
    **dict.fromkeys(("gamma", "gae_lambda"), (float, Range(0, 1))),
    "tau": (float, Range(0, 1, above=True)),
    **{f"exploration_{part}": (float, Range(0, 1)) for part in ("fraction", "initial_eps", "final_eps")},
}
OPTIONAL = {"clip_range_vf", "target_kl"}  # may be null
SCHEDULES = {"learning_rate", "clip_range", "clip_range_vf"}  # may be linear_X


@dataclass
class TeacherArguments:
    """Teacher training. Raises ValueError with one line for invalid hyper-parameters."""

    algorithm: Literal["ppo", "dqn", "sac"] = field(
        default="ppo", metadata={"help": "Algorithm that trains the teacher."}
    )
    teacher_steps: Count | None = field(
        default=None,
        metadata={
            "help": "Number of environment steps of the teacher's training (default: that of hyperparameters.yaml)."
        },
    )
    hyperparameters: str | None = field(
        default=None,
        metadata={"help": "JSON object that overrides values of hyperparameters.yaml, such as '{\"gamma\": 0.99}'."},
    )

    def __post_init__(self) -> None:
        self.recipe("CartPole-v1")  # raises for malformed values

    def recipe(self, environment: str) -> "TrainingRecipe":
        changes = json_object("--hyperparameters", self.hyperparameters) or {}
        if self.teacher_steps is not None:
            changes["steps"] = self.teacher_steps
        return training_recipe(self.algorithm, environment, changes)

    def folder(self, environment: str) -> Path:
        """The default --output_dir of train_teacher.py."""
        return Path("runs/reinforcement-learning", f"teacher_{folder_name(environment)}_{self.algorithm}")


@dataclass
class TeacherTask:
    """Environment."""

    environment: str = field(default="CartPole-v1", metadata={"help": "Gymnasium id of the environment."})


@dataclass
class EnvironmentArguments:
    """Environment."""

    import_module: list[str] = field(default_factory=list, metadata={"help": "Modules that register environments."})
    env_kwargs: str | None = field(default=None, metadata={"help": "JSON object of the environment's arguments."})
    wrapper: list[str] = field(
        default_factory=list,
        metadata={"help": 'Wrappers: time_feature, frame_stack{"n": 4}, or module:Class.'},
    )

    def __post_init__(self) -> None:
        self.environment_arguments()  # raises for malformed values
        parse_wrappers("--wrapper", self.wrapper)

    def environment_arguments(self) -> dict[str, Any] | None:
        """The value of --env_kwargs. Raises ValueError unless it is a JSON object."""
        return json_object("--env_kwargs", self.env_kwargs)


@dataclass
class PolicyRunArguments(EnvironmentArguments, RunArguments):
    """Run."""

    episodes: Count = field(default=100, metadata={"help": "Number of episodes of the final evaluation."})
    eval_episodes: Count = field(
        default=10, metadata={"help": "Number of episodes of each evaluation during training."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Trackers: tensorboard, wandb, none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        RunArguments.__post_init__(self)
        check_trackers(self.report_to)


def json_object(flag: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object that a flag takes; None without one. Raises ValueError for other values."""
    value = None if text is None else json.loads(text)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object, such as '{{\"gamma\": 0.99}}', got {value}")
    return value


@dataclass(frozen=True)
class TrainingRecipe:
    """`steps`: total over all `environments`. `normalize`: VecNormalize normalizes observations and rewards.
    `keywords`: the other arguments of the algorithm.
    """

    algorithm: str
    steps: int
    environments: int
    normalize: bool
    keywords: dict[str, Any]


def algorithm_class(algorithm: str) -> "type[BaseAlgorithm]":
    from stable_baselines3 import DQN, PPO, SAC

    classes: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "dqn": DQN, "sac": SAC}
    return classes[algorithm]


def folder_name(environment: str) -> str:
    """The id of an environment as part of a path."""
    return re.sub(r"[^\w.-]+", "-", environment).strip("-")


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    """Algorithm -> environment -> its row of hyperparameters.yaml."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def training_recipe(algorithm: str, environment: str, changes: dict[str, Any] | None = None) -> TrainingRecipe:
    """The row of an environment or of another version of it, of ALE for an Atari game, or the default; `changes`
    override it.

    Raises ValueError for unknown and unsupported hyper-parameters, and for values out of range.
    """
    rows, environment = _table()[algorithm], parse_id(environment).name
    family = "ALE" if environment.startswith("ALE/") else "default"
    versions = {re.sub(r"-v\d+$", "", name): row for name, row in rows.items()}
    found = rows.get(environment) or versions.get(re.sub(r"-v\d+$", "", environment)) or rows.get(family)
    row = deepcopy(found or rows["default"]) | (changes or {})
    _check(algorithm, row)
    keywords = {name: _value(name, value) for name, value in row.items()}
    steps, count, normalize = keywords.pop("steps"), keywords.pop("environments"), keywords.pop("normalize", False)
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize must be true or false, got {normalize!r}")
    return TrainingRecipe(algorithm, steps, count, normalize, keywords)


def check_steps(recipe: TrainingRecipe) -> None:
    """Raises UserError if a recipe has too few steps for an update, or if the batch size of PPO does not divide its
    rollouts.
    """
    defaults = inspect.signature(algorithm_class(recipe.algorithm)).parameters
    keywords = {name: parameter.default for name, parameter in defaults.items()} | recipe.keywords
    if keywords.get("learning_starts", 0) >= recipe.steps:
        raise UserError(
            f"learning_starts is {keywords['learning_starts']}, and the training has {recipe.steps} steps: raise "
            "--teacher_steps or lower learning_starts"
        )
    if recipe.algorithm != "ppo":
        return
    rollout, batch_size = keywords["n_steps"] * recipe.environments, keywords["batch_size"]
    text = f"a rollout is n_steps * environments = {keywords['n_steps']} * {recipe.environments} = {rollout} steps"
    if rollout > recipe.steps:
        raise UserError(f"{text}, and the training has {recipe.steps}: raise --teacher_steps or lower n_steps")
    if batch_size < rollout and rollout % batch_size:
        raise UserError(f"{text}, which batch_size {batch_size} does not divide: choose one that does")


def _check(algorithm: str, row: dict[str, Any]) -> None:
    parameters = [*inspect.signature(algorithm_class(algorithm)).parameters, "steps", "environments", "normalize"]
    known = [name for name in parameters if name not in RESERVED]
    for name in row.keys() - set(known):
        near = get_close_matches(name, known, n=1)
        raise ValueError(f"{algorithm} has no hyper-parameter {name}{f'; did you mean {near[0]}?' if near else ''}")
    if row.get("use_sde"):
        raise ValueError("state-dependent exploration (use_sde) is not supported: leave it out")
    if not isinstance(row.get("policy_kwargs", {}), dict):
        raise ValueError(f"policy_kwargs must be an object of keyword arguments, got {row['policy_kwargs']!r}")
    for name, value in row.items():
        automatic = algorithm == "sac" and name == "ent_coef" and str(value).startswith("auto")
        if name in RANGES and not automatic and (required := _violated_range(name, value)):
            raise ValueError(f"invalid hyper-parameters of {algorithm}: {name} must be {required}, got {value!r}")


def _violated_range(name: str, value: Any) -> str | None:
    """Describes the values that a number may have; None if `value` is one of them."""
    kind, limits = RANGES[name]
    if value is None and name in OPTIONAL:
        return None
    if name in SCHEDULES and isinstance(value, str) and value.startswith("linear_"):
        try:
            value = float(value.removeprefix("linear_"))
        except ValueError:
            return "a number or linear_NUMBER"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value in limits and (kind is float or value == int(value)):
        return None
    return f"a {'finite' if kind is float else 'whole'} number, {limits}"


def _value(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.startswith("linear_"):
        return linear(float(value.removeprefix("linear_")))
    if name in RANGES and RANGES[name][0] is int:
        return int(value)
    if name == "policy_kwargs" and isinstance(value.get("activation_fn"), str):
        import torch

        activation = getattr(torch.nn, value["activation_fn"], None)
        if not (isinstance(activation, type) and issubclass(activation, torch.nn.Module)):
            raise ValueError(f"torch.nn has no activation function {value['activation_fn']}")
        return value | {"activation_fn": activation}
    return value


def linear(start: float) -> Callable[[float], float]:
    """A schedule of the remaining share of training, from `start` to 0. The share is negative in a last rollout that
    ends after the last step.
    """

    def schedule(remaining: float) -> float:
        return start * max(0.0, remaining)

    return schedule
