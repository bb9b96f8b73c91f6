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
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import Tensor, nn

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.observations import box_space
from kd.reinforcement_learning.teacher_model.algorithms import (
    ACTOR_CRITIC,
    ALGORITHMS,
    DIRECT,
    GAUSSIAN,
    Q_VALUES,
    RECURRENT,
    SUPPORTED,
    Layout,
    Weights,
)
from kd.reinforcement_learning.teacher_model.bottleneck import BottleneckFeatures
from kd.reinforcement_learning.teacher_model.policies import FrameFeatures
from kd.reinforcement_learning.teacher_model.recurrent import RecurrentPolicy

SAVED = "pass the zip that Stable-Baselines3 wrote with model.save"
EXTRACTORS = {str(FrameFeatures), str(BottleneckFeatures)}  # of this project


def load_policy(
    path: Path, observation_space: spaces.Space, action_space: spaces.Space, trust_pickle: bool = False
) -> tuple[str, BasePolicy]:
    """Loads a zip that Stable-Baselines3 saved, for the spaces of an environment. Returns the algorithm, and the
    policy for the Box of the observations (see `box_space`), in eval mode on the CPU. With `trust_pickle`
    Stable-Baselines3 unpickles the zip, which can run any code, unless the environment has Dict observations.

    Raises UserError if the zip cannot be read, was trained for other spaces, or does not have the weights of a
    standard policy.
    """
    data, weights = read_model(path)
    name = _algorithm(path, data)
    box = box_space(observation_space)
    _check_space(path, "observations", _description(data, "observation_space"), observation_space, box)
    _check_space(path, "actions", _description(data, "action_space"), action_space)
    unpickles = None if isinstance(observation_space, spaces.Dict) else ALGORITHMS[name].unpickles
    if trust_pickle and unpickles is not None:
        policy = _unpickled_policy(path, unpickles, box, action_space)
    else:
        policy = _build_policy(path, name, data, weights, unpickles is not None, box, action_space)
    if isinstance(policy, RecurrentPolicy) and is_image_space(box):
        raise UserError(f"{path} is a recurrent policy for frames, which is not supported: pass one for vectors")
    policy.set_training_mode(False)
    return name, policy


def trained_with_vec_normalize(path: Path) -> bool:
    """Whether the zip of an on-policy algorithm records that it was trained with VecNormalize."""
    data, _ = read_model(path)
    on_policy = ALGORITHMS[_algorithm(path, data)].layout in (ACTOR_CRITIC, RECURRENT)
    return on_policy and data.get("_last_original_obs") is not None


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
    contrib = module if module.startswith("sb3_contrib") else ""
    rows = ALGORITHMS.items()
    found = next((name for name, row in rows if row.setting in data or (row.module and row.module in contrib)), None)
    if found is None or (contrib and not ALGORITHMS[found].module):
        raise UserError(f"{path} was trained by an unknown algorithm: {SUPPORTED}")
    without_tricks = data.get("policy_delay") == 1 and data.get("target_noise_clip") == 0
    return "ddpg" if found == "td3" and without_tricks else found


def _check_space(path: Path, part: str, saved: dict[str, Any], *possible: spaces.Space) -> None:
    """Raises UserError if the description of a saved space differs from all `possible` spaces."""
    kind = re.sub(r".*\.|'>", "", str(saved.get(":type:")))  # of <class 'gymnasium.spaces.box.Box'>
    size = saved.get("n", saved.get("nvec", saved.get("_shape", saved.get("shape"))))
    trained = _parts(str(saved.get("spaces"))) if kind == "Dict" else f"{kind} {size}"
    needed = [_written(space) for space in possible]
    if saved and " ".join(trained.split()) not in needed:
        raise UserError(
            f"{path} was trained for {part} {trained}, but the environment has {needed[0]}: pass a teacher of this "
            "environment and version (Ant-v4 has observations of 27 numbers, Ant-v5 of 105)"
        )


def _written(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return _parts(str(dict(space.items())))
    size = getattr(space, "n", getattr(space, "nvec", list(space.shape or ())))
    return " ".join(f"{type(space).__name__} {size}".split())


def _parts(text: str) -> str:
    """The keys, kinds and sizes of the spaces in a written dict or OrderedDict, without the bounds of a Box."""
    text = re.sub(r"Box\([^'\"]*?(\([\d, ]*\)), \w+\)", r"Box\1", " ".join(text.split()))
    parts = re.findall(r"['\"]([^'\"]+)['\"][:,] (Box\([\d, ]*\)|\w+\([^)]*\))", text)
    return "Dict " + ", ".join(f"{key}: {part}" for key, part in parts)


# ---- a policy from its weights ----


def _build_policy(
    path: Path, name: str, data: dict[str, Any], saved: Weights, can_unpickle: bool, *both: spaces.Space
) -> BasePolicy:
    algorithm = ALGORITHMS[name]
    try:
        weights = algorithm.convert(saved, both[1])
        arguments = _arguments(algorithm.layout, data, weights)
        policy = algorithm.layout.policy(*both, lr_schedule=_zero, **arguments)
        policy.load_state_dict(weights)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        custom = f"{path} contains a custom policy, whose weights do not fit the standard policy of {name.upper()}"
        if not can_unpickle:
            raise UserError(f"{custom}: pass a teacher with a standard policy") from None
        raise UserError(
            f"{custom}: pass --trust_pickle if you trust the file; Stable-Baselines3 then unpickles it, which can run "
            "any code"
        ) from None
    return policy


def _arguments(layout: Layout, data: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The policy's constructor arguments. Raises an error for classes from outside Stable-Baselines3, torch and this
    project, which may use weights of the same shapes differently.
    """
    chosen = _description(data, "policy_kwargs")
    extractor = str(chosen.get("features_extractor_class", "stable_baselines3."))
    classes = _description(data, "policy_class")["__module__"], extractor
    if not all(re.search(r"\b(stable_baselines3|sb3_contrib)\.", name) or name in EXTRACTORS for name in classes):
        raise ValueError("a custom class")
    if "batch_norm_eps" in chosen:
        raise ValueError("a normalization with another epsilon than the default")
    if chosen.get("lstm_kwargs"):
        raise ValueError("an LSTM with other arguments than the default")
    activation = layout.activation
    if "activation_fn" in chosen:
        written = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(chosen["activation_fn"]))
        activation = getattr(nn, written[1] if written else "")
    arguments = {"activation_fn": activation, "normalize_images": chosen.get("normalize_images", True)}
    return arguments | _extractor(layout, weights) | _networks(layout, weights) | _actions(layout, chosen, weights)


def _extractor(layout: Layout, weights: Weights) -> dict[str, Any]:
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


def _networks(layout: Layout, weights: Weights) -> dict[str, Any]:
    actor, critic = _hidden_widths(weights, layout.actor), _hidden_widths(weights, layout.critic)
    if layout in (Q_VALUES, DIRECT):
        return {"net_arch": actor}
    if layout in (ACTOR_CRITIC, RECURRENT):
        extractors = [name for name in weights if name.startswith("vf_features_extractor.")]
        shared = all(torch.equal(weights[name], weights[name.replace("vf_", "pi_", 1)]) for name in extractors)
        lstms = _lstms(weights) if layout is RECURRENT else {}
        return {"net_arch": {"pi": actor, "vf": critic}, "share_features_extractor": shared} | lstms
    critics = {name for name in weights if re.fullmatch(r"critic\.qf\d+\.0\.weight", name)}
    return {"net_arch": {"pi": actor, "qf": critic}, "n_critics": len(critics)}


def _lstms(weights: Weights) -> dict[str, Any]:
    """The sizes of the LSTMs of RecurrentPPO, and what precedes the critic's layers."""
    layers = [name for name in weights if re.fullmatch(r"lstm_actor\.weight_ih_l\d+", name)]
    separate, linear = "lstm_critic.weight_ih_l0" in weights, "critic.weight" in weights
    size = weights["lstm_actor.weight_hh_l0"].shape[1]
    sizes = {"lstm_hidden_size": size, "n_lstm_layers": len(layers)}
    return sizes | {"enable_critic_lstm": separate, "shared_lstm": not (separate or linear)}


def _hidden_widths(weights: Weights, parts: tuple[str, ...]) -> list[int]:
    """Widths of all linear layers but the last in the `parts` of a network: layers or sequences of layers."""
    pattern = "|".join(rf"{re.escape(part)}(\.\d+)?\.weight" for part in parts)
    return [len(weight) for name, weight in weights.items() if re.fullmatch(pattern, name)][:-1]


def _actions(layout: Layout, chosen: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """How the outputs of the last layer become actions: gSDE, squashing by tanh, and for ARS the bias."""
    if layout is DIRECT:
        hidden = len(_hidden_widths(weights, layout.actor)) > 0  # the defaults of ARS for MLPs and linear policies
        return {"with_bias": "action_net.0.bias" in weights, "squash_output": chosen.get("squash_output", hidden)}
    log_std = weights.get("log_std", weights.get("actor.log_std"))
    if log_std is None or log_std.ndim == 1:
        return {}
    sde = {"use_sde": True, "use_expln": chosen.get("use_expln", False)}
    if layout is GAUSSIAN:
        return sde | {"clip_mean": chosen.get("clip_mean", 2.0) if "actor.mu.0.weight" in weights else 0.0}
    full = log_std.shape[1] == len(weights["action_net.weight"])
    return sde | {"full_std": full, "squash_output": chosen.get("squash_output", False)}


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
