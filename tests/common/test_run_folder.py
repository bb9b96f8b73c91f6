"""A run's folder: it keeps the user's files, is used by one process at a time, and continues only the same run."""

import errno
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from kd.common.training.arguments import RunArguments
from kd.common.training.run import Run
from kd.common.training.run_folder import MARK, RunFolder
from kd.common.utils import files as files_module
from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, read_json, writing_folder
from kd_testing.processes import Child
from kd_testing.tiny import Number


@dataclass
class Inputs:
    epochs: int = 2


def arguments(folder: Path, resume: bool = False, overwrite: bool = False) -> RunArguments:
    return RunArguments(output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=overwrite)


def finished(folder: Path) -> Run:
    """A run with a stage, a student, logs, a checkpoint that was not finished, and a report."""
    run = Run(arguments(folder), Inputs())
    run.stage("teacher", lambda: Number(7), Number.load)
    with writing_folder(folder / "student") as student:
        (student / "model.safetensors").write_text("weights")
    for name in ("report.md", "results.json", "tensorboard/teacher/events.out.tfevents.1",
                 "checkpoints/student/checkpoint-5/model.safetensors", ".results.json.123.tmp"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


NEW_RUN = {".lock", MARK, "recipe.yaml"}

# ---- which files are removed ----


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_without_a_run_is_an_error_and_stays_unchanged(tmp_path: Path, resume: bool, overwrite: bool) -> None:
    names = ("student/thesis.tex", "stages/notes", "checkpoints/a", "report.md", "results.json", "recipe.yaml")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and contains no run"):
        Run(arguments(tmp_path, resume, overwrite), Inputs())
    assert files(tmp_path) == set(names)


def test_the_working_directory_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="contains no run"):
        Run(arguments(Path("."), overwrite=True))
    assert files(tmp_path) == {"thesis.tex"}


def test_a_run_is_started_over_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of flags that are not paths, such as `--report_to tensorboard`, may have the name of a removed folder."""

    @dataclass
    class Words:
        report_to: str = "tensorboard"
        rollout_policy: str = "student"

    finished(tmp_path)
    monkeypatch.chdir(tmp_path)
    Run(arguments(Path("."), overwrite=True), Words())
    assert files(tmp_path) == NEW_RUN


def test_a_file_as_output_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        Run(arguments(tmp_path / "run"))


def test_starting_over_removes_what_the_run_wrote_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished(tmp_path)
    mine = {"thesis.txt", "student/thesis.tex", "stages/teacher/notes.txt", "stages/mine.py", "tensorboard/notes.md",
            "checkpoints/student/checkpoint-5/thesis.tex"}  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("mine")
    Run(arguments(tmp_path, overwrite=True), Inputs(3))
    assert files(tmp_path) == NEW_RUN | mine
    assert "kept 6 files that the run did not write" in caplog.text
    assert "epochs: 3" in (tmp_path / "recipe.yaml").read_text()


def test_a_run_inside_a_run_is_removed_with_it(tmp_path: Path) -> None:
    outer = RunFolder(tmp_path / "table", ["table.md"])
    finished(tmp_path / "table" / "seed0")
    (tmp_path / "table" / "table.md").write_text("| |")
    (tmp_path / "table" / "seed0" / "thesis.tex").write_text("mine")
    outer.remove()
    assert files(tmp_path / "table") == {".lock", MARK, "seed0/thesis.tex"}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["stages", "checkpoints", "student", "report.md", "tensorboard", "stages/teacher"])
def test_nothing_is_removed_through_a_symbolic_link(tmp_path: Path, name: str, resume: bool) -> None:
    finished(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / name).rename(elsewhere)
    (tmp_path / "run" / name).symlink_to(elsewhere)
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is a symbolic link"):
        Run(arguments(tmp_path / "run", resume, overwrite=not resume), Inputs())
    assert files(tmp_path) == before


def test_starting_over_works_through_a_link_to_the_run(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    Run(arguments(tmp_path / "link", overwrite=True), Inputs())
    assert files(tmp_path / "run") == NEW_RUN


@pytest.mark.parametrize("removals", [1, 3, 6])
def test_a_killed_removal_is_completed(tmp_path: Path, removals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    unlink = Path.unlink
    left = [removals]

    def killed(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= path.exists() and not path.name.endswith(".tmp")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        Run(arguments(tmp_path, overwrite=True), Inputs())
    Run(arguments(tmp_path), Inputs(5))  # without any stage of the earlier run
    assert files(tmp_path) == NEW_RUN
    assert read_json(tmp_path / MARK)["fingerprints"].keys() == {"recipe.yaml"}


# ---- one process at a time ----


def holding(folder: Path, with_worker: bool = False) -> Child:
    """Another process that locks the folder until it is killed."""

    def hold() -> None:
        files_module._locks.clear()  # the child must not share the locks of this process
        held = RunFolder(folder)
        if with_worker and os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)
        del held

    return Child(hold)


def test_a_second_process_fails_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = holding(folder)
    assert holder.stdout.readline() == "held\n"
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} "):
            Run(arguments(folder, resume, overwrite), Inputs())
    assert files(folder) == {".lock", MARK}
    assert holder.end(signal.SIGKILL) == -signal.SIGKILL
    Run(arguments(folder), Inputs())


def test_forked_workers_do_not_keep_the_lock_of_a_dead_run(tmp_path: Path) -> None:
    holder = holding(tmp_path / "run", with_worker=True)
    assert holder.stdout.readline() == "held\n"
    assert holder.end(signal.SIGKILL) == -signal.SIGKILL
    Run(arguments(tmp_path / "run"), Inputs())


def test_a_lock_ends_with_its_run(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path), Inputs())
    second = holding(tmp_path)
    assert second.stdout.readline() == "" and second.wait() == 1
    assert "UserError" in second.stderr.read()
    del run
    holder = holding(tmp_path)
    assert holder.stdout.readline() == "held\n"
    holder.end(signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files_module, "_lock", unsupported)
    Run(arguments(tmp_path), Inputs())
    assert "cannot be locked (No locks available)" in caplog.text


# ---- continuing a run ----


def test_a_run_continues_by_absolute_path_and_after_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished(Path("run"))
    assert Run(arguments(tmp_path / "run", resume=True), Inputs()).folder == tmp_path / "run"
    os.rename("run", "moved")
    run = Run(arguments(Path("moved"), resume=True), Inputs())
    assert run.stage("teacher", lambda: Number(8), Number.load).value == 7


def test_other_arguments_are_an_error_that_names_the_command_of_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "run")
    words = ["train.py", "--epochs", "3", "--resume_from_checkpoint", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError) as caught:
        Run(arguments(tmp_path / "run", resume=True), Inputs(3))
    assert "epochs (was 2, now 3)" in str(caught.value)
    assert str(caught.value).endswith(f"python train.py --epochs 3 --output_dir {tmp_path}/run_2")


@pytest.mark.parametrize("content", [None, b"epochs: 2\n", b"\xff\xfe", b"a: [", b"- a list"])
def test_a_changed_recipe_is_an_error_of_one_line(tmp_path: Path, content: bytes | None) -> None:
    finished(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    if content is not None:
        (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match="recipe.yaml is missing, damaged or edited"):
        Run(arguments(tmp_path, resume=True), Inputs())
    Run(arguments(tmp_path, overwrite=True), Inputs())
    assert Run(arguments(tmp_path, resume=True), Inputs()).folder == tmp_path


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_mark_is_an_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    finished(tmp_path)
    (tmp_path / MARK).write_bytes(content)
    for resume in (True, False):
        with pytest.raises(UserError, match=re.escape(MARK)):
            Run(arguments(tmp_path, resume, overwrite=not resume), Inputs())
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_other_inputs_are_an_error(tmp_path: Path) -> None:
    teacher = nn.Linear(2, 2)
    Run(arguments(tmp_path), Inputs()).check_inputs("data 1", teacher=teacher, student=None)
    again = Run(arguments(tmp_path, resume=True), Inputs())
    again.check_inputs("data 1", teacher=teacher)
    with pytest.raises(UserError, match="data changed since the run began"):
        again.check_inputs("data 2", teacher=teacher)
    with torch.no_grad():
        teacher.weight *= 1.5
    with pytest.raises(UserError, match="teacher changed since the run began"):
        again.check_inputs("data 1", teacher=teacher)
    with pytest.raises(UserError, match="data and teacher changed"):
        again.check_inputs("data 2", teacher=teacher)


# ---- damaged stages ----


def damage(path: Path, damage_type: str) -> None:
    content = bytearray(path.read_bytes())
    if damage_type == "missing":
        path.unlink()
    elif damage_type == "empty":
        path.write_bytes(b"")
    elif damage_type == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["number.json", "stage.json", CHECKSUMS])
@pytest.mark.parametrize("damage_type", ["missing", "empty", "truncated", "flipped"])
def test_a_damaged_stage_is_an_error_of_one_line(tmp_path: Path, name: str, damage_type: str) -> None:
    finished(tmp_path)
    stage = tmp_path / "stages" / "teacher"
    damage(stage / name, damage_type)
    run = Run(arguments(tmp_path, resume=True), Inputs())
    with pytest.raises(UserError, match=f"{re.escape(str(stage))}.*trains that stage again") as caught:
        run.stage("teacher", lambda: Number(8), Number.load)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stages" / "student").exists()
