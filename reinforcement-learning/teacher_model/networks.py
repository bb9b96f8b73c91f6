"""The networks of the policies of each algorithm, with the same forward.

`network(observations) -> Outputs` returns the parameters of the action distribution and a value:

- Discrete actions: `logits` (batch, actions).
- MultiDiscrete and MultiBinary actions: `logits` (batch, components, categories), of independent components. Where a
  component has fewer categories than others the logits are PADDING; a binary one has the logits (0, z).
- Box actions: features `mean` and, unless the policy is deterministic, `log_std`, both (batch, actions), in the units
  of the environment's actions.
- All: feature `value` (batch,), the expected return.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.common.outputs import Outputs

QUADRATURE_NODES = 16
PADDING = -1e9  # the logit of a category that a component of an action does not have


class ActorCritic(nn.Module):
    """PPO, A2C and TRPO: a categorical or a diagonal Gaussian distribution, with the standard deviation of gSDE if the
    policy explores with it. `value=False` skips the critic.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.squash = Squash(policy.action_space) if policy.squash_output else None

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        return self._outputs(*self._features(observations, value))

    def _features(self, observations: Tensor, value: bool) -> tuple[Tensor, Tensor | None]:
        """The features (batch, width) of actor and critic."""
        policy, prepared = self.policy, _preprocess(self.policy, observations)
        actor = policy.pi_features_extractor(prepared)
        if not value:
            return actor, None
        return actor, actor if policy.share_features_extractor else policy.vf_features_extractor(prepared)

    def _outputs(self, actor: Tensor, critic: Tensor | None) -> Outputs:
        policy = self.policy
        latent = policy.mlp_extractor.forward_actor(actor)
        output = policy.action_net(latent)  # (batch, logits or actions)
        features: dict[str, Tensor] = {}
        if critic is not None:
            value_output = policy.value_net(policy.mlp_extractor.forward_critic(critic))
            features["value"] = rearrange(value_output, "batch 1 -> batch")
        if not isinstance(policy.action_space, spaces.Box):
            return Outputs(logits=_logits(output, policy.action_space), features=features)
        log_std = _log_std(policy.action_dist, policy.log_std, latent) + torch.zeros_like(output)
        actions = {"mean": output, "log_std": log_std} if self.squash is None else self.squash(output, log_std)
        return Outputs(features=features | actions)


def _logits(output: Tensor, space: spaces.Space) -> Tensor:
    """The logits of Discrete actions (batch, actions), or of each component (batch, components, categories), from the
    output of the last layer (batch, all logits).
    """
    if isinstance(space, spaces.MultiBinary):
        return torch.stack([torch.zeros_like(output), output], -1)
    if not isinstance(space, spaces.MultiDiscrete):
        return output
    most, components = int(space.nvec.max()), output.split(space.nvec.tolist(), dim=-1)
    return torch.stack([F.pad(one, (0, most - one.shape[-1]), value=PADDING) for one in components], 1)


class QValues(nn.Module):
    """DQN: softmax(Q / temperature); the value is that of the best action."""

    def __init__(self, policy: DQNPolicy) -> None:
        super().__init__()
        self.q_net = policy.q_net

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        q_values = self.q_net.q_net(self.q_net.features_extractor(_preprocess(self.q_net, observations)))
        return Outputs(logits=q_values, features={"value": q_values.amax(-1)} if value else {})


class SquashedGaussian(nn.Module):
    """SAC and TQC: a Gaussian followed by tanh, approximated by a Gaussian (see `Squash`)."""

    def __init__(self, policy: SACPolicy) -> None:
        super().__init__()
        self.actor, self.critic, self.squash = policy.actor, policy.critic, Squash(policy.action_space)

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        mean, log_std, noise = self.actor.get_action_dist_params(observations)
        if noise:  # gSDE
            log_std = _log_std(self.actor.action_dist, log_std, noise["latent_sde"])
        features = self.squash(mean, log_std)
        if value:
            features["value"] = _min_value(self.critic(observations, torch.tanh(mean)))
        return Outputs(features=features)


class Squash(nn.Module):
    """A Gaussian followed by tanh, as a Gaussian in the units of the environment's actions: the forward KL to a
    Gaussian student depends only on mean and variance.

    The mean is the action of the deterministic policy; the standard deviation is that of tanh(u), by Gauss-Hermite
    quadrature.
    """

    nodes: Tensor
    weights: Tensor

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float32))
        self.register_buffer("weights", torch.tensor(weights / weights.sum(), dtype=torch.float32))
        self.units = ActionUnits(space)

    def forward(self, mean: Tensor, log_std: Tensor) -> dict[str, Tensor]:
        center, spread = (rearrange(x, "batch action -> batch action 1") for x in (mean, log_std.exp()))
        squashed = torch.tanh(center + spread * self.nodes)  # (batch, actions, nodes)
        average = (squashed * self.weights).sum(-1, keepdim=True)
        variance = ((squashed - average).square() * self.weights).sum(-1)
        std = variance.clamp(min=1e-8).sqrt() * self.units.half_range
        return {"mean": self.units(torch.tanh(mean)), "log_std": std.log()}


def _log_std(distribution: Distribution, log_std: Tensor, latent: Tensor) -> Tensor:
    """The logarithm of the standard deviation of actions. With gSDE (Raffin et al., arXiv:2005.05719) the noise is a
    linear function of `latent` (batch, width).
    """
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return log_std
    variance = latent.square() @ distribution.get_std(log_std).square()  # (batch, width) @ (width, actions)
    return (variance + distribution.epsilon).log() / 2


class Deterministic(nn.Module):
    """TD3 and DDPG: one action, no distribution."""

    def __init__(self, policy: TD3Policy) -> None:
        super().__init__()
        self.actor, self.critic, self.units = policy.actor, policy.critic, ActionUnits(policy.action_space)

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        action = self.actor(observations)  # in [-1, 1]
        features = {"mean": self.units(action)}
        if value:
            features["value"] = _min_value(self.critic(observations, action))
        return Outputs(features=features)


class DirectPolicy(BasePolicy):
    """The policy of ARS: one network from observations to actions, or to scores of Discrete actions."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any = None,
        *,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        with_bias: bool,
        squash_output: bool,
        normalize_images: bool = True,
    ) -> None:
        squash = squash_output and isinstance(action_space, spaces.Box)
        super().__init__(observation_space, action_space, squash_output=squash, normalize_images=normalize_images)
        self.activation_fn, self.features_extractor = activation_fn, self.make_features_extractor()
        outputs = int(action_space.n) if isinstance(action_space, spaces.Discrete) else get_action_dim(action_space)
        width = self.features_extractor.features_dim
        layers = create_mlp(width, outputs, net_arch, activation_fn, squash, with_bias)
        self.action_net = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Tensor:
        return self.action_net(self.extract_features(observations, self.features_extractor))

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        outputs = self(observation)
        return outputs.argmax(-1) if isinstance(self.action_space, spaces.Discrete) else outputs


class DirectActions(nn.Module):
    """ARS: softmax(scores / temperature) or one action; no value."""

    def __init__(self, policy: DirectPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.units = ActionUnits(policy.action_space) if policy.squash_output else nn.Identity()

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        outputs = self.policy(observations)
        if isinstance(self.policy.action_space, spaces.Discrete):
            return Outputs(logits=outputs)
        return Outputs(features={"mean": self.units(outputs)})


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


def _min_value(values: tuple[Tensor, ...]) -> Tensor:
    """The minimum of the values of several critics, each (batch, 1) -> (batch,)."""
    return reduce(list(values), "critic batch 1 -> batch", "min")


def _preprocess(policy: BasePolicy, observations: Tensor) -> Tensor:
    if isinstance(policy.observation_space, spaces.Box) and observations.ndim == 2:
        return observations.float()  # what preprocess_obs does with vectors, after slower checks
    prepared = preprocess_obs(observations, policy.observation_space, normalize_images=policy.normalize_images)
    assert isinstance(prepared, Tensor)
    return prepared
