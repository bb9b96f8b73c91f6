"""Checkpoints of policies: damage is noticed, the one before stands in, and the same student comes out."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kd.common.training.checkpoints import newest_checkpoint, save_checkpoint
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import Environments, SB3Environments
from kd.reinforcement_learning.data.rollouts import Observations, Recorder
from kd.reinforcement_learning.student_model.arguments import StudentArguments
from kd.reinforcement_learning.student_model.distiller import DistillArguments, DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import StudentNetwork, StudentSpec, new_student
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd.reinforcement_learning.teacher_model.teacher import Agent, Teacher
from kd.reinforcement_learning.teacher_model.training import new_teacher, train

PPO_ROW = {"environments": 2, "n_steps": 32, "batch_size": 32, "n_epochs": 1, "normalize": True}


class Killed(Exception):
    pass


def dies_at(call: int | None) -> Callable[..., dict[str, float]]:
    """A `watch` that kills its training at one of its calls."""
    calls = 0

    def watch(*_: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return {}

    return watch


def distilled(folder: Path, call: int | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    def model(hidden: list[int], seed: int) -> Any:
        recipe = training_recipe("ppo", "CartPole-v1")
        return new_student(SB3Environments("CartPole-v1", 1), StudentArguments(student=hidden), recipe, seed)

    environments = Environments("CartPole-v1", 4)
    buffer = Observations(1000, (4,), torch.float32)
    student = StudentNetwork(model([8], 0).policy, None)
    task = DistillationTask(Recorder(environments), PolicyNetwork(model([16], 7).policy), student, buffer)
    args = DistillArguments(**({"steps": 400, "rounds": 4, "updates": 10, "num_envs": 4} | changes))
    Distiller([task], args, folder, seed=5).learn(dies_at(call))
    return student.state_dict()


def trained(folder: Path, call: int | None = None) -> dict[str, torch.Tensor]:
    model = new_teacher("CartPole-v1", training_recipe("ppo", "CartPole-v1", PPO_ROW), seed=0)
    train(model, 640, folder, seed=0, evaluate=dies_at(call))
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
def whole_and_killed(tmp_path_factory) -> Callable[[Callable[..., Any]], tuple[dict[str, torch.Tensor], Path]]:
    """What a training ends in, and the folder of the same training killed before it has ended."""

    @cache
    def run(make: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], Path]:
        folder = tmp_path_factory.mktemp("runs")
        with pytest.raises(Killed):
            make(folder / "killed", 4)
        return make(folder / "whole"), folder / "killed"

    return run


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("make", "file"), FILES, ids=[file for _, file in FILES])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(make, file, damage, whole_and_killed, tmp_path, caplog):
    whole, killed = whole_and_killed(make)
    shutil.copytree(killed, tmp_path / "killed")
    newest = max((tmp_path / "killed").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    DAMAGE[damage](newest / file)
    with caplog.at_level(logging.WARNING):
        assert same(whole, make(tmp_path / "killed"))
    assert f"not continuing from {newest.name}: " in caplog.text


@pytest.mark.parametrize("make", [distilled, trained])
def test_where_no_checkpoint_is_whole_training_starts_again(make, whole_and_killed, tmp_path, caplog):
    whole, killed = whole_and_killed(make)
    shutil.copytree(killed, tmp_path / "killed")
    for path in (tmp_path / "killed").iterdir():
        (path / "SHA256SUMS").unlink()
    with caplog.at_level(logging.WARNING):
        assert same(whole, make(tmp_path / "killed"))
    assert caplog.text.count("not continuing from checkpoint-") == 2


def test_a_checkpoint_whose_writing_was_killed_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None

    def dies(folder: Path) -> None:
        (folder / "half").touch()
        raise Killed

    for number in (8, 9, 10):
        save_checkpoint(tmp_path, number, lambda folder: (folder / "whole").touch())
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 11, dies)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_an_old_checkpoint_that_is_a_link_is_no_way_to_other_files(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    for number in (1, 2):
        save_checkpoint(tmp_path / "run", number, lambda folder: None)
    (tmp_path / "run" / "checkpoint-0").symlink_to(other)
    save_checkpoint(tmp_path / "run", 3, lambda folder: None)
    assert (other / "precious").exists() and not (tmp_path / "run" / "checkpoint-0").is_symlink()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_student_of_a_finished_stage_is_one_line(damage, tmp_path):
    recipe = training_recipe("ppo", "CartPole-v1")
    new_student(SB3Environments("CartPole-v1", 1), StudentArguments(), recipe, 0).save(tmp_path / "model.zip")
    teacher = Teacher("CartPole-v1", cast(Any, None), cast(Any, None))
    spec = StudentSpec(teacher, StudentArguments(), recipe)
    assert spec.load("student", tmp_path, 0).model is not None
    other = StudentSpec(teacher, StudentArguments(student=[3]), recipe)
    with pytest.raises(UserError, match="is not the student of this run"):
        other.load("student", tmp_path, 0)
    if damage != "a bit":  # which the checksums of a stage tell
        DAMAGE[damage](tmp_path / "model.zip")
        with pytest.raises(UserError, match="model.zip"):
            spec.load("student", tmp_path, 0)


def test_weights_that_the_last_update_broke_are_not_kept(tmp_path, monkeypatch):
    """The loss is computed before the update, so that it is still finite."""
    fit = Distiller._fit

    def breaks(self: Distiller, number: int) -> dict[str, float]:
        losses = fit(self, number)
        if number == 2:
            with torch.no_grad():
                next(self.students.parameters()).fill_(torch.inf)
        return losses

    monkeypatch.setattr(Distiller, "_fit", breaks)
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
def test_a_training_that_diverges_is_one_line_and_keeps_nothing_of_it(algorithm, environment, changes, tmp_path):
    recipe = training_recipe(algorithm, environment, changes | {"learning_rate": 1e30})
    model = new_teacher(environment, recipe, seed=0)

    def watch(model: BaseAlgorithm) -> dict[str, float]:
        raise AssertionError("measured")

    with pytest.raises(UserError, match="training diverged: .* is not finite after"):
        train(model, 640, tmp_path, seed=0, evaluate=watch)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="training diverged"):
        Agent.trained("teacher", model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
