"""The benchmarks of policies on a few steps."""

import math
import runpy

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from kd.reinforcement_learning.student_model.arguments import DistillArguments
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics
from kd.reinforcement_learning.teacher_model.teacher import Agent, load_agent
from kd_testing.paths import REPO

DISTILLATION, COLLECTION = (
    runpy.run_path(str(REPO / "benchmarks" / f"policy_{name}.py")) for name in ("distillation", "collection")
)


@pytest.mark.parametrize("environment", ["CartPole-v1", pytest.param("Pendulum-v1", marks=pytest.mark.slow)])
def test_implementations_stop_at_the_goal_and_after_the_last_round(environment, tmp_path):
    PPO("MlpPolicy", environment, n_steps=8, batch_size=8, device="cpu").save(tmp_path / "t.zip")
    teacher = load_agent(str(tmp_path / "t.zip"), environment)
    args = DistillArguments(steps=48, rounds=2, updates=3, batch_size=8, num_envs=4)
    task = DISTILLATION["Task"](environment, [4], args, 2)
    for name, distill in DISTILLATION["implementations"](task, teacher, None).items():
        reached, exhausted = distill(0, -math.inf), distill(0, math.inf)
        assert (reached["observations"], exhausted["observations"]) == (24, 48), name
        assert reached["seconds"] > 0 and exhausted["seconds"] > 0
    rows = DISTILLATION["rows_of"](environment, -math.inf, {"one": [reached], "other": [reached | {"seconds": 1e9}]})
    assert [row[6] for row in rows] == ["1 of 1", "1 of 1"] and float(rows[1][5]) > 1 == float(rows[0][5])


def test_normalization_of_the_teacher_is_folded_for_all_implementations():
    policy = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").policy
    statistics = ObservationStatistics(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 2.0, 3.0, 4.0]), 1e-8, np.inf)
    agent, rows = Agent("teacher", policy, statistics), torch.randn(20, 4)
    with torch.no_grad():
        expected = agent.network()(rows)
        folded = DISTILLATION["for_raw_observations"](agent)
        outputs = folded.network()(rows)
    assert folded.statistics is None and torch.allclose(outputs.logits, expected.logits, atol=1e-5)
    assert torch.allclose(outputs.features["value"], expected.features["value"], atol=1e-5)


def test_collecting_is_measured_next_to_the_environment_alone():
    rates = COLLECTION["measure"]("CartPole-v1", 4, 40, 2)
    assert rates.keys() == {"environment alone", "this project", "usual loop"}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
