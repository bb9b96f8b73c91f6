"""Trained networks of other people, with the accuracies that were measured for them elsewhere."""

from pathlib import Path

import pytest
import torch

from kd.common.utils.files import read_json
from kd.image_classification.teacher_model.published import Normalization, load_weights
from kd_testing.image_networks import assert_close_features
from kd_testing.image_pairs import noise, some_images
from kd_testing.other_projects import Distiller, ResNet
from kd_testing.scripts import run_script

SCRIPTS = "image-classification/scripts/"
CIFAR100 = ["--teacher_mean", 0.507, 0.487, 0.441, "--teacher_std", 0.267, 0.256, 0.276]
MODULE = """
from kd_testing.other_projects import Distiller

def resnet32(num_classes):
    return Distiller(num_classes, n=5)
"""
IMAGENET = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture
def cifar(shared: Path) -> Path:
    folder = shared / "models" / "cifar"
    if not folder.exists():
        pytest.skip("needs the trained networks of a development machine in ../shared")
    return folder


@pytest.mark.parametrize(("name", "blocks"), [("resnet20-12fca82f", 3), ("resnet56-4bfd9763", 9)])
def test_resnets_of_akamaster_keep_their_logits(cifar: Path, name: str, blocks: int) -> None:
    path = cifar / "akamaster" / f"{name}.pt"
    network = ResNet(10, blocks, 16, 16, "", "linear").eval()
    network.load_state_dict(torch.load(path, weights_only=True), strict=False)  # without counters
    model, _ = load_weights(f"resnet{6 * blocks + 2}a", str(path), noise(32, 10), IMAGENET)
    images = some_images(noise(32, 10))
    with torch.no_grad():
        assert_close_features(model(images).logits, network(images))


@pytest.mark.parametrize(
    ("file", "n", "classes"),
    [("resnet8_cifar10", 1, 10), ("resnet8_cifar10_distilled", 1, 10), ("resnet26_cifar10", 4, 10)]
    + [("resnet8_cifar100", 1, 100), ("resnet20_cifar100", 3, 100), ("resnet32_cifar100", 5, 100)],
)
def test_networks_of_karanchahal_keep_their_logits(
    cifar: Path, file: str, n: int, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cifar / "karanchahal" / f"{file}.pt"
    network = Distiller(classes, n).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    module = f"networks_of_{n}_{classes}"
    (tmp_path / f"{module}.py").write_text(MODULE.replace("n=5", f"n={n}"))
    monkeypatch.chdir(tmp_path)
    data = noise(32, classes)
    model, _ = load_weights(f"{module}:resnet32", str(path), data, IMAGENET)
    images = some_images(data)
    with torch.no_grad():
        assert_close_features(model(images).logits, network(images))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_student.py", "train_simkd.py"])
def test_a_published_resnet32_of_cifar100_teaches(
    shared: Path, cifar: Path, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has 71.70 % on the 10,000 test images, and teaches ResNet20 from 2,000 images."""
    (tmp_path / "my_resnets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    weights = cifar / "karanchahal" / "resnet32_cifar100.pt"
    run_script(
        SCRIPTS + script, "--dataset", shared / "data" / "cifar100", "--validation_share", 0, "--teacher",
        "my_resnets:resnet32", "--teacher_weights", weights, *CIFAR100, "--teacher_accuracy", 0.717, "--student",
        "resnet20", "--max_train_samples", 2000, "--num_train_epochs", 3, "--no_control", "--report_to", "none",
        "--output_dir", "run",
    )  # fmt: skip
    models = read_json(tmp_path / "run" / "results.json")["models"]
    assert abs(models["teacher"]["metrics"]["test"]["accuracy"] - 0.717) < 0.0005
    assert models["student"]["metrics"]["test"]["accuracy"] > 0.03, "three times chance"
