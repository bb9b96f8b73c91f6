"""Policies in environments: collecting the observations that they meet, and the returns that they reach."""

from collections.abc import Callable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.environments.vector import Environments
from kd.reinforcement_learning.teacher_model.policies import environment_actions, greedy_actions, sampled_actions

Act = Callable[[Tensor], Tensor]  # observations (environments, ...) -> actions


def greedy(network: nn.Module) -> Act:
    """The likeliest action."""

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return greedy_actions(_print_error(network, observations))

    return act


def sampling(network: nn.Module, generator: torch.Generator) -> Act:
    """An action drawn from the policy's distribution."""

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return sampled_actions(_print_error(network, observations), generator)

    return act


def mixture(first: Act, second: Act, share: float, generator: torch.Generator) -> Act:
    """Each environment in each step follows `first` with probability `share`, else `second` (DAgger)."""

    def act(observations: Tensor) -> Tensor:
        one, other = first(observations), second(observations)
        choice = torch.rand(len(one), generator=generator).to(one.device) < share
        return torch.where(choice.view(-1, *[1] * (one.dim() - 1)), one, other)

    return act


def at_random(space: spaces.Space, seed: int) -> Act:
    """Actions drawn evenly from the action space."""
    space.seed(seed)
    return lambda observations: torch.as_tensor(np.stack([space.sample() for _ in observations]))


class Recorder:
    """Steps environments and keeps the actions, so that a later process can bring them to the same state again."""

    def __init__(self, environments: Environments) -> None:
        self.environments, self.actions = environments, list[np.ndarray]()

    def collect(self, act: Act, steps: int) -> Tensor:
        """At least `steps` steps of all environments together, and at least one; the observations that were acted on
        (rows, ...).
        """
        rows, count = [], 0
        while count < max(steps, 1):
            actions = act(torch.as_tensor(self.environments.observations))
            rows.append(self._step(environment_actions(actions, self.environments.action_space)))
            count += len(rows[-1])
        return torch.cat(rows)

    def replay(self, actions: np.ndarray) -> Tensor:
        """Takes recorded actions (steps, environments, ...) again; returns what `collect` did."""
        return torch.cat([self._step(step) for step in actions])

    def _step(self, actions: np.ndarray) -> Tensor:
        """What is seen in a step that only restarts an environment is no row."""
        seen = torch.as_tensor(self.environments.observations)[torch.as_tensor(self.environments.acting)]
        self.actions.append(actions)
        self.environments.step(actions)
        return seen


def play(act: Act, environments: Environments, episodes: int) -> tuple[np.ndarray, Tensor]:
    """Returns (episodes,) of whole episodes, and the observations acted on in them (rows, ...).

    Each environment plays its own share of the episodes, so that short episodes are not favoured.
    """
    shares = np.full(environments.count, episodes // environments.count)
    shares[: episodes % environments.count] += 1
    running, finished, rows = np.zeros(environments.count), [], []
    while (shares > 0).any():
        seen, counts = torch.as_tensor(environments.observations), environments.acting & (shares > 0)
        rows.append(seen[torch.as_tensor(counts)])
        step = environments.step(environment_actions(act(seen), environments.action_space))
        running += step.rewards * counts
        ended = (step.terminated | step.truncated) & counts
        finished += running[ended].tolist()
        running[ended], shares = 0.0, shares - ended
    return np.array(finished), torch.cat(rows)


def _print_error(network: nn.Module, observations: Tensor) -> Outputs:
    said: Outputs = network(observations.to(next(network.parameters()).device), value=False)
    return said
