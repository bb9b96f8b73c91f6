"""The networks of Stable-Baselines3 policies, with one forward for every algorithm, and their actions.

`network(observations) -> Outputs` returns the parameters of the action distribution and a value:

- Discrete actions: `logits` (batch, actions).
- Box actions: features `mean` and, unless the policy is deterministic, `log_std`, both (batch, actions), in the units
  of the environment's actions.
- Either: feature `value` (batch,), the expected return.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange, reduce
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.common.outputs import Outputs

QUADRATURE_NODES = 16


class ActorCritic(nn.Module):
    """PPO and A2C: a categorical or a diagonal Gaussian distribution. `value=False` skips the critic."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        policy = self.policy
        prepared = _prepared(policy, observations)
        actor = policy.pi_features_extractor(prepared)
        output = policy.action_net(policy.mlp_extractor.forward_actor(actor))  # (batch, actions)
        features: dict[str, Tensor] = {}
        if value:
            critic = actor if policy.share_features_extractor else policy.vf_features_extractor(prepared)
            value_output = policy.value_net(policy.mlp_extractor.forward_critic(critic))
            features["value"] = rearrange(value_output, "batch 1 -> batch")
        if isinstance(policy.action_space, spaces.Discrete):
            return Outputs(logits=output, features=features)
        return Outputs(features=features | {"mean": output, "log_std": policy.log_std + torch.zeros_like(output)})


class QValues(nn.Module):
    """DQN: softmax(Q / temperature); the value is that of the best action."""

    def __init__(self, policy: DQNPolicy) -> None:
        super().__init__()
        self.q_net = policy.q_net

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        q_values = self.q_net.q_net(self.q_net.features_extractor(_prepared(self.q_net, observations)))
        return Outputs(logits=q_values, features={"value": q_values.amax(-1)} if value else {})


class SquashedGaussian(nn.Module):
    """SAC: a Gaussian followed by tanh, approximated by a Gaussian.

    Its mean is the action of the deterministic policy, its standard deviation that of tanh(u), by Gauss-Hermite
    quadrature. The forward KL to a Gaussian student depends on mean and variance alone.
    """

    def __init__(self, policy: SACPolicy) -> None:
        super().__init__()
        self.actor, self.critic = policy.actor, policy.critic
        nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float32))
        self.register_buffer("weights", torch.tensor(weights / weights.sum(), dtype=torch.float32))
        self.units = ActionUnits(policy.action_space)

    nodes: Tensor
    weights: Tensor

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        center, spread = (rearrange(x, "batch action -> batch action 1") for x in (mean, log_std.exp()))
        squashed = torch.tanh(center + spread * self.nodes)  # (batch, actions, nodes)
        average = (squashed * self.weights).sum(-1, keepdim=True)
        variance = ((squashed - average).square() * self.weights).sum(-1)
        action = torch.tanh(mean)
        std = variance.clamp(min=1e-8).sqrt() * self.units.half_range
        features = {"mean": self.units(action), "log_std": std.log()}
        if value:
            features["value"] = _least(self.critic(observations, action))
        return Outputs(features=features)


class Deterministic(nn.Module):
    """TD3 and DDPG: one action, no distribution."""

    def __init__(self, policy: TD3Policy) -> None:
        super().__init__()
        self.actor, self.critic, self.units = policy.actor, policy.critic, ActionUnits(policy.action_space)

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        action = self.actor(observations)  # in [-1, 1]
        features = {"mean": self.units(action)}
        if value:
            features["value"] = _least(self.critic(observations, action))
        return Outputs(features=features)


class ActionUnits(nn.Module):
    """Scales actions from [-1, 1] to the environment's bounds."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        assert isinstance(space, spaces.Box)
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    middle: Tensor
    half_range: Tensor

    def forward(self, action: Tensor) -> Tensor:
        return self.middle + self.half_range * action


def _least(values: tuple[Tensor, ...]) -> Tensor:
    """The smallest of several critics' values, each (batch, 1) -> (batch,)."""
    return reduce(list(values), "critic batch 1 -> batch", "min")


def network_of(policy: BasePolicy) -> nn.Module:
    """The network of a policy, sharing its weights. Raises TypeError for an unknown kind."""
    for kind, network in NETWORKS.items():
        if isinstance(policy, kind):
            return network(policy)
    raise TypeError(f"no network for a {type(policy).__name__}")


NETWORKS: dict[type[BasePolicy], type[nn.Module]] = {
    ActorCriticPolicy: ActorCritic,
    DQNPolicy: QValues,
    SACPolicy: SquashedGaussian,
    TD3Policy: Deterministic,
}


def temperature_for_entropy(logits: Tensor, share: float) -> float:
    """The T at which the mean entropy of softmax(logits / T) is `share` times its maximum, by bisection.

    Logits are (batch, actions). Q-values have the scale of the returns, so no temperature fits all environments; the
    0.01 of Rusu et al. (arXiv:1511.06295) belongs to clipped Atari rewards. Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the entropy's share must be between 0 and 1, got {share}")
    target = share * math.log(logits.shape[-1])
    low, high = -20.0, 20.0  # log T; the entropy grows with it
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
    """The most probable actions: (batch,) of Discrete, (batch, actions) of Box."""
    return outputs.logits.argmax(-1) if outputs.logits is not None else _features(outputs)["mean"]


def sampled_actions(outputs: Outputs, generator: torch.Generator) -> Tensor:
    """Actions drawn from the distribution; for a deterministic policy its actions."""
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

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return greedy_actions(_policy_outputs(network, observations))

    return act


def sampling(network: nn.Module, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Observations -> actions drawn from the policy's distribution."""

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        return sampled_actions(_policy_outputs(network, observations), generator)

    return act


def _policy_outputs(network: nn.Module, observations: Tensor) -> Outputs:
    outputs: Outputs = network(observations.to(next(network.parameters()).device), value=False)
    return outputs


def _prepared(policy: BasePolicy, observations: Tensor) -> Tensor:
    prepared = preprocess_obs(observations, policy.observation_space, normalize_images=policy.normalize_images)
    assert isinstance(prepared, Tensor)
    return prepared


def _features(outputs: Outputs) -> dict[str, Tensor]:
    return outputs.features or {}
