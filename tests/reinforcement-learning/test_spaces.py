"""Dict, Discrete, MultiDiscrete and MultiBinary observations, frames with the channels last, and actions of several
components, compared with Stable-Baselines3.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import maybe_transpose, preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, to_environment, training_environments
from kd.reinforcement_learning.data.observations import BoxObservation, box_space
from kd.reinforcement_learning.teacher_model.files import TeacherFiles
from kd.reinforcement_learning.teacher_model.policies import greedy
from kd.reinforcement_learning.teacher_model.teacher import Agent
from kd_testing.known_answer import KnownAnswerSpaces

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
SPACES = KnownAnswerSpaces.OBSERVATIONS
VECTORS = [kind for kind in SPACES if kind != "frames"]


def extracted(space: gym.Space, observations) -> np.ndarray:
    """The features that the policy of Stable-Baselines3 computes from a batch of observations."""
    batch = (
        {key: torch.as_tensor(values) for key, values in observations.items()}
        if isinstance(space, Dict)
        else torch.as_tensor(observations)
    )
    extractor = CombinedExtractor(space) if isinstance(space, Dict) else FlattenExtractor(space)
    return extractor(preprocess_obs(batch, space)).numpy()


def twins(id: str, count: int, mode: AutoresetMode, **kwargs) -> tuple[Environments, gym.vector.VectorEnv]:
    """Our environments, and the original ones with the same seeds."""
    original = gym.make_vec(id, count, "sync", {"autoreset_mode": mode}, **kwargs)
    return Environments(id, count, 7, autoreset=mode, **kwargs), original


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_are_those_of_stable_baselines3(kind, mode):
    environments, original = twins("KnownAnswerSpaces-v0", 3, mode, observations=kind, actions="Discrete")
    observations, _ = original.reset(seed=7)
    assert environments.original_space == original.single_observation_space == SPACES[kind]
    space = environments.observation_space
    assert space == box_space(SPACES[kind]) and space.dtype == np.float32 and len(space.shape) == 1
    for _ in range(25):
        expected = extracted(SPACES[kind], observations)
        np.testing.assert_array_equal(environments.observations, expected)
        assert environments.observations.dtype == np.float32
        assert all(row in space for row in environments.observations)
        actions = original.action_space.sample()
        step = environments.step(actions)
        observations, rewards, _, truncated, infos = original.step(actions)
        np.testing.assert_array_equal(step.rewards, rewards)
        if mode == SAME_STEP and truncated.any():
            final = (
                [np.stack([one[key] for one in infos["final_obs"]]) for key in SPACES[kind]] if kind == "Dict" else []
            )
            batch = dict(zip(SPACES["Dict"], final, strict=True)) if final else np.stack(infos["final_obs"])
            np.testing.assert_array_equal(step.final_observations, extracted(SPACES[kind], batch))


@pytest.mark.parametrize("id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1"])
def test_discrete_observations_of_gymnasium(id):
    environments, original = twins(id, 2, NEXT_STEP)
    observations, _ = original.reset(seed=7)
    np.testing.assert_array_equal(environments.observations.argmax(1), observations)
    np.testing.assert_array_equal(environments.observations.sum(1), 1)


def test_tuple_observations_are_flattened_by_the_wrapper_that_the_error_names():
    environments = Environments("Blackjack-v1+gymnasium.wrappers:FlattenObservation", 2)
    assert environments.observations.shape == (2, 32 + 11 + 2) and environments.original_space.dtype == np.int64


def test_frames_with_channels_last():
    environments, original = twins("KnownAnswerSpaces-v0", 2, SAME_STEP, observations="frames", actions="Discrete")
    observations, _ = original.reset(seed=7)
    assert environments.observation_space == Box(0, 255, (3, 40, 36), np.uint8)
    for _ in range(10):
        np.testing.assert_array_equal(
            environments.observations, maybe_transpose(observations, environments.observation_space)
        )
        step = environments.step([0, 1])
        observations, *_, infos = original.step(np.array([0, 1]))
    final = maybe_transpose(np.stack(infos["final_obs"]), environments.observation_space)
    np.testing.assert_array_equal(step.final_observations, final)


def test_vector_entry_point_with_other_observations_is_not_used(monkeypatch):
    monkeypatch.setattr(gym.registry["KnownAnswerSpaces-v0"], "vector_entry_point", vectorized)
    assert isinstance(Environments("KnownAnswerSpaces-v0", 2, actions="Discrete").vector.envs[0], BoxObservation)


def vectorized(num_envs: int, **kwargs) -> gym.vector.VectorEnv:
    return gym.vector.SyncVectorEnv([KnownAnswerSpaces] * num_envs)


# Policies of Stable-Baselines3


def original(kind: str, actions: str) -> DummyVecEnv:
    return DummyVecEnv([lambda: KnownAnswerSpaces(kind, actions)] * 2)


def sampled(kind: str, rows: int = 30) -> Any:
    """A batch of observations of the original environment."""
    environment = gym.make_vec("KnownAnswerSpaces-v0", rows, "sync", observations=kind)
    return environment.reset(seed=5)[0]


def as_box(kind: str, observations: Any) -> torch.Tensor:
    if kind == "frames":
        return torch.as_tensor(maybe_transpose(observations, box_space(SPACES[kind])))
    return torch.as_tensor(extracted(SPACES[kind], observations))


ALGORITHMS = {"ppo": PPO, "a2c": A2C, "dqn": DQN, "sac": SAC, "td3": TD3}
POLICY = {"Dict": "MultiInputPolicy", "frames": "CnnPolicy"}
SMALL = {"net_arch": [16]}


def untrained(
    algorithm: str, kind: str, actions: str, environments: VecEnv | None = None, **kwargs: Any
) -> BaseAlgorithm:
    environments = environments or original(kind, actions)
    kwargs |= {"buffer_size": 10} if algorithm in ("dqn", "sac", "td3") else {}
    chosen: Any = ALGORITHMS[algorithm]
    return chosen(
        POLICY.get(kind, "MlpPolicy"), environments, policy_kwargs=dict(SMALL), device="cpu", seed=1, **kwargs
    )


def load(path: Path, kind: str, actions: str, statistics: Path | None = None) -> Agent:
    return Agent.load(TeacherFiles(path, statistics), SPACES[kind], KnownAnswerSpaces.ACTIONS[actions])


@pytest.mark.parametrize(
    ("algorithm", "kind", "actions"),
    [
        *(("ppo", kind, "Discrete") for kind in VECTORS),
        ("dqn", "Discrete", "Discrete"),
        ("dqn", "Dict", "Discrete"),
        ("a2c", "Dict", "Box"),
        ("sac", "Dict", "Box"),
        ("td3", "Dict", "Box"),
        ("ppo", "frames", "Discrete"),
    ],
)
def test_loaded_policy_acts_as_in_stable_baselines3(algorithm, kind, actions, tmp_path):
    model = untrained(algorithm, kind, actions)
    model.save(tmp_path / "model.zip")
    network = load(tmp_path / "model.zip", kind, actions).network()
    observations = sampled(kind)
    expected, _ = model.predict(observations, deterministic=True)
    ours = to_environment(greedy(network)(as_box(kind, observations)), KnownAnswerSpaces.ACTIONS[actions])
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_statistics_of_keys_are_those_of_vec_normalize(tmp_path):
    """With statistics of one key, as saved by the environment, and the clip reached."""
    environments = VecNormalize(original("Dict", "Discrete"), norm_obs_keys=["position"], clip_obs=0.5)
    model = untrained("ppo", "Dict", "Discrete", environments, n_steps=8, batch_size=8)
    model.learn(32)
    model.save(tmp_path / "model.zip"), environments.save(str(tmp_path / "vecnormalize.pkl"))
    agent = load(tmp_path / "model.zip", "Dict", "Discrete", tmp_path / "vecnormalize.pkl")
    observations = sampled("Dict")
    normalized = environments.normalize_obs(observations)
    assert (np.abs(normalized["position"]) == 0.5).any()
    tensors, _ = model.policy.obs_to_tensor(normalized)
    logits = agent.network()(as_box("Dict", observations)).logits
    expected = model.policy.get_distribution(tensors).distribution.logits
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


def test_agent_of_other_keys_raises_an_error(tmp_path):
    untrained("ppo", "Dict", "Discrete").save(tmp_path / "model.zip")
    spaces = {
        "position": Box(0, 1, (1, 3)),
        **{key: part for key, part in SPACES["Dict"].items() if key != "position"},
    }
    with pytest.raises(
        UserError, match=r"low: MultiBinary\(1\).*position: Box\(1, 2\), but the environment has Dict .*1, 3"
    ):
        Agent.load(TeacherFiles(tmp_path / "model.zip", None), Dict(spaces), Discrete(3))
    with pytest.raises(UserError, match=r"observations Dict .* but the environment has Discrete 6"):
        load(tmp_path / "model.zip", "Discrete", "Discrete")


@pytest.mark.parametrize("kind", SPACES)
def test_saved_models_act_on_the_original_observations(kind, tmp_path):
    """Also after the training here, and after another one in Stable-Baselines3."""
    id = f'KnownAnswerSpaces-v0{{"observations": "{kind}", "actions": "Discrete"}}'
    environments = training_environments(id, 2, 0)
    kwargs = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
    policy = "CnnPolicy" if kind == "frames" else "MlpPolicy"
    model = PPO(policy, environments, policy_kwargs=dict(SMALL), device="cpu", seed=0, **kwargs)
    model.learn(16)
    agent = Agent.trained("teacher", model)
    agent.save_pretrained(tmp_path)
    loaded = PPO.load(tmp_path / "model.zip", original(kind, "Discrete"), device="cpu")
    assert loaded.observation_space == (box_space(SPACES[kind]) if kind == "frames" else SPACES[kind])
    observations = sampled(kind)
    ours = greedy(agent.network())(as_box(kind, observations))
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], ours)
    again = load(tmp_path / "model.zip", kind, "Discrete")
    torch.testing.assert_close(greedy(again.network())(as_box(kind, observations)), ours)
    before = loaded.policy.state_dict()["action_net.weight"].clone()
    loaded.learn(16)
    assert not torch.equal(loaded.policy.state_dict()["action_net.weight"], before)
