"""Rollouts: the returns of episodes, and observations with the teacher's outputs, the data of policy distillation."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from gymnasium import spaces
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.environments import Environments, Memory, is_vectorized, to_environment

Act = Callable[[Tensor], Tensor]  # observations (environments, ...) -> actions

TEST_SEED, VALIDATION_SEED = 10_000_000, 20_000_000  # far from each other and from the seeds of training
PARALLEL_ENVIRONMENTS, VECTORIZED_ENVIRONMENTS = 20, 1000  # maximum numbers in an evaluation
CHUNK = 4096  # observations per forward pass of the teacher


def mixture(first: Act, second: Act, share: float, generator: torch.Generator) -> Act:
    """Chooses for each environment and step between `first`, with probability `share`, and `second` (DAgger)."""

    def act(observations: Tensor) -> Tensor:
        one, other = first(observations), second(observations)
        choice = torch.rand(len(one), generator=generator).to(one.device) < share
        return torch.where(rearrange(choice, "n -> n" + " 1" * (one.dim() - 1)), one, other)

    return act


def in_parts(first: Act, second: Act, number: int) -> Act:
    """`first` in the first `number` environments, `second` in the others."""

    def act(observations: Tensor) -> Tensor:
        parts = ((first, observations[:number]), (second, observations[number:]))
        return torch.cat([act(part) for act, part in parts if len(part)])

    return act


def in_one_episode(act: Act, memory: Memory | None) -> Act:
    """The actions of a recurrent policy, if it has a `memory`, for the observations of one environment (1, ...), from
    the start of an episode to its end.
    """
    if memory is None:
        return act
    state = torch.zeros(1, memory.size)

    def act_and_remember(observations: Tensor) -> Tensor:
        nonlocal state
        rows = torch.cat([observations.flatten(1), state], 1)
        state = memory.step(rows)
        return act(rows)

    return act_and_remember


def random_actions(space: spaces.Space) -> Act:
    """Actions drawn uniformly from the action space, with a fixed seed."""
    space.seed(0)
    return lambda observations: torch.as_tensor(np.stack([space.sample() for _ in observations]))


class Recorder:
    """Steps environments and records the actions, with which another process can restore the same state."""

    def __init__(self, environments: Environments) -> None:
        self.environments, self.actions = environments, list[np.ndarray]()

    def collect(self, act: Act, steps: int) -> Tensor:
        """Takes at least `steps` steps, and at least one, in total over all environments. Returns the observations
        (rows, ...) for which actions were selected.
        """
        rows, count = [], 0
        while count < max(steps, 1):
            actions = act(torch.as_tensor(self.environments.observations))
            rows.append(self._step(to_environment(actions, self.environments.action_space)))
            count += len(rows[-1])
        return torch.cat(rows)

    def replay(self, actions: np.ndarray) -> Tensor:
        """Repeats recorded actions (steps, environments, ...); returns the same observations as `collect`."""
        return torch.cat([self._step(step) for step in actions])

    def _step(self, actions: np.ndarray) -> Tensor:
        """Returns the observations for which the actions count. Steps that only restart an environment add no row."""
        rows = torch.as_tensor(self.environments.observations[self.environments.acting])  # NumPy's indexing is faster
        self.actions.append(actions)
        self.environments.step(actions)
        return rows


class Episodes(NamedTuple):
    """Returns and numbers of steps (episodes,), and the observations (rows, ...) in the episodes."""

    returns: np.ndarray
    observations: Tensor
    lengths: np.ndarray


def play(act: Act, environments: Environments, episodes: int) -> Episodes:
    """Plays whole episodes.

    The environments play equal numbers of episodes (or one more), so that short episodes are not overrepresented. The
    returns are in the order of the environments, so that those of two policies are paired by their starts.
    """
    shares = np.full(environments.count, episodes // environments.count)
    shares[: episodes % environments.count] += 1
    running, rows = np.zeros((environments.count, 2)), []  # returns and numbers of steps
    finished: list[list[np.ndarray]] = [[] for _ in range(environments.count)]
    while (shares > 0).any():
        observations, counts = environments.observations, environments.acting & (shares > 0)
        rows.append(torch.as_tensor(observations[counts]))
        step = environments.step(to_environment(act(torch.as_tensor(observations)), environments.action_space))
        running += np.stack([step.rewards, np.ones(environments.count)], axis=1) * counts[:, None]
        ended = (step.terminated | step.truncated) & counts
        for number in ended.nonzero()[0]:
            finished[number].append(running[number].copy())
        running[ended], shares = 0.0, shares - ended
    returns, lengths = np.stack([episode for played in finished for episode in played], axis=1)
    return Episodes(returns, torch.cat(rows), lengths.astype(int))


def returns_of(
    act: Act, environment: str, episodes: int, seed: int, memory: Memory | None = None
) -> tuple[np.ndarray, Tensor]:
    """The returns (episodes,) and the observations (rows, ...) of `play_in`."""
    played = play_in(environment, act, episodes, seed, memory)
    return played.returns, played.observations


def play_in(environment: str, act: Act, episodes: int, seed: int, memory: Memory | None = None) -> Episodes:
    """`play` in new environments. The episodes, with seeds from `seed` on, start alike for all policies; those of a
    vector entry point do if each environment plays one.
    """
    count = min(episodes, VECTORIZED_ENVIRONMENTS if is_vectorized(environment) else PARALLEL_ENVIRONMENTS)
    with closing(Environments(environment, count, seed, seeded_episodes=True, memory=memory)) as environments:
        return play(act, environments, episodes)


class Observations:
    """A ring buffer of `capacity` observations, in their dtype (uint8 for frames), with the teacher's outputs. The
    teacher runs once on each. Of rows with the state of a recurrent teacher, only the observations are kept.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.observations = torch.empty(capacity, *shape, dtype=dtype)
        self.teacher_outputs: dict[str, Tensor] = {}
        self.capacity, self.place, self.seen = capacity, 0, 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def append(self, rows: Tensor, teacher: nn.Module) -> None:
        """Adds observations (rows, ...) with the teacher's outputs; they replace the oldest rows of a full buffer."""
        for chunk in rows.to(self.observations.dtype).split(min(CHUNK, self.capacity)):
            places = (self.place + torch.arange(len(chunk))) % self.capacity
            self.observations[places] = self._without_state(chunk)
            for name, values in predict(teacher, chunk).items():
                if name not in self.teacher_outputs:
                    self.teacher_outputs[name] = torch.empty(self.capacity, *values.shape[1:])
                self.teacher_outputs[name][places] = values
            self.place, self.seen = (self.place + len(chunk)) % self.capacity, self.seen + len(chunk)

    def _without_state(self, rows: Tensor) -> Tensor:
        shape = self.observations.shape[1:]
        return rows if rows.shape[1:] == shape else rows[:, : shape.numel()].reshape(-1, *shape)

    def batches(
        self, batch_size: int, number: int, generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """Yields `number` batches of (observations, teacher outputs) on a device, from epochs in random order."""
        order = torch.empty(0, dtype=torch.long)
        batch_size = min(batch_size, len(self))
        for _ in range(number):
            if len(order) < batch_size:
                order = torch.randperm(len(self), generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            teacher = {name: values[rows].to(device) for name, values in self.teacher_outputs.items()}
            yield self.observations[rows].to(device), to_outputs(teacher)

    def values(self) -> Tensor | None:
        """The teacher's values (rows,), or None for a teacher without values."""
        return self.teacher_outputs["value"][: len(self)] if "value" in self.teacher_outputs else None


@torch.inference_mode()
def predict(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    """The outputs {name: (rows, ...)} of a policy network, in float32 on the CPU."""
    outputs: Outputs = network(observations.to(next(network.parameters()).device))
    named = {} if outputs.logits is None else {"logits": outputs.logits}
    return {name: values.float().cpu() for name, values in (named | (outputs.features or {})).items()}


def to_outputs(named: dict[str, Tensor]) -> Outputs:
    """The inverse of `predict`: Outputs of named tensors."""
    return Outputs(logits=named.get("logits"), features={name: x for name, x in named.items() if name != "logits"})
