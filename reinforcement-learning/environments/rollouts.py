"""Actions in environments: collecting the observations that are met, and the returns of whole episodes."""

from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from einops import rearrange
from gymnasium import spaces
from torch import Tensor

from kd.reinforcement_learning.environments.vector import Environments, to_environment

Act = Callable[[Tensor], Tensor]  # observations (environments, ...) -> actions

TEST_SEED, VALIDATION_SEED = 10_000_000, 20_000_000  # far apart, and from the seeds of any training
PARALLEL_ENVIRONMENTS = 20


def mixture(first: Act, second: Act, share: float, generator: torch.Generator) -> Act:
    """Each environment in each step follows `first` with probability `share`, else `second` (DAgger)."""

    def act(observations: Tensor) -> Tensor:
        one, other = first(observations), second(observations)
        choice = torch.rand(len(one), generator=generator).to(one.device) < share
        return torch.where(rearrange(choice, "n -> n" + " 1" * (one.dim() - 1)), one, other)

    return act


def random_actions(space: spaces.Space) -> Act:
    """Actions drawn uniformly from the action space, the same ones each time."""
    space.seed(0)
    return lambda observations: torch.as_tensor(np.stack([space.sample() for _ in observations]))


class Recorder:
    """Steps environments and records the actions, so that a later process can bring them to the same state."""

    def __init__(self, environments: Environments) -> None:
        self.environments, self.actions = environments, list[np.ndarray]()

    def collect(self, act: Act, steps: int) -> Tensor:
        """At least `steps` steps of all environments together, and at least one; the observations that were acted on
        (rows, ...).
        """
        rows, count = [], 0
        while count < max(steps, 1):
            actions = act(torch.as_tensor(self.environments.observations))
            rows.append(self._step(to_environment(actions, self.environments.action_space)))
            count += len(rows[-1])
        return torch.cat(rows)

    def replay(self, actions: np.ndarray) -> Tensor:
        """Takes recorded actions (steps, environments, ...) again; returns what `collect` did."""
        return torch.cat([self._step(step) for step in actions])

    def _step(self, actions: np.ndarray) -> Tensor:
        """The observations that were acted on; a step that only restarts an environment adds no row."""
        rows = torch.as_tensor(self.environments.observations)[torch.as_tensor(self.environments.acting)]
        self.actions.append(actions)
        self.environments.step(actions)
        return rows


def play(act: Act, environments: Environments, episodes: int) -> tuple[np.ndarray, Tensor]:
    """Returns (episodes,) of whole episodes, and the observations acted on in them (rows, ...).

    Each environment plays an equal share of the episodes, so that short episodes are not favoured.
    """
    shares = np.full(environments.count, episodes // environments.count)
    shares[: episodes % environments.count] += 1
    running, finished, rows = np.zeros(environments.count), [], []
    while (shares > 0).any():
        observations, counts = torch.as_tensor(environments.observations), environments.acting & (shares > 0)
        rows.append(observations[torch.as_tensor(counts)])
        step = environments.step(to_environment(act(observations), environments.action_space))
        running += step.rewards * counts
        ended = (step.terminated | step.truncated) & counts
        finished += running[ended].tolist()
        running[ended], shares = 0.0, shares - ended
    return np.array(finished), torch.cat(rows)


def returns_of(act: Act, environment: str, episodes: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """`play` in new environments: returns (episodes,) and the observations met (rows, ...)."""
    with closing(Environments(environment, min(episodes, PARALLEL_ENVIRONMENTS), seed)) as environments:
        return play(act, environments, episodes)
