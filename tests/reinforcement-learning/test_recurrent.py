"""Recurrent teachers: RecurrentPPO of sb3-contrib, loaded without it."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data.environments import Environments, SB3Environments, to_environment
from kd.reinforcement_learning.data.rollouts import Observations, Recorder, in_one_episode, play_in, predict
from kd.reinforcement_learning.student_model.exportable import load as exportable
from kd.reinforcement_learning.teacher_model.policies import greedy, sampling
from kd.reinforcement_learning.teacher_model.recurrent import lstm_step
from kd.reinforcement_learning.teacher_model.teacher import load_agent
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

SCRIPTS = REPO / "reinforcement-learning" / "scripts"
DISTILL, EVALUATE = str(SCRIPTS / "distill_policy.py"), str(SCRIPTS / "evaluate.py")
HIDDEN = 'CartPole-v1+select{"indices": [0, 2]}'  # positions without velocities
SIZES: dict[str, dict[str, Any]] = {
    "two LSTMs": {"lstm_hidden_size": 6, "n_lstm_layers": 2},
    "shared": {"lstm_hidden_size": 8, "shared_lstm": True, "enable_critic_lstm": False},
    "linear critic": {"lstm_hidden_size": 8, "enable_critic_lstm": False, "net_arch": [5]},
    "own extractors": {"lstm_hidden_size": 8, "share_features_extractor": False},
}


def train(environment: str, path: Path, normalize: bool = False, **policy: Any) -> RecurrentPPO:
    """Saves a model of a short training, whose actions depend clearly on its inputs."""
    made: Any = SB3Environments(environment, 2)
    made = VecNormalize(made, gamma=0.9) if normalize else made
    keywords: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
    model = RecurrentPPO("MlpLstmPolicy", made, policy_kwargs=policy, learning_rate=0.01, **keywords).learn(64)
    factors = {"action_net.weight": 100, "action_net.bias": 0, "lstm_actor.weight_ih_l0": 30}
    with torch.no_grad():
        for name, factor in factors.items():
            model.policy.get_parameter(name).mul_(factor)
    model.save(path)
    if normalize:
        made.save(str(path.parent / "vecnormalize.pkl"))
    return model


def test_a_step_is_that_of_torch():
    lstm, rows = nn.LSTM(3, 5, 2), torch.randn(7, 3)
    states = torch.randn(2, 2, 7, 5)
    expected, after = lstm(rows[None], (states[0], states[1]))
    outputs, state = lstm_step(lstm, rows, states.permute(2, 0, 1, 3).flatten(1))
    assert torch.allclose(outputs, expected[0], atol=1e-6)
    assert torch.allclose(state, torch.stack(after).permute(2, 0, 1, 3).flatten(1), atol=1e-6)


@pytest.mark.parametrize(("environment", "sizes"), [*((HIDDEN, name) for name in SIZES), ("Pendulum-v1", "two LSTMs")])
def test_outputs_are_those_of_sb3_contrib_in_every_step(environment, sizes, tmp_path):
    """Random actions are taken, so that episodes end at different times; the states are those of the policy."""
    model = train(environment, tmp_path / "teacher.zip", environment == "Pendulum-v1", **SIZES[sizes])
    agent = load_agent(str(tmp_path / "teacher.zip"), environment)
    network, policy, normalizer = agent.network(), model.policy, model.get_vec_normalize_env()
    assert agent.name == "recurrent ppo teacher" and agent.recurrent
    zeros = torch.zeros(policy.lstm_hidden_state_shape[0], 3, policy.lstm_hidden_state_shape[2])
    states, starts = RNNStates((zeros, zeros), (zeros, zeros)), torch.ones(3)
    compared, seen, ends = 0, [], 0
    with closing(Environments(environment, 3, seed=1, memory=network.memory)) as environments:
        environments.action_space.seed(0)
        shape = environments.observation_space.shape
        for _ in range(60 if environment == HIDDEN else 210):
            rows, acting = environments.observations, torch.as_tensor(environments.acting)
            observed = rows[:, : shape[0]].astype(np.float32)
            if normalizer is not None:
                observed = normalizer.normalize_obs(observed)
            inputs = torch.as_tensor(observed).float(), states, starts
            with torch.no_grad():
                distribution = policy.get_distribution(inputs[0], states.pi, starts)[0].distribution
                _, values, _, states = policy.forward(*inputs)
                outputs = network(torch.as_tensor(rows))
            expected = distribution.logits if outputs.logits is not None else distribution.mean
            ours = outputs.features["mean"] if outputs.logits is None else outputs.logits.log_softmax(-1)
            assert torch.allclose(ours[acting], expected[acting], atol=1e-4)
            assert torch.allclose(outputs.features["value"][acting], values[acting, 0], atol=1e-4)
            seen.append(expected[acting])
            compared, ends = compared + int(acting.sum()), ends + int((~acting).sum())
            starts = (~acting).float()  # the next observations are the first ones of an episode
            drawn = [environments.action_space.sample() for _ in range(3)]
            environments.step(np.stack(drawn))
    assert compared > 150 and ends >= 3 and torch.cat(seen).std(0).max() > 0.01


def test_predict_of_sb3_contrib_selects_the_same_actions(tmp_path):
    """Whole episodes of the greedy policy in several environments."""
    model = train(HIDDEN, tmp_path / "teacher.zip", **SIZES["two LSTMs"])
    network = load_agent(str(tmp_path / "teacher.zip"), HIDDEN).network()
    state, starts, ended = None, np.ones(4, dtype=bool), 0
    with closing(Environments(HIDDEN, 4, seed=2, memory=network.memory)) as environments:
        while ended < 12:
            rows, acting = environments.observations, environments.acting
            expected, state = model.predict(rows[:, :2], state=state, episode_start=starts, deterministic=True)
            actions = to_environment(greedy(network)(torch.as_tensor(rows)), environments.action_space)
            assert (actions == expected)[acting].all()
            starts, ended = ~acting, ended + int((~acting).sum())
            environments.step(actions)


def test_rows_are_replayed_and_kept_without_states(tmp_path):
    train(HIDDEN, tmp_path / "teacher.zip", lstm_hidden_size=4)
    network = load_agent(str(tmp_path / "teacher.zip"), HIDDEN).network()

    def recorder() -> Recorder:
        return Recorder(Environments(HIDDEN, 3, seed=0, memory=network.memory))

    first, second = recorder(), recorder()
    rows = first.collect(sampling(network, torch.Generator().manual_seed(0)), 100)
    assert rows.shape[1] == 2 + network.state_size == 2 + 4 * 4
    assert torch.equal(second.replay(np.stack(first.actions)), rows)
    buffer = Observations(200, (2,), torch.float32)
    buffer.append(rows, network)
    assert torch.equal(buffer.observations[: len(rows)], rows[:, :2])
    assert torch.equal(buffer.teacher_outputs["logits"][: len(rows)], predict(network, rows)["logits"])
    one = in_one_episode(greedy(network), network.memory)
    played = play_in(HIDDEN, greedy(network), 1, 3, network.memory)
    acted = [one(row[None, :2]) for row in played.observations]
    assert torch.equal(torch.cat(acted), greedy(network)(played.observations))


@pytest.mark.slow
def test_a_student_of_a_recurrent_teacher(tmp_path, monkeypatch):
    """A student that stacks observations, one that observes what its teacher does, and the evaluations of all."""
    monkeypatch.chdir(tmp_path)
    train(HIDDEN, tmp_path / "teacher.zip", lstm_hidden_size=8)
    short = ["--environment", HIDDEN, "--teacher", "teacher.zip", "--steps", 400, "--rounds", 2, "--updates", 5]
    short += ["--episodes", 12, "--eval_episodes", 2]
    run_script(DISTILL, *short, "--frame_stack", 3, "--output_dir", "run")
    models = read_json("run/results.json")["models"]
    assert models["teacher"]["name"] == "recurrent ppo teacher"
    for role in ("student", "control"):
        assert {"agreement", "kl"} <= models[role]["metrics"]["test"].keys()
    assert PPO.load("run/student/student.zip", device="cpu").observation_space.shape == (6,)

    run_script(DISTILL, *short, "--no_control", "--student_share", 0.05, "--output_dir", "same")
    models = read_json("same/results.json")["models"]
    # Without the critic: the LSTM with four gates, two layers of 64 and the last one.
    assert models["teacher"]["actor_parameters"] == 4 * 8 * (2 + 8 + 2) + 9 * 64 + 65 * 64 + 65 * 2
    assert models["student"]["actor_parameters"] <= 0.05 * models["teacher"]["actor_parameters"]
    words = ["--environment", HIDDEN, "--episodes", 12, "--json", "again.json"]
    run_script(EVALUATE, "same/student/student.zip", *words, "--teacher", "teacher.zip")
    again, test = read_json("again.json")["metrics"]["test"], models["student"]["metrics"]["test"]
    for name in ("return_mean", "agreement", "kl"):
        assert again[name] == pytest.approx(test[name])
    run_script(EVALUATE, "teacher.zip", *words, "--video", "teacher.gif")
    again = read_json("again.json")["metrics"]["test"]
    assert again["return_mean"] == models["teacher"]["metrics"]["test"]["return_mean"]


@pytest.mark.parametrize("words", [["--method", "ppd"], ["--ensemble_teachers", "teacher.zip"]])
def test_what_recurrent_teachers_do_not_support_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train("CartPole-v1", tmp_path / "teacher.zip", lstm_hidden_size=4)
    with pytest.raises(SystemExit):
        run_script(DISTILL, "--environment", "CartPole-v1", "--teacher", "teacher.zip", *words)
    error = capsys.readouterr().err
    assert "error: teacher.zip is recurrent: leave out --ensemble_teachers, and use --method kd" in error
    with pytest.raises(UserError, match="is recurrent, and its actions depend on earlier observations: export a"):
        exportable("teacher.zip", "CartPole-v1")
