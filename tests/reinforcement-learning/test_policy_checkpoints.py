"""Checkpoints of policies: a damaged one is detected, and training from the previous one gives the same student."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import Observations, Recorder
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import StudentNetwork, StudentSpec, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd.reinforcement_learning.teacher_model.teacher import Agent, Teacher
from kd.reinforcement_learning.teacher_model.training import new_teacher, train

PPO_ROW = {"environments": 2, "n_steps": 32, "batch_size": 32, "n_epochs": 1, "normalize": True}


class Interrupted(Exception):
    pass


def interrupt_at(call: int | None) -> Callable[..., dict[str, float]]:
    """An evaluation that interrupts the training at one of its calls."""
    calls = 0

    def evaluate(*_: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return {}

    return evaluate


def distilled(folder: Path, call: int | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    def model(hidden: list[int], seed: int) -> Any:
        recipe = training_recipe("ppo", "CartPole-v1")
        return new_student(SB3Environments("CartPole-v1", 1), StudentArguments(student=hidden), recipe, seed)

    environments = Environments("CartPole-v1", 4)
    buffer = Observations(1000, (4,), torch.float32)
    student = StudentNetwork(model([8], 0).policy, None)
    task = DistillationTask(Recorder(environments), PolicyNetwork(model([16], 7).policy), student, buffer)
    args = DistillArguments(**({"steps": 80, "rounds": 4, "updates": 3, "num_envs": 4} | changes))
    Distiller([task], args, folder, seed=5).learn(interrupt_at(call))
    return student.state_dict()


def trained(folder: Path, call: int | None = None) -> dict[str, torch.Tensor]:
    model = new_teacher("CartPole-v1", training_recipe("ppo", "CartPole-v1", PPO_ROW), seed=0)
    train(model, 640, folder, seed=0, evaluate=interrupt_at(call))
    return model.policy.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}
FILES: list[tuple[Callable[..., Any], str]] = [(distilled, name) for name in ("state.pt", "SHA256SUMS")]
FILES += [(trained, name) for name in ("state.json", "model.zip", "arrays.npz")]


@pytest.fixture(scope="module")
def whole_and_interrupted(tmp_path_factory) -> Callable[[Callable[..., Any]], tuple[dict[str, torch.Tensor], Path]]:
    """The weights after a training, and the folder of the same training interrupted before its end."""

    @cache
    def run(make: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], Path]:
        folder = tmp_path_factory.mktemp("runs")
        with pytest.raises(Interrupted):
            make(folder / "interrupted", 4)
        return make(folder / "whole"), folder / "interrupted"

    return run


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("make", "file"), FILES, ids=[file for _, file in FILES])
def test_damaged_checkpoint_falls_back_to_the_previous_one(
    make, file, damage, whole_and_interrupted, tmp_path, caplog
):
    whole, interrupted = whole_and_interrupted(make)
    shutil.copytree(interrupted, tmp_path / "run")
    newest = max((tmp_path / "run").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    DAMAGE[damage](newest / file)
    with caplog.at_level(logging.WARNING):
        assert same(whole, make(tmp_path / "run"))
    assert f"not continuing from {newest.name}: " in caplog.text


@pytest.mark.parametrize("make", [distilled, trained])
def test_training_restarts_without_a_complete_checkpoint(make, whole_and_interrupted, tmp_path, caplog):
    whole, interrupted = whole_and_interrupted(make)
    shutil.copytree(interrupted, tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        (path / "SHA256SUMS").unlink()
    with caplog.at_level(logging.WARNING):
        assert same(whole, make(tmp_path / "run"))
    assert caplog.text.count("not continuing from checkpoint-") == 2


def test_partially_written_checkpoint_is_ignored(tmp_path):
    assert newest_checkpoint(tmp_path) is None

    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise Interrupted

    for number in (8, 9, 10):
        save_checkpoint(tmp_path, number, lambda folder: (folder / "whole").touch())
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, 11, write)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_linked_checkpoint_does_not_remove_its_target(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    for number in (1, 2):
        save_checkpoint(tmp_path / "run", number, lambda folder: None)
    (tmp_path / "run" / "checkpoint-0").symlink_to(other)
    save_checkpoint(tmp_path / "run", 3, lambda folder: None)
    assert (other / "precious").exists() and not (tmp_path / "run" / "checkpoint-0").is_symlink()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_student_of_a_finished_stage_raises_an_error(damage, tmp_path):
    recipe = training_recipe("ppo", "CartPole-v1")
    model = new_student(SB3Environments("CartPole-v1", 1), StudentArguments(), recipe, 0)
    model.save(tmp_path / "model.zip")
    agent = Agent("teacher", model.policy)
    teacher = Teacher("CartPole-v1", (agent,), agent.network(), "CartPole-v1")
    spec = StudentSpec(teacher, StudentArguments(), recipe)
    assert spec.load("student", tmp_path, 0).model is not None
    other = StudentSpec(teacher, StudentArguments(student=[3]), recipe)
    with pytest.raises(UserError, match="is not the student of this run"):
        other.load("student", tmp_path, 0)
    if damage != "a bit":  # which only the checksums of a stage detect
        DAMAGE[damage](tmp_path / "model.zip")
        with pytest.raises(UserError, match="model.zip"):
            spec.load("student", tmp_path, 0)


def test_non_finite_weights_are_not_saved(tmp_path, monkeypatch):
    """The loss is computed before the update, so that it is still finite."""
    fit = Distiller._fit

    def fit_and_break(self: Distiller, number: int) -> dict[str, float]:
        losses = fit(self, number)
        if number == 2:
            with torch.no_grad():
                next(self.students.parameters()).fill_(torch.inf)
        return losses

    monkeypatch.setattr(Distiller, "_fit", fit_and_break)
    with pytest.raises(UserError, match="training diverged: .* is not finite after round 3"):
        distilled(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("algorithm", "environment", "changes"),
    [
        ("ppo", "CartPole-v1", PPO_ROW),
        ("dqn", "CartPole-v1", {"learning_starts": 8, "buffer_size": 100, "batch_size": 8}),
        ("sac", "Pendulum-v1", {"learning_starts": 8, "buffer_size": 100, "batch_size": 8}),
    ],
)
def test_diverged_training_raises_an_error_and_saves_nothing(algorithm, environment, changes, tmp_path):
    recipe = training_recipe(algorithm, environment, changes | {"learning_rate": 1e30})
    model = new_teacher(environment, recipe, seed=0)

    def evaluate(model: BaseAlgorithm) -> dict[str, float]:
        raise AssertionError("evaluated a diverged model")

    with pytest.raises(UserError, match="training diverged: .* is not finite after"):
        train(model, 640, tmp_path, seed=0, evaluate=evaluate)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="training diverged"):
        Agent.trained("teacher", model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
