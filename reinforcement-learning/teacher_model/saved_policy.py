"""Builds the policy in a zip of Stable-Baselines3 from its weights, without unpickling anything.

The zip contains `policy.pth`, a state dict, and `data`, a JSON of plain values and of pickles with readable
descriptions. The networks are built from the names and shapes of the weights, and other arguments from the plain
values and descriptions; the spaces are those of the environment. So no code in the file is executed, and zips of the
old `gym` load too. Only a policy of a custom class needs its pickles, and therefore --trust_pickle.
"""

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
from kd.reinforcement_learning.teacher_model.bottleneck import BottleneckFeatures
from kd.reinforcement_learning.teacher_model.policies import FrameFeatures

SAVED = "pass the zip that Stable-Baselines3 wrote with model.save"


class _Layout(NamedTuple):
    """A standard policy, its default activation, and the prefixes of its parts in the state dict."""

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

# The class that unpickles an algorithm, its layout, and a setting that the algorithms below do not have (PPO has all
# settings of A2C).
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], _Layout, str]] = {
    "ppo": (PPO, ACTOR_CRITIC, "clip_range"),
    "trpo": (A2C, ACTOR_CRITIC, "cg_max_steps"),  # of sb3-contrib; its policy is that of A2C
    "a2c": (A2C, ACTOR_CRITIC, "gae_lambda"),
    "dqn": (DQN, Q_VALUES, "exploration_fraction"),
    "sac": (SAC, GAUSSIAN, "target_entropy"),
    "td3": (TD3, DETERMINISTIC, "target_policy_noise"),
    "ddpg": (DDPG, DETERMINISTIC, "target_policy_noise"),
}
# Algorithms of sb3-contrib: part of the module of their policy, name, and a setting that only they have.
CONTRIB = {
    "tqc": ("TQC", "top_quantiles_to_drop_per_net"),
    "qrdqn": ("QR-DQN", "n_quantiles"),
    "ars": ("ARS", "alive_bonus_offset"),
    "recurrent": ("RecurrentPPO", "_last_lstm_states"),
    "maskable": ("MaskablePPO", ""),
    "crossq": ("CrossQ", ""),
}
TEACHERS = "supported are PPO, A2C, DQN, SAC, TD3, DDPG, and TRPO of sb3-contrib"
EXTRACTORS = {str(FrameFeatures), str(BottleneckFeatures)}  # of this project

Weights = dict[str, Tensor]


def load_policy(
    path: Path, observation_space: spaces.Space, action_space: spaces.Space, trust_pickle: bool = False
) -> tuple[str, BasePolicy]:
    """Loads a zip that Stable-Baselines3 saved, for the spaces of an environment. Returns the algorithm, and the
    policy in eval mode on the CPU. With `trust_pickle` Stable-Baselines3 unpickles the zip, which can run any code.

    Raises UserError if the zip cannot be read, was trained for other spaces, or does not have the weights of a
    standard policy.
    """
    data, weights = read_model(path)
    name = _algorithm(path, data)
    _check_supported(path, data, weights)
    _check_space(path, "observations", _description(data, "observation_space"), observation_space)
    _check_space(path, "actions", _description(data, "action_space"), action_space)
    if trust_pickle:
        policy = _unpickled_policy(path, ALGORITHMS[name][0], observation_space, action_space)
    else:
        policy = _build_policy(path, name, data, weights, observation_space, action_space)
    policy.set_training_mode(False)
    return name, policy


def trained_with_vec_normalize(path: Path) -> bool:
    """Whether the zip of an on-policy algorithm records that it was trained with VecNormalize."""
    data, _ = read_model(path)
    return ALGORITHMS[_algorithm(path, data)][1] is ACTOR_CRITIC and data.get("_last_original_obs") is not None


def read_model(path: Path) -> tuple[dict[str, Any], Weights]:
    """The settings (JSON) and the weights of the policy in a zip. Raises UserError if the zip is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            settings, stored = archive.read("data"), archive.read("policy.pth")
    except KeyError:
        raise UserError(
            f"{path} is not a model of Stable-Baselines3 (it has no data or policy.pth): {SAVED}"
        ) from None
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: {SAVED}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes raise any exception
        raise UserError(f"cannot read {path} as a zip ({' '.join(str(error).split())}): {SAVED}") from None
    try:
        data = json.loads(settings)
        weights = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        assert isinstance(data, dict)
        assert all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items())
    except Exception:
        raise UserError(f"{path} is damaged, or its policy.pth contains more than weights: {SAVED}") from None
    return data, weights


def _description(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The readable description of a pickled value."""
    value = data.get(name)
    return value if isinstance(value, dict) else {}


# ---- checks ----


def _algorithm(path: Path, data: dict[str, Any]) -> str:
    module = str(_description(data, "policy_class").get("__module__"))
    for part, (contrib, setting) in CONTRIB.items():
        if setting in data or (module.startswith("sb3_contrib") and part in module):
            raise UserError(f"{path} was trained by {contrib} of sb3-contrib, which is not supported yet: {TEACHERS}")
    name = next((name for name, (_, _, setting) in ALGORITHMS.items() if setting in data), None)
    if name is None or module.startswith("sb3_contrib"):
        raise UserError(f"{path} was trained by an unknown algorithm: {TEACHERS}")
    without_tricks = data.get("policy_delay") == 1 and data.get("target_noise_clip") == 0
    return "ddpg" if name == "td3" and without_tricks else name


def _check_supported(path: Path, data: dict[str, Any], weights: Weights) -> None:
    log_std = weights.get("log_std", weights.get("actor.log_std"))
    if log_std is not None and log_std.ndim == 2:
        raise UserError(f"{path} explores with gSDE, which is not supported: train a teacher with use_sde=False")
    if any(name.startswith("mlp_extractor.shared_net.") for name in weights):
        raise UserError(
            f"{path} shares layers between actor and critic, which Stable-Baselines3 removed in 1.8: "
            "train a teacher with net_arch=dict(pi=[...], vf=[...])"
        )
    if "Dict" in str(_description(data, "observation_space").get(":type:")):
        raise UserError(f"{path} was trained on Dict observations, which are not supported: flatten them to one Box")


def _check_space(path: Path, part: str, saved: dict[str, Any], space: spaces.Space) -> None:
    """Raises UserError if the description of a saved space differs from the environment's space."""
    kind = re.sub(r".*\.|'>", "", str(saved.get(":type:")))  # of <class 'gymnasium.spaces.box.Box'>
    size = saved.get("n", saved.get("nvec", saved.get("_shape", saved.get("shape"))))
    trained = " ".join(f"{kind} {size}".split())
    size = getattr(space, "n", getattr(space, "nvec", list(space.shape or ())))
    needed = " ".join(f"{type(space).__name__} {size}".split())
    if saved and trained != needed:
        raise UserError(
            f"{path} was trained for {part} {trained}, but the environment has {needed}: pass a teacher of this "
            "environment and version (Ant-v4 has observations of 27 numbers, Ant-v5 of 105)"
        )


# ---- a policy from its weights ----


def _build_policy(path: Path, name: str, data: dict[str, Any], weights: Weights, *both: spaces.Space) -> BasePolicy:
    layout = ALGORITHMS[name][1]
    try:
        policy = layout.policy(*both, lr_schedule=_zero, **_arguments(layout, data, weights))
        policy.load_state_dict(_with_both_extractors(weights) if layout is ACTOR_CRITIC else weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise UserError(
            f"{path} contains a custom policy, whose weights do not fit the standard policy of {name.upper()}: pass "
            "--trust_pickle if you trust the file; Stable-Baselines3 then unpickles it, which can run any code"
        ) from None
    return policy


def _arguments(layout: _Layout, data: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The policy's constructor arguments. Raises an error for classes from outside Stable-Baselines3, torch and this
    project, which may use weights of the same shapes differently.
    """
    chosen = _description(data, "policy_kwargs")
    extractor = str(chosen.get("features_extractor_class", "stable_baselines3."))
    classes = _description(data, "policy_class")["__module__"], extractor
    if not all("stable_baselines3." in name or name in EXTRACTORS for name in classes):
        raise ValueError("a custom class")
    activation = layout.activation
    if "activation_fn" in chosen:
        written = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(chosen["activation_fn"]))
        activation = getattr(nn, written[1] if written else "")
    arguments = {"activation_fn": activation, "normalize_images": chosen.get("normalize_images", True)}
    return arguments | _extractor(layout, weights) | _networks(layout, weights)


def _extractor(layout: _Layout, weights: Weights) -> dict[str, Any]:
    """The features extractor of frames or of a bottleneck; vectors have none. FrameFeatures also loads the weights of
    Stable-Baselines3's NatureCNN, which has the same layers.
    """
    prefix = f"{layout.extractor}."
    extractor = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if "bottleneck.keys" in extractor:
        codebooks, codebook_size, key_dim = extractor["bottleneck.keys"].shape
        sizes = {"features_dim": len(extractor["bottleneck.decoder.weight"]), "key_dim": key_dim}
        sizes |= {"codebooks": codebooks, "codebook_size": codebook_size}
        return {"features_extractor_class": BottleneckFeatures, "features_extractor_kwargs": sizes}
    if "linear.0.weight" in extractor:
        channels = [len(weight) for name, weight in extractor.items() if re.fullmatch(r"cnn\.\d+\.weight", name)]
        widths = {"features_dim": len(extractor["linear.0.weight"]), "channels": tuple(channels)}
        return {"features_extractor_class": FrameFeatures, "features_extractor_kwargs": widths}
    return {}


def _networks(layout: _Layout, weights: Weights) -> dict[str, Any]:
    actor, critic = _hidden_widths(weights, layout.actor), _hidden_widths(weights, layout.critic)
    if layout is Q_VALUES:
        return {"net_arch": actor}
    if layout is ACTOR_CRITIC:
        extractors = [name for name in weights if name.startswith("vf_features_extractor.")]
        shared = all(torch.equal(weights[name], weights[name.replace("vf_", "pi_", 1)]) for name in extractors)
        return {"net_arch": {"pi": actor, "vf": critic}, "share_features_extractor": shared}
    critics = {name for name in weights if re.fullmatch(r"critic\.qf\d+\.0\.weight", name)}
    return {"net_arch": {"pi": actor, "qf": critic}, "n_critics": len(critics)}


def _hidden_widths(weights: Weights, parts: tuple[str, ...]) -> list[int]:
    """Widths of all linear layers but the last in the `parts` of a network: layers or sequences of layers."""
    pattern = "|".join(rf"{re.escape(part)}(\.\d+)?\.weight" for part in parts)
    return [len(weight) for name, weight in weights.items() if re.fullmatch(pattern, name)][:-1]


def _with_both_extractors(weights: Weights) -> Weights:
    """Adds the two names under which Stable-Baselines3 saves the extractor of actor-critic policies since 1.7."""
    shared = {name: weight for name, weight in weights.items() if name.startswith("features_extractor.")}
    return {f"{use}_{name}": weight for use in ("pi", "vf") for name, weight in shared.items()} | weights


# ---- a policy from its pickles, with --trust_pickle ----


def _unpickled_policy(
    path: Path, algorithm: type[BaseAlgorithm], observation_space: spaces.Space, action_space: spaces.Space
) -> BasePolicy:
    replaced = {"observation_space": observation_space, "action_space": action_space, "learning_rate": 0.0}
    replaced |= dict.fromkeys(("lr_schedule", "clip_range", "exploration_schedule"), _zero)  # pickled bytecode
    replaced |= {"buffer_size": 1, "n_steps": 1, "seed": None}  # minimal replay memory; a seed would be set globally
    try:
        with legacy_gym():
            return algorithm.load(path, device="cpu", custom_objects=replaced).policy
    except Exception as error:  # unpickled code may raise any exception
        reason = " ".join(str(error).split())
        raise UserError(
            f"Stable-Baselines3 cannot unpickle {path} ({type(error).__name__}: {reason}): {SAVED}"
        ) from None


def _zero(_: float) -> float:
    """A learning rate schedule."""
    return 0.0


@contextmanager
def legacy_gym() -> Iterator[None]:
    """Makes gymnasium importable as `gym` for pickles inside the block, unless gym is installed."""
    if "gym" in sys.modules or find_spec("gym"):
        yield
        return
    loaded = [name for name in sys.modules if name.partition(".")[0] == "gymnasium"]
    sys.modules.update({name.replace("gymnasium", "gym", 1): sys.modules[name] for name in loaded})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "gym"]:
            del sys.modules[name]
