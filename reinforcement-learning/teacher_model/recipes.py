"""How each algorithm is trained on each environment: rows of hyperparameters.yaml as constructor keywords."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

TABLE = Path(__file__).with_name("hyperparameters.yaml")
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "dqn": DQN, "sac": SAC}


@dataclass(frozen=True)
class TrainingRecipe:
    """`steps` of all `environments` together; `normalize`: observations and rewards, by VecNormalize."""

    algorithm: str
    steps: int
    environments: int
    normalize: bool
    keywords: dict[str, Any]


def training_recipe(algorithm: str, environment: str, changes: dict[str, Any] | None = None) -> TrainingRecipe:
    """The row of an environment (that of ALE for every Atari game, else the default), with `changes` on top.

    Raises ValueError for what the algorithm does not take or a student could not match, and for an activation function
    that torch.nn does not have.
    """
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))[algorithm]
    family = "ALE" if environment.startswith("ALE/") else "default"
    row = dict(rows.get(environment) or rows.get(family) or rows["default"]) | (changes or {})
    _check(algorithm, row)
    steps, count, normalize = int(row.pop("steps")), int(row.pop("environments")), bool(row.pop("normalize", False))
    return TrainingRecipe(
        algorithm, steps, count, normalize, {name: _value(name, value) for name, value in row.items()}
    )


def _check(algorithm: str, row: dict[str, Any]) -> None:
    known = [*inspect.signature(ALGORITHMS[algorithm]).parameters, "steps", "environments", "normalize"]
    for name in row.keys() - set(known):
        near = get_close_matches(name, known, n=1)
        raise ValueError(f"{algorithm} has no hyper-parameter {name}{f'; did you mean {near[0]}?' if near else ''}")
    if row.get("use_sde"):
        raise ValueError("state-dependent exploration (use_sde) is not supported: leave it out")
    if not isinstance(row.get("policy_kwargs", {}), dict):
        raise ValueError(f"policy_kwargs must be an object of keywords, got {row['policy_kwargs']!r}")


def _value(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.startswith("linear_"):
        return linear(float(value.removeprefix("linear_")))
    if name == "policy_kwargs" and isinstance(value.get("activation_fn"), str):
        activation = getattr(torch.nn, value["activation_fn"], None)
        if activation is None:
            raise ValueError(f"torch.nn has no activation function {value['activation_fn']}")
        return value | {"activation_fn": activation}
    return value


def linear(start: float) -> Callable[[float], float]:
    """A schedule of the share of training that remains: from `start` to 0, and 0 beyond, as the last rollout ends
    after the steps that were asked for.
    """

    def schedule(remaining: float) -> float:
        return start * max(0.0, remaining)

    return schedule
