"""What a policy is worth in its environment, and how often it does what the teacher would do."""

from contextlib import closing
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kd.common import losses
from kd.common.metrics.chance import guessing_warning
from kd.common.metrics.classification import agreement
from kd.common.metrics.cost import cost
from kd.common.metrics.returns import return_metrics
from kd.reinforcement_learning.data.observations import tell
from kd.reinforcement_learning.data.playing import Act, at_random, greedy, play, sampling
from kd.reinforcement_learning.environments.vector import Environments
from kd.reinforcement_learning.teacher_model.agent import Agent

TEST_SEED, VALIDATION_SEED = 10_000_000, 20_000_000  # far apart, and from the seeds of any training
SIDE_BY_SIDE = 20  # environments
STATES = 20_000  # on which student and teacher are compared


def returns_of(act: Act, environment: str, episodes: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """Returns (episodes,) of new environments, and the observations met (rows, ...)."""
    with closing(Environments(environment, min(episodes, SIDE_BY_SIDE), seed)) as environments:
        return play(act, environments, episodes)


def random_metrics(environment: str, action_space: spaces.Space, episodes: int) -> dict[str, Any]:
    """`return_metrics` of actions at random: no skill at all."""
    return return_metrics(returns_of(at_random(action_space, 0), environment, episodes, TEST_SEED)[0])


def random_return(environment: str, action_space: spaces.Space, episodes: int) -> float:
    """Mean return of actions at random."""
    return float(random_metrics(environment, action_space, episodes)["return_mean"])


def random_warning(name: str, teacher: dict[str, Any], random: dict[str, Any]) -> str | None:
    """The warning where a teacher is no better than random actions; arguments are its `return_metrics` and theirs."""
    own, guess = teacher["return_mean"], random["return_mean"]
    error = sum(metrics["return_std"] ** 2 / metrics["episodes"] for metrics in (teacher, random)) ** 0.5
    if own <= guess or guessing_warning(name, "mean return", own, guess, "random actions", error) is None:
        return guessing_warning(name, "mean return", own, guess, "random actions")
    return (
        f"teacher {name} is not clearly better than random actions: its mean return is {own:.4g}, theirs {guess:.4g}, "
        f"in {teacher['episodes']} episodes; the standard error of the difference is {error:.3g}"
    )


def evaluate(agent: Agent, environment: str, episodes: int, teacher: nn.Module | None = None) -> dict[str, Any]:
    """An agent's entry in results.json: greedy returns, the mean return of sampled actions, its likeness to a teacher
    on the states that it meets itself, and what it costs to act.
    """
    network = agent.network()
    returns, met = returns_of(greedy(network), environment, episodes, TEST_SEED)
    generator = torch.Generator().manual_seed(0)
    sampled, _ = returns_of(sampling(network, generator), environment, episodes, TEST_SEED)
    metrics: dict[str, Any] = return_metrics(returns) | {"return_mean_sampled": float(sampled.mean())}
    if teacher is not None:
        states = met[torch.randperm(len(met), generator=generator)[:STATES]]
        metrics |= likeness(tell(network, states), tell(teacher, states), agent.policy.action_space)
    batch = met[:1].to(next(network.parameters()).device)
    acting = cost(network, {"observations": batch, "value": False})
    return {"name": agent.name, "observation_statistics": agent.source} | acting | {"metrics": {"test": metrics}}


def likeness(own: dict[str, Tensor], teacher: dict[str, Tensor], space: spaces.Space) -> dict[str, float]:
    """`agreement`: the share of states with the same greedy action or, of Box actions, 1 - mean |difference| / range;
    and KL(teacher || own) where both have a distribution. Arguments are what `tell` gives for the same states.
    """
    if isinstance(space, spaces.Discrete):
        divergence = losses.soft_target_kl(own["logits"], teacher["logits"])
        return {"agreement": agreement(own["logits"].numpy(), teacher["logits"].numpy()), "kl": divergence.item()}
    assert isinstance(space, spaces.Box)
    ours, theirs = (np.clip(said["mean"].numpy(), space.low, space.high) for said in (own, teacher))
    alike = {"agreement": 1 - float(np.mean(np.abs(ours - theirs) / (space.high - space.low)))}
    if "log_std" in own and "log_std" in teacher:
        divergence = losses.gaussian_kl(own["mean"], own["log_std"], teacher["mean"], teacher["log_std"])
        alike["kl"] = divergence.item()
    return alike
