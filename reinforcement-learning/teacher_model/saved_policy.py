"""The policy in a zip of Stable-Baselines3, built from its weights: nothing in the file is run.

Such a zip holds `policy.pth`, a state dict, and `data`, a JSON whose values are plain, or pickles with descriptions
in words beside them. Names and shapes of the weights say what networks to build, plain values and words the rest; the
spaces come from the environment at hand. So no pickle is read, and a zip saved under the old `gym` is like any other.
What fits no standard policy needs its pickles, and so the user's trust.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.student_model.bottleneck import BottleneckFeatures
from kd.reinforcement_learning.teacher_model.frames import FrameFeatures
from kd.reinforcement_learning.teacher_model.unpickling import SAVED, no_learning, unpickled_policy


class _Layout(NamedTuple):
    """A standard policy, its activation by default, and where in its state dict the parts of it are."""

    policy: type[BasePolicy]
    activation: type[nn.Module]
    extractor: str
    actor: tuple[str, ...]
    critic: tuple[str, ...]


_TO_ACTIONS, _TO_VALUE = ("mlp_extractor.policy_net", "action_net"), ("mlp_extractor.value_net", "value_net")
ACTOR_CRITIC = _Layout(ActorCriticPolicy, nn.Tanh, "features_extractor", _TO_ACTIONS, _TO_VALUE)
Q_VALUES = _Layout(DQNPolicy, nn.ReLU, "q_net.features_extractor", ("q_net.q_net",), ())
GAUSSIAN = _Layout(SACPolicy, nn.ReLU, "actor.features_extractor", ("actor.latent_pi", "actor.mu"), ("critic.qf0",))
DETERMINISTIC = _Layout(TD3Policy, nn.ReLU, "actor.features_extractor", ("actor.mu",), ("critic.qf0",))

# By name: what unpickles it, what builds it, and a setting that tells it from those below: PPO has all that A2C has.
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], _Layout, str]] = {
    "ppo": (PPO, ACTOR_CRITIC, "clip_range"),
    "trpo": (A2C, ACTOR_CRITIC, "cg_max_steps"),  # of sb3-contrib, with the policy of Stable-Baselines3
    "a2c": (A2C, ACTOR_CRITIC, "gae_lambda"),
    "dqn": (DQN, Q_VALUES, "exploration_fraction"),
    "sac": (SAC, GAUSSIAN, "target_entropy"),
    "td3": (TD3, DETERMINISTIC, "target_policy_noise"),
    "ddpg": (DDPG, DETERMINISTIC, "target_policy_noise"),
}
# Algorithms of sb3-contrib by a word in the module of their policy, and by a setting that no other has.
CONTRIB = {
    "tqc": ("TQC", "top_quantiles_to_drop_per_net"),
    "qrdqn": ("QR-DQN", "n_quantiles"),
    "ars": ("ARS", "alive_bonus_offset"),
    "recurrent": ("RecurrentPPO", "_last_lstm_states"),
    "maskable": ("MaskablePPO", ""),
    "crossq": ("CrossQ", ""),
}
TEACHERS = "a teacher is one of PPO, A2C, DQN, SAC, TD3, DDPG and the TRPO of sb3-contrib"
OURS = {str(FrameFeatures), str(BottleneckFeatures)}

Weights = dict[str, Tensor]


def load_policy(
    path: Path, observation_space: spaces.Space, action_space: spaces.Space, trust_pickle: bool = False
) -> tuple[str, BasePolicy]:
    """(algorithm, policy in eval mode on the CPU) of a zip that Stable-Baselines3 saved, for an environment's spaces.

    Raises UserError where the zip cannot be read or was trained for other spaces, and where its weights are those of
    no standard policy; `trust_pickle` lets Stable-Baselines3 unpickle it, whatever code that runs.
    """
    data, weights = read_model(path)
    name = _algorithm(path, data)
    _refuse_unsupported(path, data, weights)
    _check_space(path, "observations", _words(data, "observation_space"), observation_space)
    _check_space(path, "actions", _words(data, "action_space"), action_space)
    if trust_pickle:
        policy = unpickled_policy(path, ALGORITHMS[name][0], observation_space, action_space)
    else:
        policy = _built(path, name, data, weights, observation_space, action_space)
    policy.set_training_mode(False)
    return name, policy


def behind_vec_normalize(path: Path) -> bool:
    """Whether a zip says that its model was trained behind VecNormalize, which off-policy algorithms do not tell."""
    data, _ = read_model(path)
    return ALGORITHMS[_algorithm(path, data)][1] is ACTOR_CRITIC and data.get("_last_original_obs") is not None


def read_model(path: Path) -> tuple[dict[str, Any], Weights]:
    """The settings, in words, and the weights of the policy in a zip. Raises UserError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            described, stored = archive.read("data"), archive.read("policy.pth")
    except KeyError:
        raise UserError(f"{path} is no model of Stable-Baselines3 (no data or policy.pth inside): {SAVED}") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: {SAVED}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes raise whatever they happen to hit, here and below
        raise UserError(f"cannot read {path} as a zip ({' '.join(str(error).split())}): {SAVED}") from None
    try:
        data = json.loads(described)
        weights = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        assert isinstance(data, dict)
        assert all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items())
    except Exception:
        raise UserError(f"{path} is damaged, or its policy.pth holds more than weights: {SAVED}") from None
    return data, weights


def _words(data: dict[str, Any], name: str) -> dict[str, Any]:
    """What can be read of a value without unpickling it."""
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _algorithm(path: Path, data: dict[str, Any]) -> str:
    module = str(_words(data, "policy_class").get("__module__"))
    for word, (contrib, sign) in CONTRIB.items():
        if sign in data or (module.startswith("sb3_contrib") and word in module):
            raise UserError(f"{path} was trained by {contrib} of sb3-contrib, which is not supported yet: {TEACHERS}")
    name = next((name for name, (_, _, sign) in ALGORITHMS.items() if sign in data), None)
    if name is None or module.startswith("sb3_contrib"):
        raise UserError(f"{path} is of an unknown algorithm: {TEACHERS}")
    without_tricks = data.get("policy_delay") == 1 and data.get("target_noise_clip") == 0
    return "ddpg" if name == "td3" and without_tricks else name


def _refuse_unsupported(path: Path, data: dict[str, Any], weights: Weights) -> None:
    log_std = weights.get("log_std", weights.get("actor.log_std"))
    if log_std is not None and log_std.ndim == 2:
        raise UserError(f"{path} explores with gSDE, which is not supported: train a teacher with use_sde=False")
    if any(name.startswith("mlp_extractor.shared_net.") for name in weights):
        raise UserError(
            f"{path} shares layers between actor and critic, which Stable-Baselines3 gave up in 1.8: "
            "train a teacher with net_arch=dict(pi=[...], vf=[...])"
        )
    if "Dict" in str(_words(data, "observation_space").get(":type:")):
        raise UserError(f"{path} was trained on Dict observations, which are not supported: flatten them to one Box")


def _check_space(path: Path, what: str, words: dict[str, Any], space: spaces.Space) -> None:
    """Compares, in words, what was saved of a space with the environment's."""
    kind = re.sub(r".*\.|'>", "", str(words.get(":type:")))  # of <class 'gymnasium.spaces.box.Box'>
    size = words.get("n", words.get("nvec", words.get("_shape", words.get("shape"))))
    trained = " ".join(f"{kind} {size}".split())
    size = getattr(space, "n", getattr(space, "nvec", list(space.shape or ())))
    given = " ".join(f"{type(space).__name__} {size}".split())
    if words and trained != given:
        raise UserError(
            f"{path} was trained for {what} {trained}, the environment has {given}: give a teacher of this "
            "environment, in this version (Ant-v4 shows 27 numbers, Ant-v5 shows 105)"
        )


def _built(path: Path, name: str, data: dict[str, Any], weights: Weights, *both_spaces: spaces.Space) -> BasePolicy:
    layout = ALGORITHMS[name][1]
    try:
        policy = layout.policy(*both_spaces, lr_schedule=no_learning, **_arguments(layout, data, weights))
        policy.load_state_dict(_with_both_extractors(weights) if layout is ACTOR_CRITIC else weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise UserError(
            f"{path} holds a custom policy, whose weights fit no standard one of {name.upper()}: pass --trust_pickle "
            "to let Stable-Baselines3 unpickle it; a pickle can run any code, so only for files you trust"
        ) from None
    return policy


def _arguments(layout: _Layout, data: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """What to build the policy with. Raises where a class is not Stable-Baselines3's, torch's or our own: weights of
    the same shapes may be put to another use.
    """
    chosen = _words(data, "policy_kwargs")
    extractor = str(chosen.get("features_extractor_class", "stable_baselines3."))
    classes = _words(data, "policy_class")["__module__"], extractor
    if not all("stable_baselines3." in name or name in OURS for name in classes):
        raise ValueError("a custom class")
    activation = layout.activation
    if "activation_fn" in chosen:
        written = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(chosen["activation_fn"]))
        activation = getattr(nn, written[1] if written else "")
    arguments = {"activation_fn": activation, "normalize_images": chosen.get("normalize_images", True)}
    return arguments | _extractor(layout, weights) | _networks(layout, weights)


def _extractor(layout: _Layout, weights: Weights) -> dict[str, Any]:
    """For frames or a bottleneck; Stable-Baselines3's NatureCNN has the layers of our FrameFeatures. Vectors that are
    taken as they are need none.
    """
    place = f"{layout.extractor}."
    own = {name.removeprefix(place): weight for name, weight in weights.items() if name.startswith(place)}
    if "bottleneck.keys" in own:
        codebooks, pairs, key_dim = own["bottleneck.keys"].shape
        sizes = {"features_dim": len(own["bottleneck.decoder.weight"]), "key_dim": key_dim}
        sizes |= {"codebooks": codebooks, "pairs": pairs}
        return {"features_extractor_class": BottleneckFeatures, "features_extractor_kwargs": sizes}
    if "linear.0.weight" in own:
        channels = [len(weight) for name, weight in own.items() if re.fullmatch(r"cnn\.\d+\.weight", name)]
        widths = {"features_dim": len(own["linear.0.weight"]), "channels": tuple(channels)}
        return {"features_extractor_class": FrameFeatures, "features_extractor_kwargs": widths}
    return {}


def _networks(layout: _Layout, weights: Weights) -> dict[str, Any]:
    actor, critic = _hidden(weights, layout.actor), _hidden(weights, layout.critic)
    if layout is Q_VALUES:
        return {"net_arch": actor}
    if layout is ACTOR_CRITIC:
        extractors = [name for name in weights if name.startswith("vf_features_extractor.")]
        shared = all(torch.equal(weights[name], weights[name.replace("vf_", "pi_", 1)]) for name in extractors)
        return {"net_arch": {"pi": actor, "vf": critic}, "share_features_extractor": shared}
    critics = {name for name in weights if re.fullmatch(r"critic\.qf\d+\.0\.weight", name)}
    return {"net_arch": {"pi": actor, "qf": critic}, "n_critics": len(critics)}


def _hidden(weights: Weights, parts: tuple[str, ...]) -> list[int]:
    """Widths of all linear layers but the last of a network, whose parts are layers or sequences of layers."""
    pattern = "|".join(rf"{re.escape(part)}(\.\d+)?\.weight" for part in parts)
    return [len(weight) for name, weight in weights.items() if re.fullmatch(pattern, name)][:-1]


def _with_both_extractors(weights: Weights) -> Weights:
    """Before 1.7 an actor-critic policy had one extractor under one name; now it has three names."""
    own = {name: weight for name, weight in weights.items() if name.startswith("features_extractor.")}
    return {f"{use}_{name}": weight for use in ("pi", "vf") for name, weight in own.items()} | weights
