"""SHA256SUMS: what it notices, and that `sha256sum` understands it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, find_damage, read_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "sub" / "state").write_bytes(b"state")
    write_checksums(tmp_path)
    return tmp_path


def test_a_whole_folder(folder: Path) -> None:
    assert find_damage(folder) is None
    assert sorted(read_checksums(folder)) == ["sub/state", "weights"]


def test_sha256sum_reads_the_file(folder: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def test_a_flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[100] ^= 1
    (folder / "weights").write_bytes(content)
    assert find_damage(folder) == f"{folder / 'weights'} is damaged"


def test_a_missing_file(folder: Path) -> None:
    (folder / "sub" / "state").unlink()
    assert find_damage(folder) == f"{folder / 'sub' / 'state'} is missing"


def test_every_flipped_byte_of_the_list_and_every_cut(folder: Path) -> None:
    content = (folder / CHECKSUMS).read_bytes()
    for place in range(len(content)):
        (folder / CHECKSUMS).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged", place
        (folder / CHECKSUMS).write_bytes(content[:place])
        assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged", place


@pytest.mark.parametrize("content", [b"\xff\xfe", b"one word"])
def test_a_damaged_list(folder: Path, content: bytes) -> None:
    (folder / CHECKSUMS).write_bytes(content)
    assert find_damage(folder) == f"{folder / CHECKSUMS} is damaged"


def test_an_incomplete_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete"):
        read_checksums(tmp_path)


def test_later_files_are_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert find_damage(folder) is None
