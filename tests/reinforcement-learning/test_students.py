"""Students: sizes, shared layers, folded statistics; saved students load without this project."""

import json
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from kd.common.metrics.cost import parameters
from kd.reinforcement_learning.data.environments import SB3Environments
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student, share_bodies
from kd.reinforcement_learning.teacher_model.policies import FrameFeatures, ObservationStatistics
from kd.reinforcement_learning.teacher_model.recipes import training_recipe

FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def student(environment: str = "CartPole-v1", seed: int = 0, **sizes: Any) -> PPO:
    recipe = training_recipe("ppo", environment)
    return new_student(SB3Environments(environment, 2), StudentArguments(**sizes), recipe, seed)


def statistics(width: int) -> ObservationStatistics:
    generator = np.random.default_rng(1)
    return ObservationStatistics(generator.normal(size=width) * 3, generator.uniform(0.01, 9, width), 1e-8, 10.0)


def test_sizes():
    assert parameters(student().policy) == 755  # 4-16-16-2 and 4-16-16-1
    assert parameters(student(student=[7], student_value=[]).policy) == 4 * 7 + 7 + 7 * 2 + 2 + 4 + 1
    assert parameters(student(student=[]).policy) == (4 * 2 + 2) + (4 + 1)


@pytest.mark.parametrize(
    ("channels", "width", "published"),
    [((16, 32, 32), 256, 427_874), ((16, 16, 16), 128, 113_346), ((16, 16, 16), 64, 61_954)],
)
def test_frame_networks_have_the_published_sizes(channels, width, published):
    """Rusu et al., arXiv:1511.06295, table 1: with a layer to 18 actions."""
    features = FrameFeatures(FRAMES, width, channels)
    assert parameters(features) + width * 18 + 18 == published


@pytest.mark.parametrize(
    "sizes", [{"student": [16, 16]}, {"student": [], "student_value": []}, {"student": [3], "student_value": []}]
)
def test_folding_preserves_outputs(sizes):
    network = StudentNetwork(student(**sizes).policy, statistics(4))
    network.set_value_scale(torch.tensor([3.0, 9.0, 30.0]), preserve=False)
    rows = torch.randn(64, 4) * 5
    with torch.no_grad():
        before, after = network(rows), StudentNetwork(network.folded_policy(), None)(rows)
    assert torch.allclose(before.logits, after.logits, atol=1e-4)
    assert torch.allclose(before.features["value"], after.features["value"], atol=1e-3)
    assert before.features["value"].std() > 0


def test_a_student_without_statistics_of_its_teacher_standardizes_by_the_first_observations():
    network = StudentNetwork(student().policy, None)
    rows = torch.tensor([[1.0, -4.0, 0.0, 7.0], [3.0, 4.0, 0.5, 7.0]])
    network.prepare(rows)
    assert torch.equal(network.mean, torch.tensor([2.0, 0.0, 0.25, 7.0]))
    assert torch.equal(network.std, torch.tensor([1.0, 4.0, 0.25, 1.0])), "a constant keeps its scale"
    with torch.no_grad():
        expected = StudentNetwork(network.policy, None)((rows - network.mean) / network.std)
        for found in (network(rows), StudentNetwork(network.folded_policy(), None)(rows)):
            assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_new_value_scale_can_preserve_values():
    network, rows = StudentNetwork(student().policy, None), torch.randn(64, 4)
    network.set_value_scale(torch.tensor([0.0, 10.0]), preserve=False)
    before = network(rows).features["value"]
    assert before.mean().item() == pytest.approx(5.0, abs=2)
    network.set_value_scale(torch.tensor([100.0, 500.0, 300.0]), preserve=True)
    assert torch.allclose(network(rows).features["value"], before, atol=1e-3)
    assert network.value_mean == 300


def test_shared_bodies_keep_heads_and_layers_of_other_shapes():
    cart, other, wide = student(seed=0), student(seed=1), student("Acrobot-v1", seed=2)
    heads = other.policy.action_net.weight.clone()
    share_bodies([cart.policy, other.policy, wide.policy])
    for net in ("policy_net", "value_net"):
        first, twin, third = (getattr(s.policy.mlp_extractor, net) for s in (cart, other, wide))
        assert twin[0] is first[0] and twin[2] is first[2]
        assert third[0] is not first[0] and third[2] is first[2]  # 6 observations, then the same 16-16
    assert torch.equal(other.policy.action_net.weight, heads)
    assert wide.policy.action_net.out_features == 3


WITHOUT_PROJECT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kd":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Absent())
import numpy as np
from stable_baselines3 import PPO
for number in range(3):
    model = PPO.load(f"{number}.zip", device="cpu")
    print(model.predict(np.load(f"{number}.npy"), deterministic=True)[0].tolist())
"""


@pytest.mark.slow
def test_saved_students_load_without_this_project(tmp_path):
    expected = []
    for number, environment in enumerate(["CartPole-v1", "Pendulum-v1", "ALE/Pong-v5"]):
        model = student(environment, student=[16])
        space = model.observation_space
        rows = np.stack([space.sample() for _ in range(3)])
        if environment != "ALE/Pong-v5":
            rows = np.random.default_rng(0).normal(size=(20, *space.shape)).astype(np.float32)
        model.save(tmp_path / f"{number}.zip")
        np.save(tmp_path / f"{number}.npy", rows)
        expected.append(model.predict(rows, deterministic=True)[0])
    command = [sys.executable, "-c", WITHOUT_PROJECT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(expected)
    for actions, wanted in zip(found, expected, strict=True):
        assert np.allclose(actions, wanted)
