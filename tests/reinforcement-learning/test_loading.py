"""Loading teachers of Stable-Baselines3: the same actions as its `load`, without unpickling; statistics, errors."""

import base64
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import to_environment
from kd.reinforcement_learning.teacher_model.files import (
    Statistics,
    TeacherFiles,
    box_statistics,
    find_teacher,
    read_statistics,
)
from kd.reinforcement_learning.teacher_model.policies import (
    FrameFeatures,
    ObservationStatistics,
    PolicyNetwork,
    greedy_actions,
)
from kd.reinforcement_learning.teacher_model.saved_policy import legacy_gym, load_policy
from kd.reinforcement_learning.teacher_model.teacher import Agent, load_agent


class Frames(gym.Env[np.ndarray, Any]):
    """Random frames with discrete or continuous actions."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)

    def __init__(self, action_space: spaces.Space | None = None) -> None:
        self.action_space = action_space or spaces.Discrete(3)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return self.observation_space.sample(), {}


class DoubledFeatures(FlattenExtractor):
    """A features extractor without weights, which differs from the standard one only in its name."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(observations)


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def saved(folder: Path, algorithm: type[BaseAlgorithm], env: Any = "CartPole-v1", **arguments: Any) -> Path:
    """The zip of an untrained model."""
    policy = arguments.pop("policy", "MlpPolicy")
    if algorithm in (DQN, SAC, TD3, DDPG, TQC, QRDQN, CrossQ):
        arguments["buffer_size"] = 1
    algorithm(policy, env, device="cpu", **arguments).save(folder / "teacher.zip")
    return folder / "teacher.zip"


def spaces_of(env: str | gym.Env) -> tuple[spaces.Space, spaces.Space]:
    made = gym.make(env) if isinstance(env, str) else env
    return made.observation_space, made.action_space


def observations_of(space: spaces.Space) -> np.ndarray:
    if isinstance(space, spaces.Box) and space.dtype == np.uint8:
        return np.random.default_rng(0).integers(0, 256, (8, *space.shape)).astype(np.uint8)
    return np.random.default_rng(0).normal(size=(64, *(space.shape or ()))).astype(np.float32)


def edited(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """The zip with its `data` and weights changed in place."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    data, weights = json.loads(files["data"]), torch.load(io.BytesIO(files["policy.pth"]), weights_only=True)
    change(data, weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | {"data": json.dumps(data).encode(), "policy.pth": buffer.getvalue()}).items():
            archive.writestr(name, content)
    return path


def of_old_gym(data: dict[str, Any], _: Any) -> None:
    """Writes spaces like Python 3.7 and gym; in pickle protocol 3 a name has no length prefix."""
    for name in ("observation_space", "action_space"):
        space = pickle.loads(base64.b64decode(data[name][":serialized:"]))
        old = pickle.dumps(space, protocol=3).replace(b"gymnasium.", b"gym.")
        data[name][":serialized:"] = base64.b64encode(old).decode()
        data[name][":type:"] = data[name][":type:"].replace("gymnasium", "gym")


def error_of(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Policies

ONE_ACTION = spaces.Box(-2, 2, (1,), np.float32)
SMALL_FRAMES = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 24, "channels": (4, 6, 8)}}
ROUND_TRIPS: dict[str, tuple[type[BaseAlgorithm], Any, dict[str, Any]]] = {
    "ppo": (PPO, "CartPole-v1", {}),
    "ppo separate ReLU": (
        PPO,
        "Pendulum-v1",
        {"policy_kwargs": {"net_arch": {"pi": [32], "vf": [16, 24]}, "activation_fn": nn.ReLU}},
    ),
    "ppo linear": (PPO, "CartPole-v1", {"policy_kwargs": {"net_arch": []}}),
    "ppo grid": (PPO, "FrozenLake-v1", {}),
    "ppo frames": (
        PPO,
        Frames(),
        {"policy": "CnnPolicy", "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 32}}},
    ),
    "ppo two extractors": (
        PPO,
        Frames(),
        {"policy": "CnnPolicy", "policy_kwargs": {"share_features_extractor": False}},
    ),
    "ppo unscaled": (
        PPO,
        Frames(),
        {"policy": "CnnPolicy", "policy_kwargs": {"normalize_images": False, "net_arch": [16]}},
    ),
    "ppo FrameFeatures": (
        PPO,
        Frames(),
        {"policy": "CnnPolicy", "policy_kwargs": {"features_extractor_class": FrameFeatures, **SMALL_FRAMES}},
    ),
    "a2c": (A2C, "CartPole-v1", {}),
    "a2c TF": (A2C, "Pendulum-v1", {"use_rms_prop": False, "policy_kwargs": {"activation_fn": nn.ELU}}),
    "dqn": (DQN, "CartPole-v1", {}),
    "dqn narrow Tanh": (DQN, "CartPole-v1", {"policy_kwargs": {"net_arch": [16], "activation_fn": nn.Tanh}}),
    "dqn frames": (DQN, Frames(), {"policy": "CnnPolicy"}),
    "sac": (SAC, "Pendulum-v1", {}),
    "sac one critic": (
        SAC,
        "Pendulum-v1",
        {"policy_kwargs": {"n_critics": 1, "net_arch": {"pi": [16], "qf": [24, 8]}}},
    ),
    "sac frames": (
        SAC,
        Frames(ONE_ACTION),
        {"policy": "CnnPolicy", "policy_kwargs": {"net_arch": [16], "share_features_extractor": True}},
    ),
    "ppo gSDE": (PPO, "Pendulum-v1", {"use_sde": True, "policy_kwargs": {"net_arch": [16]}}),
    "ppo gSDE squashed": (
        PPO,
        "Pendulum-v1",
        {"use_sde": True, "policy_kwargs": {"squash_output": True, "full_std": False, "use_expln": True}},
    ),
    "a2c gSDE": (A2C, "Pendulum-v1", {"use_sde": True}),
    "sac gSDE": (SAC, "Pendulum-v1", {"use_sde": True, "policy_kwargs": {"clip_mean": 0.1}}),
    "sac gSDE unclipped": (SAC, "Pendulum-v1", {"use_sde": True, "policy_kwargs": {"clip_mean": 0.0}}),
    "td3": (TD3, "Pendulum-v1", {}),
    "ddpg": (DDPG, "Pendulum-v1", {}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_loaded_policy_matches_stable_baselines(tmp_path: Path, case: str) -> None:
    algorithm, env, arguments = ROUND_TRIPS[case]
    path = saved(tmp_path, algorithm, env, **arguments)
    theirs = algorithm.load(path, device="cpu").policy
    observations = observations_of(spaces_of(env)[0]) if env != "FrozenLake-v1" else np.arange(16)
    rows = observations if env != "FrozenLake-v1" else np.eye(16, dtype=np.float32)
    expected = theirs.predict(observations, deterministic=True)[0]
    for trust in (False, True):
        name, ours = load_policy(path, *spaces_of(env), trust_pickle=trust)
        assert name == case.split()[0] and not ours.training
        np.testing.assert_array_equal(ours.predict(rows, deterministic=True)[0], expected)
        assert {n: w.shape for n, w in ours.state_dict().items()} == {
            n: w.shape for n, w in theirs.state_dict().items()
        }
        for setting in ("activation_fn", "normalize_images"):
            assert vars(ours)[setting] == vars(theirs)[setting]
        if isinstance(ours, ActorCriticPolicy) and isinstance(theirs, ActorCriticPolicy):
            values = theirs.predict_values(theirs.obs_to_tensor(observations)[0])
            torch.testing.assert_close(ours.predict_values(torch.as_tensor(rows)), values, rtol=0, atol=0)


def test_zip_of_old_gym_loads(tmp_path: Path) -> None:
    path = saved(tmp_path, PPO, "Pendulum-v1")
    expected = PPO.load(path, device="cpu").predict(
        observations := observations_of(spaces_of("Pendulum-v1")[0]), deterministic=True
    )
    edited(path, of_old_gym)
    with pytest.raises(ModuleNotFoundError, match="No module named 'gym'"):
        PPO.load(path, device="cpu")
    for trust in (False, True):
        policy = load_policy(path, *spaces_of("Pendulum-v1"), trust_pickle=trust)[1]
        np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected[0])


def test_frame_policy_from_before_1_7_loads(tmp_path: Path) -> None:
    def one_extractor(_: Any, weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name[:3] in ("pi_", "vf_")]:
            del weights[name]

    path = saved(tmp_path, PPO, Frames(), policy="CnnPolicy")
    expected = PPO.load(path, device="cpu").predict(
        observations := observations_of(Frames.observation_space), deterministic=True
    )
    policy = load_policy(edited(path, one_extractor), *spaces_of(Frames()))[1]
    np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected[0])


def test_gym_is_importable_only_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), legacy_gym():
        assert sys.modules["gym.spaces.box"] is sys.modules["gymnasium.spaces.box"]
        raise RuntimeError
    assert not [name for name in sys.modules if name.split(".")[0] == "gym"]
    monkeypatch.setitem(sys.modules, "gym", real := type(sys)("gym"))
    with legacy_gym():
        assert sys.modules["gym"] is real and "gym.spaces" not in sys.modules
    assert sys.modules["gym"] is real


def test_zip_is_unpickled_only_with_trust_pickle(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def add_pickles(data: dict[str, Any], _: Any) -> None:
        pickled = base64.b64encode(pickle.dumps(MakesFolder(mark))).decode()
        for value in data.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = pickled
        data["extra"] = {":type:": "<class 'dict'>", ":serialized:": pickled}

    path = edited(saved(tmp_path, PPO), add_pickles)
    assert load_policy(path, *spaces_of("CartPole-v1"))[0] == "ppo" and not mark.exists()
    assert "cannot unpickle" in error_of(load_policy, path, *spaces_of("CartPole-v1"), trust_pickle=True)
    assert mark.exists()  # the pickle works if it is loaded


def test_pickle_in_the_weights_is_not_executed(tmp_path: Path) -> None:
    path, mark = saved(tmp_path, PPO), tmp_path / "ran"
    edited(path, lambda _, weights: weights.update(extra=MakesFolder(mark)))  # type: ignore[call-overload]
    assert "more than weights" in error_of(load_policy, path, *spaces_of("CartPole-v1"))
    assert "more than weights" in error_of(load_policy, path, *spaces_of("CartPole-v1"), trust_pickle=True)
    assert not mark.exists()


def test_loading_does_not_seed_this_process(tmp_path: Path) -> None:
    path = saved(tmp_path, PPO, seed=3)
    drawn = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        load_policy(path, *spaces_of("CartPole-v1"), trust_pickle=True)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 2


def test_custom_policy_needs_trust_pickle(tmp_path: Path) -> None:
    both = spaces_of("CartPole-v1")
    kinds: list[dict[str, Any]] = [
        {"policy_kwargs": {"features_extractor_class": DoubledFeatures}},
        {"policy_kwargs": {"activation_fn": type("Cube", (nn.Module,), {"forward": lambda _, x: x**3})}},
        {"policy": type("Mine", (ActorCriticPolicy,), {"__module__": "elsewhere"})},
    ]
    for arguments in kinds:
        path = saved(tmp_path, PPO, **arguments)
        assert "custom policy" in (message := error_of(load_policy, path, *both))
        assert "--trust_pickle" in message and "any code" in message
        expected = PPO.load(path, device="cpu").predict(observations := observations_of(both[0]), deterministic=True)
        policy = load_policy(path, *both, trust_pickle=True)[1]
        np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected[0])
    edited(saved(tmp_path, PPO), lambda _, weights: weights.update(more=torch.zeros(1)))
    assert "do not fit the standard policy of PPO" in error_of(load_policy, path, *both)
    assert "cannot unpickle" in error_of(load_policy, path, *both, trust_pickle=True)


def test_policy_of_other_spaces_raises_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, PPO)
    errors: list[tuple[str | gym.Env, str]] = [
        ("Acrobot-v1", r"observations Box \[4\], but the environment has Box \[6\]"),
        ("FrozenLake-v1", r"observations Box \[4\], but the environment has Discrete 16"),
        (Frames(), r"observations Box \[4\], but the environment has Box \[4, 84, 84\]"),
        ("MountainCar-v0", "Ant-v5"),
    ]
    for env, message in errors:
        assert pytest.raises(UserError, load_policy, path, *spaces_of(env)).match(message)
    observed = spaces_of("CartPole-v1")[0]
    actions: list[spaces.Space] = [spaces.Discrete(3), ONE_ACTION, spaces.MultiDiscrete([2, 2])]
    for space, described in zip(actions, ("Discrete 3", r"Box \[1\]", r"MultiDiscrete \[2 2\]"), strict=True):
        for trust in (False, True):
            caught = pytest.raises(UserError, load_policy, path, observed, space, trust_pickle=trust)
            assert caught.match(f"actions Discrete 2, but the environment has {described}")
    path = saved(tmp_path, PPO, Frames(), policy="CnnPolicy")
    last = spaces.Box(0, 255, (84, 84, 3), np.uint8)
    assert "[84, 84, 3]" in error_of(load_policy, path, last, spaces.Discrete(3))


CONTRIB: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "tqc": (TQC, "Pendulum-v1", {"policy_kwargs": {"n_critics": 3, "n_quantiles": 7}}),
    "tqc gSDE": (TQC, "Pendulum-v1", {"use_sde": True, "policy_kwargs": {"net_arch": [16]}}),
    "qrdqn": (QRDQN, "CartPole-v1", {"policy_kwargs": {"n_quantiles": 9, "net_arch": [16, 8]}}),
    "trpo": (TRPO, "Pendulum-v1", {}),
    "ars": (ARS, "Pendulum-v1", {}),
    "ars linear": (ARS, "Pendulum-v1", {"policy": "LinearPolicy"}),
    "ars bias": (ARS, "Pendulum-v1", {"policy": "LinearPolicy", "policy_kwargs": {"with_bias": True}}),
    "ars discrete": (ARS, "CartPole-v1", {"policy_kwargs": {"net_arch": [8], "activation_fn": nn.Tanh}}),
    "crossq": (CrossQ, "Pendulum-v1", {"policy_kwargs": {"net_arch": [8, 6], "activation_fn": nn.Tanh}}),
    "crossq plain": (CrossQ, "Pendulum-v1", {"policy_kwargs": {"batch_norm": False}}),
    "maskable ppo": (MaskablePPO, "CartPole-v1", {"policy_kwargs": {"net_arch": [12]}}),
}


@pytest.mark.parametrize("case", CONTRIB)
def test_loaded_policy_matches_sb3_contrib(tmp_path: Path, case: str) -> None:
    algorithm, env, arguments = CONTRIB[case]

    def move_statistics(_: Any, weights: dict[str, torch.Tensor]) -> None:
        """Those of an untrained CrossQ are 0 and 1."""
        for name, weight in weights.items():
            if name.endswith(("ra_mean", "ra_var", "scale")):
                weight += torch.rand(weight.shape)

    path = edited(saved(tmp_path, algorithm, env, **arguments), move_statistics)
    theirs = algorithm.load(path, device="cpu").policy
    theirs.set_training_mode(False)
    observations = observations_of(spaces_of(env)[0])
    name, ours = load_policy(path, *spaces_of(env))
    assert case.startswith(name)
    expected = theirs.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(ours.predict(observations, deterministic=True)[0], expected, atol=1e-6)
    with torch.no_grad():
        rows = torch.as_tensor(observations)
        outputs = PolicyNetwork(ours)(rows)
        np.testing.assert_allclose(to_environment(greedy_actions(outputs), ours.action_space), expected, atol=1e-5)
        if algorithm is QRDQN:
            torch.testing.assert_close(outputs.logits, theirs.quantile_net(rows).mean(1))
        if algorithm is CrossQ:
            values = torch.cat(theirs.critic(rows, torch.as_tensor(expected) / 2), dim=1)
            torch.testing.assert_close(outputs.features["value"], values.amin(1), rtol=1e-4, atol=1e-5)
        if algorithm is TQC:
            means = theirs.critic(rows, torch.as_tensor(expected) / 2).mean(2)  # (batch, critics); actions in +-2
            torch.testing.assert_close(outputs.features["value"], means.amin(1), rtol=1e-4, atol=1e-5)


def test_linear_policy_of_old_sb3_contrib_loads(tmp_path: Path) -> None:
    def one_layer(_: Any, weights: dict[str, torch.Tensor]) -> None:
        weights["action_net.weight"] = weights.pop("action_net.0.weight")

    path = saved(tmp_path, ARS, "Pendulum-v1", policy="LinearPolicy")
    rows = observations_of(spaces_of("Pendulum-v1")[0])
    expected = ARS.load(path, device="cpu").predict(rows, deterministic=True)[0]
    policy = load_policy(edited(path, one_layer), *spaces_of("Pendulum-v1"))[1]
    np.testing.assert_array_equal(policy.predict(rows, deterministic=True)[0], expected)


def test_layers_that_actor_and_critic_share_load(tmp_path: Path) -> None:
    """Stable-Baselines3 before 1.8 has `shared_net`; the same function has equal first layers in both networks."""
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": {"pi": [8, 6, 5], "vf": [8, 6]}}, device="cpu")
    nets = model.policy.mlp_extractor
    nets.value_net[0].load_state_dict(nets.policy_net[0].state_dict())
    nets.value_net[2].load_state_dict(nets.policy_net[2].state_dict())
    model.save(path := tmp_path / "old.zip")

    def share(_: Any, weights: dict[str, torch.Tensor]) -> None:
        for layer in ("0", "2"):
            for part in ("weight", "bias"):
                weights[f"mlp_extractor.shared_net.{layer}.{part}"] = weights.pop(
                    f"mlp_extractor.policy_net.{layer}.{part}"
                )
                del weights[f"mlp_extractor.value_net.{layer}.{part}"]
        for part in ("weight", "bias"):
            weights[f"mlp_extractor.policy_net.0.{part}"] = weights.pop(f"mlp_extractor.policy_net.4.{part}")

    rows = torch.as_tensor(observations_of(spaces_of("CartPole-v1")[0]))
    policy = load_policy(edited(path, share), *spaces_of("CartPole-v1"))[1]
    assert isinstance(policy, ActorCriticPolicy)
    torch.testing.assert_close(PolicyNetwork(policy)(rows).logits, PolicyNetwork(model.policy)(rows).logits)
    torch.testing.assert_close(policy.predict_values(rows), model.policy.predict_values(rows))


def test_unsupported_policies_raise_an_error(tmp_path: Path) -> None:
    both = spaces_of("CartPole-v1")
    path = saved(tmp_path, A2C)
    edited(path, lambda data, _: data.pop("gae_lambda"))
    assert "unknown algorithm" in error_of(load_policy, path, *both)
    words = {":type:": "<class 'gymnasium.spaces.dict.Dict'>"}
    edited(saved(tmp_path, A2C), lambda data, _: data.update(observation_space=words))
    assert "Dict" in error_of(load_policy, path, *both)


@pytest.mark.parametrize(
    ("agent", "environment", "expected"),
    [
        ("ppo/Swimmer-v3_1", "Swimmer-v5", "trained in time_feature: pass --environment Swimmer-v5+time_feature"),
        ("ppo/Hopper-v3_1", "Hopper-v3", "did you mean Hopper-v5?"),
        ("trpo/Swimmer-v3_1", "Swimmer-v5", ""),
        ("ppo/MountainCar-v0_1", "MountainCar-v0", ""),
    ],
)
def test_published_agents_load_or_raise_the_right_error(
    shared: Path, agent: str, environment: str, expected: str
) -> None:
    path = str(shared / "agents" / agent)
    if expected:
        assert expected in error_of(load_agent, path, environment)
        return
    loaded = load_agent(path, environment)
    assert loaded.name.startswith(agent.partition("/")[0]) and loaded.source.endswith("vecnormalize.pkl")
    assert not any("VecNormalize" in warning for warning in loaded.warnings)


def test_non_finite_weights_raise_an_error(tmp_path: Path) -> None:
    def break_one(_: Any, weights: dict[str, torch.Tensor]) -> None:
        weights["action_net.bias"].fill_(np.nan)

    path = edited(saved(tmp_path, PPO), break_one)
    message = error_of(Agent.load, TeacherFiles(path, None), *spaces_of("CartPole-v1"))
    assert "weights that are not finite (action_net.bias)" in message


def test_damaged_zip_raises_an_error(tmp_path: Path) -> None:
    both = spaces_of("CartPole-v1")
    path = saved(tmp_path, PPO)
    whole = path.read_bytes()
    for content in (b"", b"no zip at all", whole[: len(whole) // 2], whole.replace(b"policy_net", b"policy\n\xffe")):
        path.write_bytes(content)
        assert str(path) in error_of(load_policy, path, *both)
    assert "model.save" in error_of(load_policy, tmp_path / "absent.zip", *both)
    for files in ({"data": b"{}"}, {"data": b"[]", "policy.pth": b"x"}):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        assert str(path) in error_of(load_policy, path, *both)


# Statistics


def normalizing(path: Path, **arguments: Any) -> Any:
    """A VecNormalize after some steps, saved at `path`."""
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), **arguments)
    env.reset()
    for _ in range(5):
        env.step(np.ones((2, 1), np.float32))
    env.save(str(path))
    return env


def expected_of(statistics: Statistics | None, observations: np.ndarray) -> np.ndarray:
    assert isinstance(statistics, ObservationStatistics)
    scaled = (observations - statistics.mean) / np.sqrt(statistics.var + statistics.epsilon)
    return np.clip(scaled, -statistics.clip, statistics.clip).astype(np.float32)


def test_statistics_normalize_as_vec_normalize(tmp_path: Path) -> None:
    path = tmp_path / "vecnormalize.pkl"
    env = normalizing(path, clip_obs=1.5, epsilon=1e-3)
    observations = observations_of(env.observation_space)
    expected = env.normalize_obs(observations)
    assert (np.abs(expected) == 1.5).any()
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(env, protocol))
        np.testing.assert_array_equal(expected_of(read_statistics(path), observations), expected)
    env.obs_rms.mean = np.asfortranarray(env.obs_rms.mean.reshape(3, 1))
    env.epsilon = np.float32(0.5)
    env.obs_rms.var = np.arange(6.0).reshape(3, 2).T.reshape(3, 2, order="F")[:, :1]
    path.write_bytes(pickle.dumps(env))
    statistics = read_statistics(path)
    assert isinstance(statistics, ObservationStatistics) and statistics.epsilon == 0.5
    np.testing.assert_array_equal(statistics.mean, env.obs_rms.mean)
    np.testing.assert_array_equal(statistics.var, env.obs_rms.var)


def test_statistics_of_old_gym_and_numpy(tmp_path: Path) -> None:
    env = normalizing(path := tmp_path / "vecnormalize.pkl")
    old = pickle.dumps(env, 3).replace(b"gymnasium.", b"gym.").replace(b"numpy._core.", b"numpy.core.")
    assert b"cgym.spaces" in old and b"cnumpy.core.multi" in old
    path.write_bytes(old)
    observations = observations_of(env.observation_space)
    np.testing.assert_array_equal(expected_of(read_statistics(path), observations), env.normalize_obs(observations))


def test_statistics_of_rewards_only(tmp_path: Path) -> None:
    normalizing(tmp_path / "vecnormalize.pkl", norm_obs=False)
    assert read_statistics(tmp_path / "vecnormalize.pkl") is None


def test_non_finite_statistics_raise_an_error(tmp_path: Path) -> None:
    env = normalizing(path := tmp_path / "vecnormalize.pkl")
    for part, value in (("mean", np.inf), ("var", np.nan), ("var", -1.0)):
        kept = getattr(env.obs_rms, part)
        setattr(env.obs_rms, part, np.full_like(kept, value))
        path.write_bytes(pickle.dumps(env))
        assert "not finite, or its variances not positive" in error_of(read_statistics, path)
        setattr(env.obs_rms, part, kept)


def test_statistics_of_other_observations_raise_an_error(tmp_path: Path) -> None:
    path = tmp_path / "vecnormalize.pkl"
    env = normalizing(path)
    statistics = read_statistics(path)
    assert statistics is not None
    box_statistics(statistics, env.observation_space, path)
    message = error_of(box_statistics, statistics, spaces_of("CartPole-v1")[0], path)
    assert "(3,)" in message and "(4,)" in message and str(path) in message
    env.obs_rms = {"position": env.obs_rms}
    path.write_bytes(pickle.dumps(env))
    by_key = read_statistics(path)
    for space in env.observation_space, spaces.Dict({"speed": env.observation_space}):
        assert "has statistics of the keys position, but" in error_of(box_statistics, by_key, space, path)
    assert "of key position of shape (3,)" in error_of(
        box_statistics, by_key, spaces.Dict({"position": spaces.Discrete(3)}), path
    )


def malicious_pickles(mark: Path) -> dict[str, bytes]:
    """Pickles that make a folder: by a function, a shell, eval, an old opcode, numpy, getattr, a dotted name."""
    shell, code = f"mkdir {mark}", f"__import__('os').mkdir({str(mark)!r})"
    return {
        "function": pickle.dumps(MakesFolder(mark)),
        "shell": f"cos\nsystem\n(V{shell}\ntR.".encode(),
        "eval": f"cbuiltins\neval\n(V{code}\ntR.".encode(),
        "old opcode": f"(V{shell}\nios\nsystem\n.".encode(),
        "numpy": f"cnumpy.testing._private.utils\nrunstring\n(V{code}\n(dtR.".encode(),
        "getattr": f"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR(V{shell}\ntR.".encode(),
        "dotted name": f"\x80\x04\x8c\x07pathlib\x8c\x10os.path.os.mkdir\x93(V{mark}\ntR.".encode("latin-1"),
    }


@pytest.mark.parametrize("kind", malicious_pickles(Path()))
def test_malicious_statistics_are_not_executed(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "vecnormalize.pkl"
    path.write_bytes(malicious_pickles(mark)[kind])
    assert "cannot be read" in error_of(read_statistics, path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # the pickle works if it is loaded


def test_malicious_part_of_statistics_is_not_executed(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "vecnormalize.pkl"
    env = normalizing(path)
    env.old_reward = MakesFolder(mark)
    path.write_bytes(pickle.dumps(env))
    assert read_statistics(path) is not None
    env.obs_rms.mean = MakesFolder(mark)
    path.write_bytes(pickle.dumps(env))
    assert "mkdir where numbers should be" in error_of(read_statistics, path)
    env.obs_rms.mean = np.array([print, None, 1], object)
    path.write_bytes(pickle.dumps(env))
    assert "numbers of type O8" in error_of(read_statistics, path)
    assert not mark.exists()


def test_damaged_statistics_raise_an_error(tmp_path: Path) -> None:
    path = tmp_path / "vecnormalize.pkl"
    normalizing(path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"text",
        whole[:100],
        whole.replace(b"clip_obs", b"clip_obx"),
        pickle.dumps({"norm_obs": True}),
    ):
        path.write_bytes(content)
        assert "VecNormalize.save" in error_of(read_statistics, path)
    assert "cannot be read" in error_of(read_statistics, tmp_path / "absent.pkl")


# Files


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_teacher_to_train_has_no_files() -> None:
    assert find_teacher("train", "CartPole-v1") is None


@pytest.mark.parametrize(
    "policy, statistics",
    [
        ("model.zip", None),
        ("model.zip", "vec_normalize.pkl"),
        ("stages/teacher/model.zip", "stages/teacher/vecnormalize.pkl"),
        ("stages/teacher/ALE-Pong-v5-difficulty-1/model.zip", None),  # trained with arguments of the environment
        ("student.zip", "vecnormalize.pkl"),
        ("student/student.zip", "student/vec_normalize.pkl"),
        ("ALE-Pong-v5.zip", "ALE-Pong-v5/vecnormalize.pkl"),
        ("best_model.zip", "ALE-Pong-v5/vecnormalize.pkl"),
        ("anything.zip", "anything/vecnormalize.pkl"),
        ("ppo-Pong.zip", "vec_normalize.pkl"),
    ],
)
def test_teacher_and_statistics_are_found_in_a_folder(tmp_path: Path, policy: str, statistics: str | None) -> None:
    touch(tmp_path / policy, tmp_path / "train_eval_metrics.zip", *([tmp_path / statistics] if statistics else []))
    expected = TeacherFiles(tmp_path / policy, tmp_path / statistics if statistics else None)
    assert find_teacher(str(tmp_path), "ALE/Pong-v5") == expected
    assert find_teacher(str(tmp_path / policy), "ALE/Pong-v5") == expected


def test_checkpoint_uses_the_statistics_of_its_step(tmp_path: Path) -> None:
    names = [f"rl_model_{kind}{steps}_steps" for kind in ("", "vecnormalize_") for steps in (8000, 24000)]
    touch(
        *(tmp_path / f"{name}.{'pkl' if 'norm' in name else 'zip'}" for name in names), tmp_path / "vecnormalize.pkl"
    )
    touch(tmp_path / "rl_model_replay_buffer_8000_steps.pkl")
    for steps in (8000, 24000):
        policy = tmp_path / f"rl_model_{steps}_steps.zip"
        statistics = tmp_path / f"rl_model_vecnormalize_{steps}_steps.pkl"
        assert find_teacher(str(policy), "CartPole-v1") == TeacherFiles(policy, statistics)


def test_statistics_whose_name_does_not_match_need_a_flag(tmp_path: Path) -> None:
    policy, other = tmp_path / "ppo.zip", tmp_path / "my_norm.pkl"
    touch(policy)
    normalizing(other)
    message = error_of(find_teacher, str(policy), "Pendulum-v1", flag="--teacher_vecnormalize")
    assert str(other) in message and f"--teacher_vecnormalize {other}" in message
    assert find_teacher(str(policy), "Pendulum-v1", str(other)) == TeacherFiles(policy, other)
    assert find_teacher(str(policy), "Pendulum-v1", "none") == TeacherFiles(policy, None, raw=True)
    assert "there is no file nowhere.pkl" in error_of(find_teacher, str(policy), "Pendulum-v1", "nowhere.pkl")
    normalizing(tmp_path / "rl_model_vecnormalize_8_steps.pkl")  # of another step than the model
    policy = policy.rename(tmp_path / "rl_model_16_steps.zip")
    assert "my_norm.pkl" in error_of(find_teacher, str(policy), "Pendulum-v1")
    other.write_bytes(other.read_bytes()[:200])
    assert "8_steps.pkl" in error_of(find_teacher, str(policy), "Pendulum-v1")


def test_other_statistics_next_to_those_in_use_give_a_warning(tmp_path: Path) -> None:
    touch(policy := tmp_path / "ppo.zip")
    normalizing(tmp_path / "vecnormalize.pkl")
    normalizing(tmp_path / "my_norm.pkl")
    files = find_teacher(str(policy), "Pendulum-v1")
    assert files is not None and files.statistics == tmp_path / "vecnormalize.pkl"
    assert [warning.partition(" is not used")[0] for warning in files.warnings] == [str(tmp_path / "my_norm.pkl")]


def test_pickle_without_statistics_is_ignored_with_a_warning(tmp_path: Path) -> None:
    touch(tmp_path / "ppo.zip", tmp_path / "replay_buffer.pkl")
    (tmp_path / "else.pkl").write_bytes(pickle.dumps({"rows": 3}))
    normalizing(tmp_path / "rewards.pkl", norm_obs=False)
    files = find_teacher(str(tmp_path / "ppo.zip"), "Pendulum-v1")
    assert files is not None and files.statistics is None
    assert [warning.partition(" is not used")[0] for warning in files.warnings] == [
        str(tmp_path / name) for name in ("else.pkl", "rewards.pkl")
    ]


def test_missing_statistics_of_vec_normalize_give_a_warning(tmp_path: Path) -> None:
    def warnings_of(path: Path, **more: Any) -> str:
        return " ".join(Agent.load(TeacherFiles(path, None, **more), *spaces_of("Pendulum-v1")).warnings)

    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8).save(path := tmp_path / "a.zip")
    assert "was trained with VecNormalize, but no statistics were found" in warnings_of(path)
    assert warnings_of(path, raw=True) == ""
    PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8).save(path)
    assert warnings_of(path) == ""
    DQN("MlpPolicy", "CartPole-v1", learning_starts=2, buffer_size=9, device="cpu").learn(8).save(path)
    assert Agent.load(TeacherFiles(path, None), *spaces_of("CartPole-v1")).warnings == ()


def test_usual_names_are_preferred(tmp_path: Path) -> None:
    touch(tmp_path / "best_model.zip", tmp_path / "rl_model_100_steps.zip", tmp_path / "CartPole-v1.zip")
    found = find_teacher(str(tmp_path), "CartPole-v1")
    assert found and found.policy.name == "CartPole-v1.zip"
    found = find_teacher(str(tmp_path), "CartPole-v2")
    assert found and found.policy.name == "best_model.zip"
    (tmp_path / "best_model.zip").unlink()
    message = error_of(find_teacher, str(tmp_path), "CartPole-v2")
    assert "(CartPole-v1.zip, rl_model_100_steps.zip)" in message and "--teacher" in message
    assert "no zip" in error_of(find_teacher, str(tmp_path.parent), "CartPole-v1")


ORDERED = "!!python/object/apply:collections.OrderedDict\n- - - n_envs\n    - 16\n  - - normalize\n    - {}\n"


@pytest.mark.parametrize(
    "settings, normalized",
    [
        (ORDERED.format("true"), True),
        (ORDERED.format("false"), False),
        (ORDERED.format("\"{'norm_obs': True, 'norm_reward': False}\""), True),
        (ORDERED.format("\"{'norm_obs': False, 'norm_reward': True}\""), False),
        (ORDERED.format("dict(norm_obs=True, norm_reward=False)"), True),
        (ORDERED.format("dict(norm_obs=False, norm_reward=True)"), False),
        (ORDERED.format("{norm_obs: false, gamma: 0.9}"), False),
        (ORDERED.format("{gamma: !!python/name:os.system , extra: !<!elsewhere> [1]}"), True),
        ("normalize: true\nn_envs: !!python/tuple [1, 2]\n", True),
        ("n_envs: 1\n", False),
    ],
)
def test_normalized_observations_need_statistics(tmp_path: Path, settings: str, normalized: bool) -> None:
    touch(tmp_path / "CartPole-v1.zip", tmp_path / "best_model.zip", tmp_path / "CartPole-v1" / "config.yml")
    (tmp_path / "CartPole-v1" / "config.yml").write_text(settings)
    if not normalized:
        assert find_teacher(str(tmp_path), "CartPole-v1") == TeacherFiles(tmp_path / "CartPole-v1.zip", None)
        return
    message = error_of(find_teacher, str(tmp_path), "CartPole-v1")
    assert f"put the file that VecNormalize saved at {tmp_path / 'vecnormalize.pkl'}" in message
    assert "vecnormalize.pkl" in error_of(find_teacher, str(tmp_path / "best_model.zip"), "CartPole-v2")
    touch(tmp_path / "vecnormalize.pkl")
    assert find_teacher(str(tmp_path), "CartPole-v1") == TeacherFiles(
        tmp_path / "CartPole-v1.zip", tmp_path / "vecnormalize.pkl"
    )


def test_config_is_not_executed(tmp_path: Path) -> None:
    touch(tmp_path / "a.zip")
    mark, config = tmp_path / "ran", tmp_path / "config.yml"
    config.write_text(f"normalize: !!python/object/apply:os.mkdir [{mark}]\n")
    assert "vecnormalize.pkl" in error_of(find_teacher, str(tmp_path), "CartPole-v1")
    assert not mark.exists()
    for damaged in ("normalize: [", "7", "- 7", "", "? [a]\n: b"):
        config.write_text(damaged)
        assert "config.yml is damaged" in error_of(find_teacher, str(tmp_path), "CartPole-v1")


@pytest.mark.parametrize("name", ["absent.zip", "runs/absent.zip", "./runs/absent", "/no/such/folder", "trained"])
def test_missing_path_raises_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(find_teacher, name, "CartPole-v1")
    assert f"no teacher at {name}" in message and "--teacher" in message


def test_hub_cache_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = error_of(find_teacher, "sb3/ppo-CartPole-v1", "CartPole-v1")
    assert "Hub cannot be reached" in message and "--teacher a local .zip" in message
    cached = tmp_path / "models--sb3--ppo-CartPole-v1"
    snapshot = cached / "snapshots" / "0123"
    touch(snapshot / "ppo-CartPole-v1.zip", snapshot / "vec_normalize.pkl", cached / "refs" / "main")
    (cached / "refs" / "main").write_text("0123")
    files = TeacherFiles(snapshot / "ppo-CartPole-v1.zip", snapshot / "vec_normalize.pkl")
    assert find_teacher("sb3/ppo-CartPole-v1", "CartPole-v1") == files
