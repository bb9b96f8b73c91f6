"""The algorithms whose policies can be loaded, and how their weights are read: one row each.

Nothing of sb3-contrib is needed: its policies have the same actors as those of Stable-Baselines3. `convert` renames
the weights of a policy to those of the standard policy of its layout. It replaces the quantiles of a distributional
critic by their mean, which is exact because the last layer is linear.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import reduce
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.reinforcement_learning.teacher_model.networks import DirectPolicy
from kd.reinforcement_learning.teacher_model.recurrent import RecurrentPolicy

Weights = dict[str, Tensor]
BATCH_RENORM_EPSILON = 1e-3  # the default of CrossQ


class Layout(NamedTuple):
    """A standard policy, its default activation, and the prefixes of its parts in the state dict."""

    policy: type[BasePolicy]
    activation: type[nn.Module]
    extractor: str
    actor: tuple[str, ...]
    critic: tuple[str, ...]


_TO_ACTIONS, _TO_VALUE = ("mlp_extractor.policy_net", "action_net"), ("mlp_extractor.value_net", "value_net")
ACTOR_CRITIC = Layout(ActorCriticPolicy, nn.Tanh, "features_extractor", _TO_ACTIONS, _TO_VALUE)
RECURRENT = ACTOR_CRITIC._replace(policy=RecurrentPolicy)
Q_VALUES = Layout(DQNPolicy, nn.ReLU, "q_net.features_extractor", ("q_net.q_net",), ())
GAUSSIAN = Layout(SACPolicy, nn.ReLU, "actor.features_extractor", ("actor.latent_pi", "actor.mu"), ("critic.qf0",))
DETERMINISTIC = Layout(TD3Policy, nn.ReLU, "actor.features_extractor", ("actor.mu",), ("critic.qf0",))
DIRECT = Layout(DirectPolicy, nn.ReLU, "features_extractor", ("action_net",), ())


# ---- weights of other policies under the names of the standard ones ----


def _as_saved(weights: Weights, _: spaces.Space) -> Weights:
    return weights


def _actor_critic(weights: Weights, _: spaces.Space) -> Weights:
    """Repeats the layers that actor and critic share in Stable-Baselines3 before 1.8, and adds the two names under
    which it saves the extractor since 1.7.
    """
    prefix = "mlp_extractor.shared_net."
    first = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if first:
        after = 2 * sum(name.endswith(".weight") for name in first)  # an activation follows each layer
        branches = {re.sub(r"(?<=_net\.)\d+", lambda i: str(int(i[0]) + after), name): name for name in weights}
        branches = {
            new: name for new, name in branches.items() if re.match(r"mlp_extractor\.(policy|value)_net\.", name)
        }
        twice = {f"mlp_extractor.{net}_net.{name}": w for net in ("policy", "value") for name, w in first.items()}
        others = {name: w for name, w in weights.items() if not name.startswith("mlp_extractor.")}
        weights = twice | {new: weights[name] for new, name in branches.items()} | others
    shared = {name: weight for name, weight in weights.items() if name.startswith("features_extractor.")}
    return {f"{use}_{name}": weight for use in ("pi", "vf") for name, weight in shared.items()} | weights


def _mean_of_quantiles(weights: Weights, actions: spaces.Space) -> Weights:
    """QR-DQN: the Q-values of DQN are the means of its quantiles."""
    assert isinstance(actions, spaces.Discrete)
    renamed = {name.replace("quantile_net", "q_net"): weight for name, weight in weights.items()}
    for name in _last_layers(renamed, r"q_net(_target)?\.q_net"):
        rows = "(quantile action) ... -> action ..."
        renamed[name] = reduce(renamed[name], rows, "mean", action=int(actions.n))
    return renamed


def _mean_of_critics(weights: Weights, _: spaces.Space) -> Weights:
    """TQC: each Q-value of SAC is the mean of the quantiles of a critic."""
    last = set(_last_layers(weights, r"critic(_target)?\.qf\d+"))
    return {name: weight.mean(0, keepdim=True) if name in last else weight for name, weight in weights.items()}


def _without_batch_renorm(weights: Weights, _: spaces.Space) -> Weights:
    """CrossQ: a normalization in eval mode is an affine map, which is folded into the linear layer after it."""
    folded: Weights = {}
    for network in sorted({name.rsplit(".", 2)[0] for name in weights} - {"actor"}):  # sequences of layers
        pattern = re.compile(rf"{re.escape(network)}\.(\d+)\.")
        scale, shift, layers = torch.ones(()), torch.zeros(()), 0
        for index in sorted({int(found[1]) for name in weights if (found := pattern.match(name))}):
            layer = f"{network}.{index}"
            if f"{layer}.scale" in weights:
                scale = weights[f"{layer}.scale"] / (weights[f"{layer}.ra_var"] + BATCH_RENORM_EPSILON).sqrt()
                shift = weights[f"{layer}.bias"] - scale * weights[f"{layer}.ra_mean"]
                continue
            folded |= _folded(weights, layer, f"{network}.{2 * layers}", scale, shift)
            scale, shift, layers = torch.ones(()), torch.zeros(()), layers + 1
        if network == "actor.latent_pi":  # the last normalization precedes two layers
            for head in ("actor.mu", "actor.log_std"):
                folded |= _folded(weights, head, head, scale, shift)
    targets = {name.replace("critic.", "critic_target."): w for name, w in folded.items() if "critic." in name}
    return folded | targets


def _folded(weights: Weights, layer: str, name: str, scale: Tensor, shift: Tensor) -> Weights:
    """The weights, under `name`, of a linear layer that is applied to scale * x + shift."""
    weight = weights[f"{layer}.weight"]
    bias = weights[f"{layer}.bias"] + weight @ shift.expand(weight.shape[1])
    return {f"{name}.weight": weight * scale, f"{name}.bias": bias}


def _last_layers(weights: Weights, network: str) -> list[str]:
    """Names of the weights and biases of the last layers of the networks, sequences, that match a pattern."""
    ends: dict[str, int] = {}
    layers = [(found, name) for name in weights if (found := re.fullmatch(rf"({network})\.(\d+)\.\w+", name))]
    for found, _ in layers:
        ends[found[1]] = max(ends.get(found[1], 0), int(found[found.re.groups]))
    return [name for found, name in layers if int(found[found.re.groups]) == ends[found[1]]]


def _linear(weights: Weights, _: spaces.Space) -> Weights:
    """ARS: sb3-contrib before 1.7 saved a linear policy as one layer instead of a sequence."""
    return {re.sub(r"^action_net\.(?=weight|bias)", "action_net.0.", name): w for name, w in weights.items()}


# ---- the table ----


class Algorithm(NamedTuple):
    """How the zip of an algorithm is recognized and read.

    `setting`: a setting that the algorithms in later rows do not have. `module`: part of the module of its policy.
    `unpickles`: the class that loads custom policies with --trust_pickle, if any. `convert`: its weights and the
    action space -> weights of `layout.policy`.
    """

    layout: Layout
    setting: str
    module: str = ""
    unpickles: type[BaseAlgorithm] | None = None
    convert: Callable[[Weights, spaces.Space], Weights] = _as_saved


ALGORITHMS: dict[str, Algorithm] = {
    "tqc": Algorithm(GAUSSIAN, "top_quantiles_to_drop_per_net", "tqc", convert=_mean_of_critics),
    "qrdqn": Algorithm(Q_VALUES, "n_quantiles", "qrdqn", convert=_mean_of_quantiles),
    "ars": Algorithm(DIRECT, "alive_bonus_offset", "ars", convert=_linear),
    "crossq": Algorithm(GAUSSIAN, "", "crossq", convert=_without_batch_renorm),
    "recurrent ppo": Algorithm(RECURRENT, "_last_lstm_states", "recurrent", convert=_actor_critic),
    "maskable ppo": Algorithm(ACTOR_CRITIC, "", "maskable", convert=_actor_critic),
    "ppo": Algorithm(ACTOR_CRITIC, "clip_range", "", PPO, _actor_critic),
    "trpo": Algorithm(ACTOR_CRITIC, "cg_max_steps", "", A2C, _actor_critic),  # its policy is that of A2C
    "a2c": Algorithm(ACTOR_CRITIC, "gae_lambda", "", A2C, _actor_critic),
    "dqn": Algorithm(Q_VALUES, "exploration_fraction", "", DQN),
    "sac": Algorithm(GAUSSIAN, "target_entropy", "", SAC),
    "td3": Algorithm(DETERMINISTIC, "target_policy_noise", "", TD3),
    "ddpg": Algorithm(DETERMINISTIC, "target_policy_noise", "", DDPG),
}
SUPPORTED = (
    "supported are PPO, A2C, DQN, SAC, TD3 and DDPG, and TQC, QR-DQN, TRPO, ARS, CrossQ, MaskablePPO and RecurrentPPO "
    "of sb3-contrib"
)
