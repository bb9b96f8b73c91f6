"""After kills and damage to checkpoints, a continued run ends with the same bits as an uninterrupted run."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.trainer_utils import EvalPrediction

from kd.common.losses import feature_l2
from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.training.checkpoints import last_checkpoint, rotate_checkpoints
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, write_checksums
from kd_testing.processes import fork
from kd_testing.tiny import Rows, arguments, model

LAST: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 2}
ONLY: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1}
BEST: dict[str, Any] = ONLY | {
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "error",
    "greater_is_better": True,
}


def error(prediction: EvalPrediction) -> dict[str, float]:
    """A metric that is largest after the first epoch, which makes that checkpoint the best."""
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    return {"error": F.cross_entropy(logits, labels).item()}


def train(folder: Path, resume: str | bool = False, **settings) -> torch.Tensor:
    """Four epochs of three steps; all weights at the end."""
    torch.manual_seed(1)
    objective = Objective(
        task=(1.0, task_loss()), hint=(1.0, FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(4, 8)))
    )
    student = model(width=4, dropout=0.3)
    trainer = KDTrainer(
        model=student, objective=objective, teacher=model(9), train_dataset=Rows(24), eval_dataset=Rows(8),
        compute_metrics=error, args=arguments(folder, num_train_epochs=4, optim="adamw_torch", **settings),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    if not settings.get("load_best_model_at_end"):
        assert trainer.state.global_step == 12
    return torch.cat([p.detach().flatten() for p in (*student.parameters(), *objective.parameters())])


def interrupted(folder: Path, after_save: int, **settings) -> None:
    """Trains until an epoch's checkpoint is complete."""

    class Stopped(Exception):
        pass

    def stop(*args) -> None:
        rotate_checkpoints(*args)
        if args[0].name == f"checkpoint-{after_save}":
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("kd.common.training.checkpoint_trainer.rotate_checkpoints", stop)
        train(folder, **settings)


# ---- kills ----


def killed_at(point: int, folder: Path, **settings) -> bool:
    """Trains in another process, which SIGKILL ends before operation number `point` on checkpoint files. Returns
    False if the training ended first.
    """
    if pid := fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    points = iter(range(10_000))

    def count(path: object) -> None:
        if "checkpoint-" in str(path) and next(points) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, values: tuple) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            count(values[0] if event != "os.remove" or values[1] == -1 else f"checkpoint-{values[0]}")
        elif event == "open" and "w" in str(values[1]):
            count(values[0])

    save = torch.save  # has no audit event

    def counted_save(obj: object, path: str) -> None:
        count(path)
        save(obj, path)

    torch.save = counted_save  # type: ignore[assignment]
    sys.addaudithook(watch)
    try:
        train(folder, **settings)
    finally:
        os._exit(0)


@pytest.mark.parametrize("settings", [LAST, ONLY, BEST], ids=["two", "one", "best"])
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_point_of_saving_and_removing_ends_with_the_same_bits(settings, step, tmp_path):
    whole = train(tmp_path / "whole", **settings)
    for point in range(step // 2, 10_000, step):
        folder = tmp_path / str(point)
        if not killed_at(point, folder, **settings):
            break
        assert torch.equal(train(folder, resume=True, **settings), whole), f"killed at {point}"
    assert point > 30


def test_a_partly_removed_checkpoint_is_not_used(tmp_path, monkeypatch):
    interrupted(tmp_path, 3, **ONLY)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (Path(path) / "optimizer.pt").unlink(missing_ok=True))
    interrupted(tmp_path, 6, **ONLY)
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists(), "killed then"
    assert not (tmp_path / "checkpoint-3" / CHECKSUMS).exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


# ---- damage ----


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


READ_BACK = ["model.safetensors", "objective.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json", CHECKSUMS]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A run that was stopped after its third checkpoint, and the final weights of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupted(folder / "run", 9, **LAST)
    return folder / "run", train(folder / "whole", **LAST)


@pytest.mark.parametrize("damage", [flip, zero, empty, cut, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", READ_BACK)
def test_damage_to_any_file_falls_back_to_the_checkpoint_before(name, damage, stopped, tmp_path, caplog):
    run, whole = stopped
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-9" / name
    damage(file)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-6")
    assert f"not continuing from checkpoint-9: {file.parent}" in caplog.text
    if name != CHECKSUMS:
        assert str(file) in caplog.text, "the warning names the file"
    with pytest.raises(UserError, match="checkpoint-9"):
        train(tmp_path / "run", resume=str(file.parent), **LAST)
    if damage is flip:
        assert torch.equal(train(tmp_path / "run", resume=True, **LAST), whole)


def test_training_starts_again_if_every_checkpoint_is_damaged(stopped, tmp_path, caplog):
    run, whole = stopped
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in (6, 9):
        flip(tmp_path / "run" / f"checkpoint-{checkpoint}" / "model.safetensors")
    assert torch.equal(train(tmp_path / "run", resume=True, **LAST), whole)
    assert len([r for r in caplog.records if "model.safetensors is damaged" in r.getMessage()]) == 2


def test_a_checkpoint_without_the_needed_files_is_not_used(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"weights")
    write_checksums(tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path) is None


# ---- the best checkpoint ----


def test_a_damaged_best_checkpoint_is_trained_again(tmp_path, caplog):
    whole = train(tmp_path / "whole", **BEST)
    interrupted(tmp_path / "run", 9, **BEST)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-3", "checkpoint-9"}
    flip(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert torch.equal(train(tmp_path / "run", resume=True, **BEST), whole)
    assert "not continuing from checkpoint-9: " in caplog.text
    assert "checkpoint-3/model.safetensors is damaged" in caplog.text


@pytest.mark.parametrize("moved", [True, False])
def test_the_best_checkpoint_is_found_after_a_run_is_moved_or_copied(moved, tmp_path, monkeypatch, caplog):
    whole = train(tmp_path / "whole", **BEST)
    monkeypatch.chdir(tmp_path)
    interrupted(Path("run"), 12, **BEST)
    shutil.copytree("run", "elsewhere/run")
    if moved:
        shutil.rmtree("run")
    else:
        flip(Path("run/checkpoint-3/model.safetensors"))  # the copy does not read this file
    assert torch.equal(train(tmp_path / "elsewhere/run", resume=True, **BEST), whole)
    assert "does not exist anymore" not in caplog.text
    state = json.loads((tmp_path / "elsewhere/run/checkpoint-3/trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_model_checkpoint"]) == (3, None)


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_an_error_of_one_line(tmp_path, monkeypatch):
    def damage(*args) -> None:
        rotate_checkpoints(*args)
        if args[0].name == "checkpoint-12":
            empty(tmp_path / "checkpoint-3" / "model.safetensors")

    monkeypatch.setattr("kd.common.training.checkpoint_trainer.rotate_checkpoints", damage)
    with pytest.raises(
        UserError, match=r"checkpoint-3/model\.safetensors is damaged; --resume_from_checkpoint"
    ) as line:
        train(tmp_path, **BEST)
    assert "\n" not in str(line.value)


# ---- rotation ----


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, "3 6 9 12"), (1, None, "9"), (2, None, "6 9"), (1, 3, "3 9"), (2, 9, "6 9"), (3, 3, "3 6 9")],
)
def test_the_newest_and_the_best_are_kept_and_incomplete_ones_removed_first(limit, best, kept, tmp_path):
    for step in (3, 6, 9, 12):  # 12 is incomplete
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 12:
            write_checksums(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-notes").mkdir()
    rotate_checkpoints(tmp_path / "checkpoint-9", limit, best and f"elsewhere/checkpoint-{best}")
    left = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-[0-9]*"))
    assert " ".join(map(str, left)) == kept
    assert (tmp_path / "checkpoint-notes").exists()
