"""Teachers with weights of other projects in scripts: checked before training, reported, or refused in one line."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.common.utils.files import read_json
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.teacher_model.classifier import new_classifier
from kd.image_classification.teacher_model.teacher import load_trained
from kd_testing.image_files import write
from kd_testing.image_pairs import noise
from kd_testing.other_projects import ResNet
from kd_testing.scripts import run_script

STUDENT = "image-classification/scripts/train_student.py"
SIMKD = "image-classification/scripts/train_simkd.py"
EVALUATE = "image-classification/scripts/evaluate.py"
QUICK: list[Any] = ["--max_steps", 3, "--per_device_train_batch_size", 8, "--report_to", "none", "--no_control"]
NETWORKS = """
import torch
from torch import nn

class Colours(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with red, green and blue images, a module `colours` and perfect weights of its network."""
    (tmp_path / "colours.py").write_text(NETWORKS)
    labels = np.arange(48) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (48, 8, 8, 3), dtype=np.uint8)
    for pixel, label in zip(pixels, labels, strict=True):
        pixel[..., label] += 150
    rows = {"train": (pixels[:36], labels[:36].tolist()), "test": (pixels[36:], labels[36:].tolist())}
    write(tmp_path / "data", ["red", "green", "blue"], **rows)
    state = {"conv.weight": torch.eye(3)[..., None, None], "fc.weight": 9 * torch.eye(3), "fc.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "colours.pth")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("colours", None)


TEACHER = ["--dataset", "data", "--validation_share", 0.25, "--teacher", "colours:Colours", "--teacher_weights",
           "colours.pth", "--teacher_mean", 0.3, 0.3, 0.3, "--teacher_std", 0.2, 0.2, 0.2]  # fmt: skip


def test_a_network_of_the_user_teaches_and_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_script(STUDENT, *TEACHER, "--teacher_accuracy", 1, "--student", "resnet8", *QUICK, "--output_dir", "kd")
    printed = capsys.readouterr().out
    first, training = printed.index("accuracy 1.0000 on validation, 1.0000 on test"), printed.index("student, ")
    assert first < training, "its accuracy is printed before anything is trained"
    results = read_json(here / "kd" / "results.json")
    assert results["models"]["teacher"]["metrics"]["test"]["accuracy"] == 1
    assert "the validation images were set aside from train" in results["data_notes"]
    assert read_json(here / "kd" / "student" / "preprocessor_config.json")["image_mean"] == [0.3] * 3
    assert "the validation images were set aside from train" in (here / "kd" / "report.md").read_text()


def test_a_students_network_of_the_user_is_saved_evaluated_and_exported(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(SIMKD, *TEACHER, "--student", "colours:Colours", "--projector_factor", 1, *QUICK, "--output_dir", "out")
    config = read_json(here / "out" / "student" / "config.json")
    assert config["architecture"] == "colours:Colours"
    sys.modules.pop("colours")
    with pytest.raises(SystemExit):
        run_script(EVALUATE, "out/student", "--dataset", "data")
    assert "pass --import_module colours" in capsys.readouterr().err
    run_script(EVALUATE, "out/student", "--dataset", "data", "--import_module", "colours", "--json", "metrics.json")
    found = read_json(here / "metrics.json")["metrics"]["test"]["accuracy"]
    assert found == read_json(here / "out" / "results.json")["models"]["student"]["metrics"]["test"]["accuracy"]
    sys.modules.pop("colours")
    run_script("common/export/__main__.py", "out", "--import_module", "colours", "--format", "torch.export")
    assert (here / "out" / "export" / "model.pt2").exists()


def constant() -> dict[str, torch.Tensor]:
    """Weights of a ResNet8 that always predicts the first class."""
    state = ResNet(3, 1, 16, 16, "downsample", "fc").state_dict()
    state["fc.bias"] = torch.tensor([1000.0, 0.0, 0.0])
    return state


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        run_script(STUDENT, *arguments, *QUICK, "--output_dir", "refused")
    assert exit.value.code == 2 and not Path("refused").exists(), "nothing is left"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_refusals_name_the_flag_that_resolves_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", "data", "--validation_share", 0.25]
    torch.save(constant(), "random.pth")
    random = [*data, "--teacher", "random.pth"]
    message = error_of(capsys, *random)
    for flag in ("--teacher_architecture", "--teacher_mean", "--teacher_std", "--teacher_accuracy"):
        assert flag in message
    resnet8 = [*random, "--teacher_architecture", "resnet8"]
    message = error_of(capsys, *resnet8)
    assert "near chance (0.3333)" in message and message.endswith("or pass --allow_weak_teacher")
    message = error_of(capsys, *resnet8, "--teacher_accuracy", 0.9)
    assert "not 0.9" in message and message.endswith("or pass a lower --teacher_accuracy")
    for words, expected in (
        ([*random, "--teacher_architecture", "resnet14"], "pass another --teacher_architecture"),
        ([*data, "--teacher", "absent.pth", "--teacher_architecture", "resnet8"], "there is no file absent.pth"),
        ([*resnet8, "--teacher_weights", "random.pth"], "leave out --teacher_weights"),
        ([*data, "--teacher", "resnet8", "--teacher_architecture", "resnet8"], "--teacher_weights FILE"),
        ([*data, "--teacher", "resnet8", "--teacher_accuracy", 0.5], "--teacher_accuracy has no effect"),
        ([*data, "--teacher", "resnet8", "--teacher_mean", 0.5], "--teacher_mean"),
        ([*data, "--teacher", "resnet8", "--teacher_weights", "absent.pth"], "there is no file absent.pth"),
        ([*data, "--teacher", "resnet8", "--import_module", "absent"], "there is no module absent"),
        ([*resnet8, "--teacher_epochs", 3], "--teacher_epochs has no effect"),
    ):
        assert expected in error_of(capsys, *words), words


def test_labels_of_weights_in_another_order_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of the perfect classifier are in the order blue, red, green."""
    state = torch.load("colours.pth", weights_only=True)
    state["fc.weight"] = state["fc.weight"][[2, 0, 1]]
    torch.save(state, "other.pth")
    words = [word if word != "colours.pth" else "other.pth" for word in TEACHER] + ["--student", "resnet8"]
    assert "another order of the labels (--label_names)" in error_of(capsys, *words)
    message = error_of(capsys, *words, "--label_names", "blue", "red", "pink")
    assert "--label_names are not the 3 classes of data, red, green, blue: correct them" in message
    names = ["--label_names", "Blue", "Red", "Green", "--teacher_accuracy", 1]
    for script, more in ((STUDENT, []), (SIMKD, ["--projector_factor", 1])):
        run_script(script, *words, *names, *more, *QUICK, "--output_dir", Path(script).stem)
        results = read_json(Path(Path(script).stem, "results.json"))
        assert results["models"]["teacher"]["metrics"]["test"]["accuracy"] == 1
        assert "the labels of other.pth were matched by name" in results["data_notes"]


def test_a_trained_classifier_of_labels_in_another_order_is_put_in_order(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its logits are those of its own order, permuted; also next to a teacher of the data's order."""
    data = replace(load_image_data("data", validation_share=0.25), mean=[0.3] * 3, std=[0.2] * 3)
    model = new_classifier("resnet8", data.config).eval()
    model.config.id2label = {0: "Blue", 1: "red", 2: "green"}
    model.save_pretrained("turned")
    loaded, ordered = load_trained(Path("turned"), data)
    images = data.views("test", torch.device("cpu")).__getitems__([0, 1, 2])["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits[:, [1, 2, 0]])
    assert loaded.config.label_names == ["red", "green", "blue"]
    assert ordered.notes[-1] == "the labels of turned were matched by name"
    words = ["--ensemble_teachers", "turned", "--ensemble_weights", 3, 1, "--student", "resnet8"]
    run_script(STUDENT, *TEACHER, *words, *QUICK, "--output_dir", "both")
    assert "the labels of turned were matched by name" in read_json(here / "both" / "results.json")["data_notes"]
    message = error_of(capsys, "--dataset", "data", "--teacher", "turned", "--trust_label_order")
    assert "because turned names its labels (Blue, red, green): leave them out" in message
    message = error_of(capsys, "--dataset", "data", "--teacher", "resnet8", "--trust_label_order")
    assert "because teacher resnet8 is trained on these data: leave them out" in message


def test_a_weak_teacher_is_accepted_on_request(here: Path) -> None:
    torch.save({"model": constant()}, "random.pth")
    words = ["--dataset", "data", "--teacher", "random.pth", "--teacher_architecture", "resnet8"]
    run_script(STUDENT, *words, "--allow_weak_teacher", "--student", "resnet8", *QUICK, "--output_dir", "weak")
    results = read_json(here / "weak" / "results.json")
    assert "matched with resnet8 by name" in results["data_notes"] and results["warnings"]


def test_padded_shortcuts_have_no_parameters() -> None:
    """The counts of He et al. for CIFAR-10: 0.27 million for 20 layers and 0.85 million for 56."""
    for name, millions in (("resnet20a", 0.27), ("resnet56a", 0.85)):
        model = new_classifier(name, noise(32, 10).config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
