"""Exported policies: the same actions as Stable-Baselines3's `load` and `predict` for observations of environments."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from kd.common.export.onnx import OnnxModel, load_program
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import SB3Environments
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.exportable import load
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script

VIEW = 'Pendulum-v1+select{"indices": [0, 1]}+frame_stack{"n": 3}'  # of a student that observes less
pytestmark = pytest.mark.usefixtures("onnx_operators_once")


def saved(run: Path, model: BaseAlgorithm, environment: str) -> Path:
    """A run with this student, whose actions differ between states."""
    if isinstance(model, PPO):
        torch.nn.init.normal_(cast(nn.Linear, model.policy.action_net).weight)
    (run / "student").mkdir(parents=True)
    model.save(run / "student" / "student.zip")
    (run / "results.json").write_text(json.dumps({"domain": "reinforcement-learning", "task": environment}))
    return run


def exported(run: Path, format: str) -> Any:
    """Exports a run; observations -> actions of the exported file."""
    run_script("common/export/__main__.py", run, "--format", format)
    return loaded(run, format)


def loaded(run: Path, format: str) -> Any:
    if format == "onnx":
        graph = OnnxModel(run / "export" / "model.onnx")
        return lambda rows: graph.predict(observations=torch.as_tensor(rows)).numpy()
    program = load_program(run / "export" / "model.pt2")
    return lambda rows: program(torch.as_tensor(rows)).detach().numpy()


def observations(environment: str, steps: int = 30) -> np.ndarray:
    """Observations after random actions (steps * 3, ...)."""
    environments = SB3Environments(environment, 3, seed=7)
    environments.action_space.seed(0)
    rows: list[Any] = [environments.reset()]
    for _ in range(steps - 1):
        rows.append(environments.step(np.stack([environments.action_space.sample() for _ in range(3)]))[0])
    environments.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch.export", marks=pytest.mark.slow)])
@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1", VIEW])
def test_exported_policy_matches_predict(tmp_path, environment, format):
    model = new_student(
        SB3Environments(environment, 2), StudentArguments(), training_recipe("ppo", environment), seed=0
    )
    act = exported(saved(tmp_path, model, environment), format)
    rows = observations(environment)
    expected = PPO.load(tmp_path / "student" / "student.zip").predict(rows, deterministic=True)[0]
    np.testing.assert_allclose(act(rows), expected, atol=1e-5)
    np.testing.assert_allclose(act(rows[:1]), expected[:1], atol=1e-5)
    if environment != "CartPole-v1":
        assert (np.abs(expected) == 2).any() and (np.abs(expected) < 2).any(), "some at the bounds, some not"
    else:
        assert set(expected) == {0, 1}


def test_squashed_actions_are_in_the_units_of_the_environment(tmp_path):
    model = SAC("MlpPolicy", SB3Environments("Pendulum-v1", 1), seed=0, policy_kwargs={"net_arch": [8]}, buffer_size=1)
    torch.nn.init.normal_(model.actor.mu.weight, std=3)
    act = exported(saved(tmp_path, model, "Pendulum-v1"), "onnx")
    rows = observations("Pendulum-v1")
    expected = model.predict(rows, deterministic=True)[0]
    assert np.abs(expected).max() > 1, "outside the range of tanh"
    np.testing.assert_allclose(act(rows), expected, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch.export", marks=pytest.mark.slow)])
def test_export_contains_the_statistics_of_vecnormalize(tmp_path, format):
    """The exported policy takes raw observations, and normalizes and clips them."""
    normalizer = VecNormalize(SB3Environments("Pendulum-v1", 3, seed=3), clip_obs=1.2)
    normalizer.reset()
    for _ in range(20):
        normalizer.step(np.zeros((3, 1)))
    model = PPO("MlpPolicy", normalizer, seed=0, n_steps=8, batch_size=24)
    run = saved(tmp_path, model, "Pendulum-v1")
    normalizer.save(str(run / "student" / "vecnormalize.pkl"))
    act, rows = exported(run, format), observations("Pendulum-v1")
    normalized = normalizer.normalize_obs(rows)
    renamed = (run / "student" / "vecnormalize.pkl").rename(run / "student" / "mine.pkl")
    with pytest.raises(UserError, match="pass --vecnormalize .*mine.pkl"):
        load(str(run / "student"), "Pendulum-v1")
    again = ["--format", format, "--overwrite_output_dir", "--vecnormalize", renamed]
    run_script("common/export/__main__.py", run, *again)
    np.testing.assert_array_equal(loaded(run, format)(rows), act(rows))
    assert (np.abs(normalized) == 1.2).mean() > 0.05
    expected = model.predict(normalized, deterministic=True)[0]
    np.testing.assert_allclose(act(rows), expected, atol=1e-5)
    assert np.abs(expected - model.predict(rows, deterministic=True)[0]).max() > 0.1


def test_export_of_a_bottleneck_and_the_code_of_its_readme(tmp_path, capsys):
    args = StudentArguments(student=[], student_value=[], codebooks=4, codebook_size=8)
    model = new_student(SB3Environments("CartPole-v1", 2), args, training_recipe("ppo", "CartPole-v1"), seed=0)
    StudentNetwork(model.policy, None).prepare(torch.as_tensor(observations("CartPole-v1")))
    torch.nn.init.normal_(model.policy.features_extractor.bottleneck.values)
    act = exported(saved(tmp_path, model, "CartPole-v1"), "onnx")
    rows = observations("CartPole-v1")
    expected = model.predict(rows, deterministic=True)[0]
    assert set(expected) == {0, 1}
    np.testing.assert_array_equal(act(rows), expected)
    capsys.readouterr()
    found = run_readme(tmp_path / "export", "torch", "stable_baselines3")
    assert found["actions"].shape == (2,)
    assert capsys.readouterr().out.strip() == str(found["actions"])


@pytest.mark.slow
def test_frames(tmp_path):
    environment = "ALE/Pong-v5"
    args = StudentArguments(student=[16], channels=[4, 4, 4])
    recipe = training_recipe("ppo", environment)
    model = new_student(SB3Environments(environment, 2), args, recipe, seed=0)
    act, rows = exported(saved(tmp_path, model, environment), "torch.export"), observations(environment, 10)
    assert rows.dtype == np.uint8
    np.testing.assert_array_equal(act(rows), model.predict(rows, deterministic=True)[0])


def test_export_needs_the_environment(tmp_path):
    model = new_student(
        SB3Environments("CartPole-v1", 2), StudentArguments(), training_recipe("ppo", "CartPole-v1"), seed=0
    )
    zip = saved(tmp_path, model, "CartPole-v1") / "student" / "student.zip"
    with pytest.raises(UserError, match="pass --task"):
        load(str(zip), None)
    with pytest.raises(UserError, match="was trained for observations"):
        load(str(zip), "Acrobot-v1")
    (tmp_path / "results.json").unlink()
    words = ["--domain", "reinforcement-learning", "--task", "CartPole-v1"]
    run_script("common/export/__main__.py", zip, "--format", "torch.export", *words)
    assert (tmp_path / "student" / "export" / "model.pt2").exists()
