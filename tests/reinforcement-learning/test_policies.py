"""The outputs of a policy network are those of Stable-Baselines3, for every kind of policy."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.environments import to_environment
from kd.reinforcement_learning.teacher_model.policies import (
    ObservationStatistics,
    PolicyNetwork,
    entropy,
    greedy_actions,
    sampled_actions,
    temperature_for_entropy,
)
from kd.reinforcement_learning.teacher_model.teacher import Agent, average_policies


def observations(model: BaseAlgorithm, count: int = 50) -> np.ndarray:
    space = model.observation_space
    assert isinstance(space, gym.spaces.Box) and space.shape
    return np.random.default_rng(0).normal(size=(count, *space.shape)).astype(np.float32)


def outputs_of(model: BaseAlgorithm, rows: np.ndarray, value: bool = True) -> Outputs:
    with torch.no_grad():
        outputs: Outputs = PolicyNetwork(model.policy)(torch.as_tensor(rows), value=value)
    return outputs


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_actor_critic_with_discrete_actions(algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": {"pi": [8], "vf": [5, 5]}}, device="cpu")
    rows = observations(model)
    outputs, tensor = outputs_of(model, rows), torch.as_tensor(rows)
    expected = model.policy.get_distribution(tensor).distribution.logits
    assert torch.allclose(outputs.logits.log_softmax(-1), expected, atol=1e-6)
    assert torch.allclose(outputs.features["value"], model.policy.predict_values(tensor).flatten(), atol=1e-6)
    assert "value" not in outputs_of(model, rows, value=False).features


def test_actor_critic_with_continuous_actions():
    model = PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"log_std_init": -0.7}, device="cpu")
    rows = observations(model)
    features, expected = (
        outputs_of(model, rows).features,
        model.policy.get_distribution(torch.as_tensor(rows)).distribution,
    )
    assert torch.allclose(features["mean"], expected.mean, atol=1e-6)
    assert torch.allclose(features["log_std"].exp(), expected.stddev, atol=1e-6)


def test_q_values():
    model = DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu")
    rows = observations(model)
    outputs = outputs_of(model, rows)
    assert torch.allclose(outputs.logits, model.q_net(torch.as_tensor(rows)), atol=1e-6)
    assert torch.equal(outputs.features["value"], outputs.logits.amax(1))
    assert (greedy_actions(outputs).numpy() == model.predict(rows, deterministic=True)[0]).all()


def test_squashed_gaussian_has_the_deterministic_action_and_the_sampled_deviation():
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")  # actions from -2 to 2
    rows = observations(model, 5)
    with torch.no_grad():
        model.policy.actor.log_std.bias.fill_(-0.5)
        model.policy.actor.mu.bias.fill_(0.8)
    features = outputs_of(model, rows).features
    assert np.allclose(features["mean"].numpy(), model.predict(rows, deterministic=True)[0], atol=1e-5)
    drawn = np.stack([model.predict(rows, deterministic=False)[0] for _ in range(4000)])  # (draws, rows, 1)
    assert np.allclose(features["log_std"].exp().numpy(), drawn.std(0), rtol=0.05)
    critics = model.critic(torch.as_tensor(rows), features["mean"] / 2)
    assert torch.allclose(features["value"], torch.cat(critics, 1).amin(1), atol=1e-5)


@pytest.mark.parametrize("squash", [False, True])
def test_actor_critic_with_gsde_has_the_deviation_of_its_noise(squash):
    policy = {"log_std_init": -1.0, "squash_output": squash}
    model = PPO("MlpPolicy", "Pendulum-v1", use_sde=True, policy_kwargs=policy, device="cpu")
    rows = observations(model, 5)
    features = outputs_of(model, rows).features
    assert np.allclose(features["mean"].numpy(), model.predict(rows, deterministic=True)[0], atol=1e-5)
    drawn = []
    for _ in range(4000):
        model.policy.reset_noise()
        with torch.no_grad():
            action = model.policy.get_distribution(torch.as_tensor(rows)).sample().numpy()
        drawn.append(model.policy.unscale_action(action) if squash else action)
    assert np.allclose(features["log_std"].exp().numpy(), np.std(drawn, axis=0), rtol=0.05)


def test_deterministic_policy_has_no_log_std():
    model = TD3("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    rows = observations(model)
    outputs = outputs_of(model, rows)
    assert np.allclose(outputs.features["mean"].numpy(), model.predict(rows, deterministic=True)[0], atol=1e-5)
    assert "log_std" not in outputs.features
    assert torch.equal(sampled_actions(outputs, torch.Generator()), outputs.features["mean"])


def test_statistics_are_applied_as_vecnormalize_does():
    environment = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), clip_obs=1.5)
    model = PPO("MlpPolicy", environment, n_steps=64, batch_size=64, device="cpu").learn(128)
    network = Agent.trained("teacher", model).network()
    rows = 3 * observations(model)
    expected = model.policy.get_distribution(torch.as_tensor(environment.normalize_obs(rows))).distribution.logits
    assert torch.allclose(network(torch.as_tensor(rows)).logits.log_softmax(-1), expected, atol=1e-5)


def test_temperature_divides_the_logits():
    network = PolicyNetwork(DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu").policy)
    rows = torch.randn(4, 4)
    plain = network(rows).logits
    network.temperature = 0.5
    assert torch.allclose(network(rows).logits, 2 * plain)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_temperature_for_entropy_reaches_its_target_at_any_scale(share):
    q_values = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    temperature = temperature_for_entropy(q_values, share)
    assert entropy(q_values / temperature).mean().item() == pytest.approx(share * np.log(6), abs=1e-4)
    assert temperature_for_entropy(1000 * q_values, share) == pytest.approx(1000 * temperature, rel=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        temperature_for_entropy(q_values, 1.0)


def test_sampled_actions_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2])
    drawn = sampled_actions(Outputs(logits=p.log().expand(20_000, 3)), generator)
    assert torch.allclose(drawn.bincount(minlength=3) / 20_000, p, atol=0.015)
    features = {"mean": torch.full((20_000, 1), 2.0), "log_std": torch.full((20_000, 1), -1.0)}
    drawn = sampled_actions(Outputs(features=features), generator)
    assert drawn.mean().item() == pytest.approx(2.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(np.exp(-1), abs=0.02)


def test_environment_actions_stay_within_bounds():
    space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
    clipped = to_environment(torch.tensor([[-3.0, 2.0], [0.5, 9.0]]), space)
    assert clipped.dtype == np.float32 and clipped.tolist() == [[-1.0, 2.0], [0.5, 5.0]]


def test_average_of_discrete_policies_is_the_geometric_mean_at_their_temperatures():
    models = [PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu"), DQN("MlpPolicy", "CartPole-v1", buffer_size=10)]
    statistics = ObservationStatistics(np.full(4, 0.3), np.full(4, 4.0), 0.0, 10.0)
    networks = [Agent("ppo", models[0].policy, statistics).network(), Agent("dqn", models[1].policy).network()]
    networks[1].temperature = 0.05
    rows = observations(models[0])
    first = outputs_of(models[0], ((rows - 0.3) / 2).clip(-10, 10).astype(np.float32))
    second = outputs_of(models[1], rows)
    with torch.no_grad():
        outputs = average_policies(networks)(torch.as_tensor(rows))
    product = first.logits.softmax(-1).sqrt() * (second.logits / 0.05).softmax(-1).sqrt()
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(outputs.logits.softmax(-1), expected, atol=1e-6, rtol=1e-5)
    values = (first.features["value"] + second.features["value"]) / 2
    torch.testing.assert_close(outputs.features, {"value": values})
    assert average_policies(networks)(torch.as_tensor(rows), value=False).features == {}


def test_average_of_continuous_policies_has_the_mean_action_and_the_mean_log_std():
    models = [
        PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"log_std_init": start}, seed=seed, device="cpu")
        for seed, start in enumerate((-0.7, 0.1))
    ]
    rows = observations(models[0])
    first, second = (outputs_of(model, rows).features for model in models)
    networks = [Agent("ppo", model.policy).network() for model in models]
    with torch.no_grad():
        outputs = average_policies(networks)(torch.as_tensor(rows))
    assert outputs.logits is None
    torch.testing.assert_close(outputs.features["mean"], (first["mean"] + second["mean"]) / 2)
    torch.testing.assert_close(outputs.features["log_std"], torch.full((len(rows), 1), -0.3))
    torch.testing.assert_close(outputs.features["value"], (first["value"] + second["value"]) / 2)

    deterministic = TD3("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    networks.append(Agent("td3", deterministic.policy).network())
    with torch.no_grad():
        outputs = average_policies(networks)(torch.as_tensor(rows))
    assert set(outputs.features) == {"mean", "value"}
