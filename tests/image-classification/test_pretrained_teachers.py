"""Teachers whose weights are part of the project: stored, verified, loaded by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.teacher_model import pretrained
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.pretrained import pretrained_folder, pretrained_names, save_half_precision
from kd.image_classification.teacher_model.teacher import load_teacher
from kd_testing.scripts import run_script

SCRIPTS = "image-classification/scripts"
QUICK: list[Any] = ["--max_steps", 3, "--report_to", "none", "--no_control", "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small teacher."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_script(f"{SCRIPTS}/train_teacher.py", "--dataset", "digits", "--architecture", "resnet8", "--num_train_epochs",
               2, "--report_to", "none", "--output_dir", folder)  # fmt: skip
    return folder


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the one in the repository."""
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_stored_teacher_teaches_and_is_evaluated_by_name(
    trained: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_script(f"{SCRIPTS}/store_teacher.py", trained, "resnet8_digits")
    assert pretrained_names() == ["resnet8_digits"]
    stored, original = weights / "resnet8_digits", trained / "stages" / "teacher"
    card = (stored / "README.md").read_text()
    metrics = read_json(trained / "results.json")["models"]["teacher"]["metrics"]["test"]
    assert f"| test | accuracy | {metrics['accuracy']:.4f} |" in card and "train_teacher.py --dataset digits" in card
    assert str(tmp_path.parent) not in card

    half, full = load_file(stored / "model.safetensors"), load_file(original / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in half.items()} == {
        name: torch.float16 if tensor.ndim > 1 else tensor.dtype for name, tensor in full.items()
    }
    data = load_image_data("digits")
    model, normalized, is_trained = load_teacher("pretrained:resnet8_digits", data, seed=0)
    assert is_trained and normalized.mean == data.mean and model.dtype == torch.float32
    images = torch.randn(5, 3, 8, 8)
    expected = ImageClassifier.from_pretrained(original).eval()(images).logits
    torch.testing.assert_close(model.eval()(images).logits, expected, rtol=0.01, atol=0.01)

    monkeypatch.chdir(tmp_path)
    run_script(f"{SCRIPTS}/train_student.py", "--dataset", "digits", "--teacher", "pretrained:resnet8_digits",
               "--student", "resnet8", *QUICK, "--output_dir", "kd")  # fmt: skip
    teacher = read_json(tmp_path / "kd" / "results.json")["models"]["teacher"]
    assert teacher["name"] == "pretrained:resnet8_digits"
    assert teacher["metrics"]["test"]["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.005)
    student_card = (tmp_path / "kd" / "student" / "README.md").read_text()
    assert "license: mit" in student_card and str(weights) not in student_card
    capsys.readouterr()
    run_script(f"{SCRIPTS}/evaluate.py", "pretrained:resnet8_digits", "--dataset", "digits")
    assert f"{metrics['accuracy']:.6f}" in capsys.readouterr().out


def test_a_damaged_or_unknown_teacher_is_refused(trained: Path, weights: Path) -> None:
    folder = weights / "small"
    shutil.copytree(trained / "stages" / "teacher", folder)
    with pytest.raises(UserError, match=r"unknown teacher pretrained:large: choose from pretrained:small$"):
        pretrained_folder("pretrained:large")
    assert pretrained_folder("pretrained:small") == folder
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="model.safetensors is damaged: restore this file"):
        pretrained_folder("pretrained:small")


@pytest.mark.parametrize("name", sorted({"resnet56_cifar100", *pretrained_names()}))
def test_the_teachers_of_the_repository_are_complete_and_small(name: str) -> None:
    folder = pretrained_folder(f"pretrained:{name}")
    model = ImageClassifier.from_pretrained(folder)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert max(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    assert f"--teacher pretrained:{name}" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file()) <= 15_000_000


def test_too_large_weights_are_not_stored(tmp_path: Path) -> None:
    model = new_classifier("resnet8", load_image_data("digits").config)
    model.load_state_dict({name: 1e6 * torch.ones_like(tensor) for name, tensor in model.state_dict().items()})
    with pytest.raises(UserError, match="too large for fp16"):
        save_half_precision(model, tmp_path)
    assert not list(tmp_path.iterdir())
