"""Several processes with a part of the batch each train as one process with the whole batch, up to rounding."""

import logging
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.outputs import Outputs
from kd.common.training.batch_norm import release_batch_norms, synchronize_batch_norms
from kd.common.training.checkpoints import last_checkpoint
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd_testing.processes import in_processes
from kd_testing.tiny import Rows, arguments, break_second_step, model


class Normed(nn.Module):
    """x (batch, 6) -> logits (batch, 3) through batch norms of both kinds, one of them with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        self.plane_norm, self.flat_norm = nn.BatchNorm2d(4, affine=False), nn.BatchNorm1d(16, momentum=None)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Outputs:
        maps = self.norm(self.convolution(x.unsqueeze(1))).relu()
        maps = self.plane_norm(maps.unflatten(2, (2, 2)))
        hidden = self.flat_norm(maps.flatten(1))
        return Outputs(logits=self.head(hidden), features={"hidden": hidden[:, :8]})


class Regressed(nn.Module):
    """A feature loss with a regressor that contains a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.regressor = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.term = FeatureTerm("hidden", "hidden", self.loss)

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (self.regressor(student) - teacher).square().mean()

    def forward(self, *inputs) -> torch.Tensor:
        return self.term(*inputs)


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    """Stops all processes once the checkpoint of a step is complete."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise Stopped


def train(folder: Path, processes: int, resume: bool = False, stop_after: int = 0, **settings) -> dict:
    """Two epochs of three steps, in batches of 8 over all processes."""
    torch.manual_seed(4)
    student, objective = Normed(), Objective(task=(1.0, task_loss()), hidden=(1.0, Regressed()))
    trainer = KDTrainer(
        model=student, teacher=model(9), objective=objective, train_dataset=Rows(24),
        args=arguments(folder, per_device_train_batch_size=8 // processes, num_train_epochs=2, **settings),
    )  # fmt: skip
    trainer.add_callback(StopAfter(stop_after))
    with suppress(Stopped):
        trainer.train(resume_from_checkpoint=resume)
    trainer.finish()
    return {"student": student.state_dict(), "objective": objective.state_dict(), "repr": repr(student)}


def assert_same(one: dict, two: dict, exactly: bool = False) -> None:
    for part in ("student", "objective"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            tolerance = 0.0 if exactly else None
            torch.testing.assert_close(two[part][name], value, msg=f"{part} {name}", rtol=tolerance, atol=tolerance)


def test_two_processes_train_batch_norms_as_one_process_with_the_whole_batch(tmp_path):
    one = train(tmp_path / "one", 1)
    first, second = in_processes(2, tmp_path / "two", lambda: train(tmp_path / "two", 2))
    assert_same(one, first)
    assert_same(first, second, exactly=True)
    assert one["student"]["norm.running_var"].sub(1).abs().max() > 0.01, "the statistics moved"
    assert first["repr"] == one["repr"] == repr(Normed()), "no module is replaced"


def test_batch_norms_in_eval_mode_and_released_ones_equal_torchs(tmp_path):
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    expected = nn.BatchNorm2d(3)(x)
    synchronize_batch_norms(norm)
    assert torch.equal(norm.eval()(x), nn.BatchNorm2d(3).eval()(x))
    release_batch_norms(norm)
    assert torch.equal(norm.train()(x), expected) and "forward" not in vars(norm)


def test_a_batch_norm_that_overrides_forward_is_reported(caplog):
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    synchronize_batch_norms(nn.Sequential(Activated(3)))
    assert "Activated overrides forward" in caplog.text


SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "optim": "adamw_torch"}


def test_all_processes_continue_from_the_same_complete_checkpoint(tmp_path, caplog):
    whole = in_processes(2, tmp_path / "whole", lambda: train(tmp_path / "whole", 2, **SAVED))
    in_processes(2, tmp_path / "run", lambda: train(tmp_path / "run", 2, stop_after=5, **SAVED))
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-5")
    (tmp_path / "run" / "checkpoint-5" / "rng_state_1.pth").write_bytes(b"")
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-4")
    assert "rng_state_1.pth is damaged" in caplog.text
    resumed = in_processes(2, tmp_path / "run", lambda: train(tmp_path / "run", 2, resume=True, **SAVED))
    assert_same(whole[0], resumed[0], exactly=True)
    assert_same(whole[0], resumed[1], exactly=True)


def test_continuing_a_run_with_another_number_of_processes_is_a_warning(tmp_path, caplog):
    in_processes(2, tmp_path / "run", lambda: train(tmp_path / "run", 2, stop_after=5, **SAVED))
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", 1, resume=True, **SAVED)
    assert "checkpoint-5 was written by 2 processes, and 1 continue" in caplog.text


def test_weights_that_diverge_in_one_process_stop_all(tmp_path, monkeypatch):
    break_second_step(monkeypatch)

    def diverge() -> list[str]:
        with pytest.raises(UserError) as stopped:
            train(tmp_path / "run", 2, max_steps=2, save_strategy="epoch")
        return [str(stopped.value)]

    lines = in_processes(2, tmp_path / "run", diverge)
    assert lines[0] == lines[1] and "is not finite after step 2" in lines[0][0]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
