"""The network of any policy of Stable-Baselines3 for raw observations, its inputs and its actions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.environments import Memory
from kd.reinforcement_learning.teacher_model.networks import (
    ActorCritic,
    Deterministic,
    DirectActions,
    DirectPolicy,
    QValues,
    SquashedGaussian,
)
from kd.reinforcement_learning.teacher_model.recurrent import RecurrentActorCritic, RecurrentPolicy

KERNELS = ((8, 4), (4, 2), (3, 1))  # sizes and strides of Mnih et al. 2015

# ---- observations ----


@dataclass(frozen=True)
class ObservationStatistics:
    """Statistics of VecNormalize: observations become (o - mean) / sqrt(var + epsilon), clipped to +-clip. `clip` is
    one number, or one for each number of an observation, infinity where VecNormalize normalizes only other keys.
    """

    mean: np.ndarray
    var: np.ndarray
    epsilon: float
    clip: float | np.ndarray

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.var + self.epsilon)


class FrameFeatures(BaseFeaturesExtractor):
    """Three convolutions and a layer of `features_dim`: the DQN network (32, 64, 64 and 512) at any size.

    Rusu et al. (arXiv:1511.06295) distill into (16, 32, 32 and 256), (16, 16, 16 and 128) and (16, 16, 16 and 64):
    25, 7 and 4 % of its parameters. A zip of Stable-Baselines3 contains this class, which therefore uses only torch
    and Stable-Baselines3.
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int, channels: tuple[int, ...]) -> None:
        super().__init__(observation_space, features_dim)
        layers: list[nn.Module] = []
        width = observation_space.shape[0]
        for channel, (kernel, stride) in zip(channels, KERNELS, strict=True):
            layers += [nn.Conv2d(width, channel, kernel, stride), nn.ReLU()]
            width = channel
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.cnn(torch.zeros(1, *observation_space.shape)).shape[1]
        self.linear = nn.Sequential(nn.Linear(size, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(self.cnn(observations))


NETWORKS: dict[type[BasePolicy], type[nn.Module]] = {
    RecurrentPolicy: RecurrentActorCritic,  # before the class that it extends
    ActorCriticPolicy: ActorCritic,
    DQNPolicy: QValues,
    SACPolicy: SquashedGaussian,
    TD3Policy: Deterministic,
    DirectPolicy: DirectActions,
}
UNSCALED = (QValues, DirectActions)  # their logits have the units of returns or none, so they need a temperature


class PolicyNetwork(nn.Module):
    """The network of a policy for raw observations (batch, ...), which shares the weights of the policy. Logits are
    divided by `temperature`. With `columns` it uses only these of the observations, (batch, all columns). For a
    recurrent policy the last columns are its state (see `memory`). Raises TypeError for an unknown kind of policy.
    """

    mean: Tensor | None
    std: Tensor | None
    clip: Tensor

    def __init__(
        self, policy: BasePolicy, statistics: ObservationStatistics | None = None, columns: slice | None = None
    ) -> None:
        super().__init__()
        self.columns, self.shape = columns, policy.observation_space.shape or ()
        network = next((network for kind, network in NETWORKS.items() if isinstance(policy, kind)), None)
        if network is None:
            raise TypeError(f"no network for a {type(policy).__name__}")
        self.network, self.temperature = network(policy), 1.0
        self.state_size: int = getattr(self.network, "state_size", 0)
        if self.state_size and columns is None:
            self.columns = slice(0, math.prod(self.shape))
        clip = float("inf") if statistics is None else statistics.clip
        self.register_buffer("clip", torch.as_tensor(clip, dtype=torch.float32), persistent=False)
        for name in ("mean", "std"):
            value = None if statistics is None else torch.as_tensor(getattr(statistics, name), dtype=torch.float32)
            self.register_buffer(name, value)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def part(self, observations: Tensor) -> Tensor:
        """The observations of this policy in those of a teacher and a student (see `StudentPart`)."""
        if self.columns is None:
            return observations
        return observations.flatten(1)[:, self.columns][:, : math.prod(self.shape)].reshape(-1, *self.shape)

    @property
    def memory(self) -> Memory | None:
        """What a recurrent policy keeps of the steps before: `Environments` append it to the observations. None for
        other policies.
        """
        return Memory(self.state_size, self._next_state) if self.state_size else None

    @torch.inference_mode()
    def _next_state(self, rows: Tensor) -> Tensor:
        assert isinstance(self.network, RecurrentActorCritic)
        rows = rows.to(self.device)
        return self.network.next_state(self._inputs(rows), rows[:, -self.state_size :]).cpu()

    def _inputs(self, observations: Tensor) -> Tensor:
        """The observations of this policy, normalized."""
        observations = self.part(observations)
        if self.mean is None or self.std is None:
            return observations
        return ((observations - self.mean) / self.std).clamp(-self.clip, self.clip)

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        state = {"state": observations[:, -self.state_size :]} if self.state_size else {}
        outputs: Outputs = self.network(self._inputs(observations), value=value, **state)
        if outputs.logits is None or self.temperature == 1:
            return outputs
        return Outputs(logits=outputs.logits / self.temperature, features=outputs.features)


def memory_of(network: nn.Module | None) -> Memory | None:
    """The memory of a recurrent policy; None for other networks, such as an average of teachers."""
    return network.memory if isinstance(network, PolicyNetwork) else None


# ---- temperature and actions ----


def temperature_for_entropy(logits: Tensor, share: float) -> float:
    """The temperature T at which the mean entropy of softmax(logits / T) is `share` times its maximum, by bisection.

    Logits are (batch, actions). Q-values have the scale of the returns, so no temperature fits all environments; the
    0.01 of Rusu et al. (arXiv:1511.06295) is for clipped Atari rewards. Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of the entropy must be between 0 and 1, got {share}")
    target = share * math.log(logits.shape[-1])
    low, high = -20.0, 20.0  # bounds of log T; the entropy increases with T
    for _ in range(50):
        middle = (low + high) / 2
        if entropy(logits / math.exp(middle)).mean() < target:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits): (batch, actions) -> (batch,), in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def greedy_actions(outputs: Outputs) -> Tensor:
    """The most probable actions: (batch,) of Discrete, (batch, components) of the other spaces."""
    return outputs.logits.argmax(-1) if outputs.logits is not None else _features(outputs)["mean"]


def sampled_actions(outputs: Outputs, generator: torch.Generator) -> Tensor:
    """Samples actions from the distribution; a deterministic policy has one action."""
    if outputs.logits is not None:
        noise = torch.rand(outputs.logits.shape, generator=generator).clamp(min=1e-20)
        return (outputs.logits - (-noise.log()).log().to(outputs.logits.device)).argmax(-1)  # Gumbel-max
    features = _features(outputs)
    if "log_std" not in features:
        return features["mean"]
    noise = torch.randn(features["mean"].shape, generator=generator).to(features["mean"].device)
    return features["mean"] + features["log_std"].exp() * noise


def greedy(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Observations -> the most probable actions."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return greedy_actions(network(observations.to(device), value=False))

    return act


def sampling(network: nn.Module, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Observations -> actions sampled from the policy's distribution."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return sampled_actions(network(observations.to(device), value=False), generator)

    return act


def _features(outputs: Outputs) -> dict[str, Tensor]:
    return outputs.features or {}
