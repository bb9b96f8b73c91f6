"""prepare_data.py writes the same data to a local folder, deletes no other files, and reports errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from PIL import Image

from kd_testing.image_files import draw, in_colour, large, photos_in, pixels, sizes, small
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("digits_once")


@pytest.fixture
def colour(tmp_path: Path) -> str:
    return in_colour(tmp_path / "colour")


@pytest.fixture
def photos(tmp_path: Path) -> str:
    return photos_in(tmp_path / "photos")


def prepare(*flags: object) -> None:
    run_script("image-classification/scripts/prepare_data.py", *flags)


def test_a_prepared_folder_is_the_same_data(tmp_path: Path, colour: str, capsys: pytest.CaptureFixture) -> None:
    for name, flags, keywords in (
        ("digits", [], {}),
        (colour, ["--validation_share", 0.25], {"validation_share": 0.25}),
        (colour, ["--image_size", 6, "--max_train_samples", 20], {"image_size": 6, "max_train_samples": 20}),
    ):
        folder = tmp_path / f"prepared{len(flags)}"
        prepare("--dataset", name, "--output", folder, *flags)
        output = capsys.readouterr().out
        before, after = small(name, **keywords), small(folder)
        assert after.fingerprint == before.fingerprint and sizes(after) == sizes(before)
        assert after.config == before.config and after.flip == before.flip and len(after.notes) == 1
        assert before.fingerprint in output and f"--dataset {folder}\n" in output
        written = {path.name for path in folder.iterdir()}
        assert written == {"train.parquet", "validation.parquet", "test.parquet", "views.png", "SHA256SUMS"}
        assert Image.open(folder / "views.png").width > 500


def test_class_folders_with_other_files_are_prepared(tmp_path: Path) -> None:
    """Numbered class folders, a class with one image, other files, and an image without a label."""
    for number, array in enumerate(pixels(30, 6, 6, 3)):
        draw(
            tmp_path / "source" / "train" / ("10" if number == 0 else "2" if number % 2 else "7") / f"{number}.png",
            array,
        )
    draw(tmp_path / "source" / "train" / "loose.png", pixels(1, 6, 6, 3)[0])
    (tmp_path / "source" / "labels.txt").write_text("")
    before = small(tmp_path / "source")
    prepare("--dataset", tmp_path / "source", "--output", tmp_path / "prepared")
    after = small(tmp_path / "prepared")
    assert after.fingerprint == before.fingerprint and after.config == before.config
    assert after.label_names == ["2", "7", "10"] and sizes(after) == sizes(before) and len(before.notes) == 5
    assert after.notes[1:] == ["classes without an image in validation: 1 of 3 (10)"]


def test_large_images_keep_their_files(tmp_path: Path, photos: str, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "prepared"
    flags = ["--image_size", 72, "--validation_share", 0.2]
    prepare("--dataset", photos, "--output", folder, *flags)
    assert "--image_size 72" in capsys.readouterr().out
    before, after = large(photos), large(str(folder))
    assert after.fingerprint == before.fingerprint and sizes(after) == sizes(before)
    assert after.splits["validation"].encoded(2) == before.splits["validation"].encoded(2)


def test_without_output_the_script_only_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare()
    output = capsys.readouterr().out
    assert "1,500" in output and "147 to 153" in output and "8x8" in output and "10 classes: 0, 1" in output
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_never_deleted(tmp_path: Path, colour: str, capsys: pytest.CaptureFixture) -> None:
    def error_of(*flags: object) -> str:
        with pytest.raises(SystemExit) as caught:
            prepare(*flags)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and len(captured.err.splitlines()) == 1 and captured.err.startswith("error: ")
        return captured.err

    folder = tmp_path / "out"
    folder.mkdir()
    prepare("--output", folder)  # an empty folder may be used
    capsys.readouterr()
    assert "--overwrite" in error_of("--dataset", colour, "--output", folder)
    assert small(folder).fingerprint == small("distorted_digits").fingerprint
    prepare("--dataset", colour, "--output", folder, "--overwrite")
    capsys.readouterr()
    assert small(folder).fingerprint == small(colour).fingerprint
    (folder / "thesis.txt").write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.parquet").write_text("mine")  # named like a file of this script, but not written by it
    assert "train.parquet" in error_of("--output", other, "--overwrite")
    assert (other / "train.parquet").read_text() == "mine"
    assert "thesis.txt" in error_of("--output", folder, "--overwrite") and (folder / "thesis.txt").exists()
    assert "is a file" in error_of("--output", folder / "thesis.txt")
    assert "cannot write" in error_of("--output", folder / "thesis.txt" / "below")
    assert "--validation_share" in error_of("--validation_share", 1.5)
    assert "unknown dataset" in error_of("--dataset", "nonsense", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unreachable_hub_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(SystemExit) as stopped:
        prepare("--dataset", "cifar100", "--output", tmp_path / "out")
    output, error = capsys.readouterr()
    assert stopped.value.code == 2 and not output and not (tmp_path / "out").exists()
    assert_message_has_remedies(error)


def assert_message_has_remedies(error: str) -> None:
    (line,) = error.strip().splitlines()
    assert "cifar100" in line and "--dataset FOLDER" in line and "--dataset distorted_digits or digits" in line


@pytest.mark.slow
def test_a_new_process_without_the_hub_ends_in_one_line(tmp_path: Path) -> None:
    script = REPO / "image-classification" / "scripts" / "prepare_data.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(script), "--dataset", "cifar100", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    assert_message_has_remedies(done.stderr)
