"""benchmarks/policy_streams.py: games that share observations and actions, and what a second one changes."""

import json
import sys
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stable_baselines3 import PPO
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.data.environments import SB3Environments
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

sys.path.insert(0, str(REPO / "benchmarks"))
policy_games, policy_streams = (import_module(f"policy_{name}") for name in ("games", "streams"))


def test_students_of_two_games_end_to_end(tmp_path):
    for environment in ("CartPole-v1", "Acrobot-v1"):
        PPO("MlpPolicy", environment, n_steps=8, batch_size=8, device="cpu").save(tmp_path / f"{environment}.zip")
    flags = {"seeds": 1, "steps": 40, "updates": 1, "key_rows": 40, "episodes": 1, "output": tmp_path / "o.json"}
    run_script(
        "benchmarks/policy_streams.py", "--cartpole", tmp_path / "CartPole-v1.zip", "--acrobot",
        tmp_path / "Acrobot-v1.zip", *(word for name, value in flags.items() for word in (f"--{name}", value)),
    )  # fmt: skip
    records = json.loads((tmp_path / "o.json").read_text())["records"]
    table = (tmp_path / "o.md").read_text()
    assert len(records) == 3 * 8 and all(table.count(f"| {record['student']} |") == 3 for record in records)
    assert all(1 <= record["after"][0]["return"] <= 500 for record in records)


def test_shared_games_are_padded_marked_and_mirrored():
    mirrored = policy_games.Shared(gymnasium.make("CartPole-v1"), 6, 3, mirrored=True, marks=(1.0,))
    plain = gymnasium.make("CartPole-v1")
    first, _ = mirrored.reset(seed=0)
    assert np.array_equal(first, np.append(plain.reset(seed=0)[0], [0, 0, 1])) and first in mirrored.observation_space
    for action in (0, 1, 2):
        one, other = mirrored.step(action), plain.step(1 if action == 0 else 0)
        assert np.array_equal(one[0][:4], other[0]) and one[1:4] == other[1:4]


class Scores(nn.Module):
    """Logits that are the first two observed numbers."""

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        return Outputs(logits=observations[:, :2])


def test_teachers_of_shared_games_see_their_numbers_and_have_their_actions():
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    plain, mirrored = (policy_games.SharedTeacher(Scores(), 2, 3, flag)(rows).logits for flag in (False, True))
    assert plain.tolist() == [[1, 2, policy_games.LOWEST]] and mirrored.tolist() == [[2, 1, policy_games.LOWEST]]


@pytest.fixture
def clusters() -> Tensor:
    """Observations (2, 100, 4) near -3 and near 3."""
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    return torch.stack([noise / 10 - 3, noise / 10 + 3])


def student(clusters: Tensor, **sizes: Any) -> StudentNetwork:
    model = new_student(SB3Environments("CartPole-v1", 1), StudentArguments(**sizes), training_recipe("ppo", "any"), 0)
    network = StudentNetwork(model.policy, None)
    network.prepare(clusters.flatten(0, 1))
    return network


def train(network: StudentNetwork, rows: Tensor, action: int) -> float:
    """The loss after some updates towards one action."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(rows).logits, torch.full((len(rows),), action))
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kept", [True, False])
def test_values_of_disjoint_observations_stay_bit_equal_and_layers_of_an_mlp_do_not(clusters, kept):
    sizes = {"codebooks": 4, "codebook_size": 16, "key_dim": 8, "student": []} if kept else {"student": [16]}
    network = student(clusters, **sizes)
    assert train(network, clusters[0], 0) < 0.1
    if kept:
        policy_streams.only_values(network)
    before = network(clusters[0]).logits
    assert train(network, clusters[1], 1) < 0.1
    assert torch.equal(network(clusters[0]).logits, before) == kept


@pytest.mark.parametrize("sizes", [{"codebooks": 2, "codebook_size": 4, "student": []}, {"student": [4]}])
def test_a_fitted_student_is_not_fitted_again(clusters, sizes):
    network = student(clusters, **sizes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.prepare(clusters[0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
