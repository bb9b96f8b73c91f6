"""Files and folders are complete or absent, also after a kill; checksums; the description of the environment."""

import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from kd.common.utils import devices
from kd.common.utils.devices import environment, git_commit
from kd.common.utils.errors import UserError
from kd.common.utils.files import (
    CHECKSUMS,
    find_damage,
    read_checksums,
    read_json,
    write_checksums,
    write_json,
    write_text,
    writing_folder,
)
from kd_testing.processes import Child


def test_json_round_trip_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"x": [1, 2.5, None], "name": "Zürich"})
    assert read_json(path) == {"x": [1, 2.5, None], "name": "Zürich"}
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_is_an_error_and_the_old_file_stays(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": number})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("content", [None, b"{", b"", b"\xff\xfe"])
def test_unreadable_json_is_a_user_error_of_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_writing_folder_replaces_the_older_folder(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with writing_folder(tmp_path / "model") as folder:
            assert list(folder.iterdir()) == []
            (folder / content).write_text(content)
    assert os.listdir(tmp_path) == ["model"]
    assert sorted(os.listdir(tmp_path / "model")) == ["SHA256SUMS", "two"]


@pytest.mark.parametrize("kill", ["never", "before the files moved", "while the files moved"])
def test_files_that_were_added_to_the_older_folder_are_kept(tmp_path: Path, kill: str) -> None:
    with writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "thesis.tex").write_text("mine")
    (tmp_path / "model" / "plan.txt").write_text("mine")
    if kill == "never":
        with writing_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("new")
    else:
        aside = tmp_path / f".model.old.{dead_process_id()}"
        (tmp_path / "model").rename(aside)
        with writing_folder(tmp_path / "other") as folder:
            (folder / "weights").write_text("new")
        (tmp_path / "other").rename(tmp_path / "model")
        if kill == "while the files moved":
            (aside / "plan.txt").rename(tmp_path / "model" / "plan.txt")
        with writing_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("new")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert (tmp_path / "model" / "notes" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "model" / "plan.txt").read_text() == "mine"


def test_an_added_file_is_never_replaced(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    (tmp_path / "model" / "card.md").write_text("mine")
    with pytest.raises(UserError, match="card.md would be replaced"):
        with writing_folder(tmp_path / "model") as folder:
            (folder / "card.md").write_text("ours")
    assert (tmp_path / "model" / "card.md").read_text() == "mine"
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_nothing_is_replaced_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("mine")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        with writing_folder(tmp_path / "model"):
            pass
    assert (tmp_path / "elsewhere" / "thesis.tex").read_text() == "mine"


def test_writing_folder_keeps_the_older_folder_when_the_block_fails(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_writing_folder_survives_a_kill(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")

    def killed() -> None:
        with writing_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert Child(killed).wait() == -signal.SIGKILL
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2, "the killed process should have left its temporary folder"
    with writing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


def dead_process_id() -> int:
    process = Child(lambda: None)
    process.wait()
    return process.pid


def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    aside = tmp_path / f".model.old.{dead_process_id()}"
    aside.mkdir()
    (aside / "weights").write_text("old")
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_the_temporary_folder_of_a_living_process_is_kept(tmp_path: Path) -> None:
    theirs = tmp_path / f".model.writing.{os.getppid()}"
    theirs.mkdir()
    with writing_folder(tmp_path / "model"):
        pass
    assert theirs.is_dir()


def test_environment_describes_this_machine() -> None:
    found = environment("fp32", "cpu")
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__ and type(found["torch"]) is str
    assert found["threads"] == torch.get_num_threads()
    assert found["precision"] == "fp32"
    assert found["device"] not in ("", "cpu")


def test_git_commit_of_clean_changed_and_absent_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        answer = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return answer.stdout.strip()

    monkeypatch.setattr(devices, "__file__", str(tmp_path / "module.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git("init")
    write_text(tmp_path / "module.py", "one")
    git("add", ".")
    git("commit", "-m", "first")
    write_text(tmp_path / "untracked", "")
    commit = git("rev-parse", "--short", "HEAD")
    assert git_commit() == commit
    write_text(tmp_path / "module.py", "two")
    assert git_commit() == f"{commit}-dirty"
    index = (tmp_path / ".git" / "index").stat()
    os.utime(tmp_path / "module.py", (0, 0))
    assert git_commit() == f"{commit}-dirty"
    assert (tmp_path / ".git" / "index").stat() == index  # a run that is killed meanwhile leaves no index.lock


# ---- checksums ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "sub" / "state").write_bytes(b"state")
    write_checksums(tmp_path)
    return tmp_path


def test_a_complete_folder(folder: Path) -> None:
    assert find_damage(folder) is None
    assert sorted(read_checksums(folder)) == ["sub/state", "weights"]


def test_sha256sum_checks_the_folder(folder: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def test_a_flipped_bit_is_detected(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[100] ^= 1
    (folder / "weights").write_bytes(content)
    assert find_damage(folder) == f"{folder / 'weights'} is damaged"


def test_a_missing_file_is_detected(folder: Path) -> None:
    (folder / "sub" / "state").unlink()
    assert find_damage(folder) == f"{folder / 'sub' / 'state'} is missing"


def test_every_flipped_byte_and_truncation_of_the_checksums_is_detected(folder: Path) -> None:
    content = (folder / CHECKSUMS).read_bytes()
    for place in range(len(content)):
        (folder / CHECKSUMS).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged", place
        (folder / CHECKSUMS).write_bytes(content[:place])
        assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged", place


@pytest.mark.parametrize("content", [b"\xff\xfe", b"one word"])
def test_damaged_checksums(folder: Path, content: bytes) -> None:
    (folder / CHECKSUMS).write_bytes(content)
    assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged"


def test_a_folder_without_checksums_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete"):
        read_checksums(tmp_path)


def test_added_files_are_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert find_damage(folder) is None
