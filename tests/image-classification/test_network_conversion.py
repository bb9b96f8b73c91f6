"""Networks that this project does not define: a user's module, timm's and transformers' networks of today."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.image_classification.student_model.arguments import SimKDArguments
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.student_model.matching import image_features, task_spec
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.simkd import simkd, simkd_student
from kd.image_classification.teacher_model.backbones.network import (
    NetworkBackbone,
    average_pooled,
    logits_of,
    with_average,
)
from kd.image_classification.teacher_model.backbones.structure import find_structure
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier
from kd.image_classification.teacher_model.published import Normalization, load_transformers, load_weights
from kd_testing.image_networks import assert_close_features
from kd_testing.image_pairs import Pair, forward_both, noise, some_images
from kd_testing.other_projects import Distiller
from kd_testing.scripts import run_script

VIT = "timm:vit_tiny_patch16_224:patch_size=8:depth=4:embed_dim=24:num_heads=2"
DEIT = "timm:deit_tiny_distilled_patch16_224:patch_size=8:depth=2:embed_dim=24:num_heads=2"
SWIN = "timm:swin_tiny_patch4_window7_224:patch_size=4:depths=(1,1):num_heads=(1,2):embed_dim=12:window_size=2"
CONVNEXT = "timm:convnext_atto:depths=(1,1,1,1):dims=(8,8,16,24):stem_type=patch:patch_size=1"
LABELS: dict[str, Any] = {"num_labels": 5}
TINY = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, **LABELS}


class Averaged(nn.Module):
    """A network with a dropout before its classifier, and functions that are no modules."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.body(self.stem(x)).relu().mean((2, 3))))


def transformers_networks(size: int) -> dict[str, nn.Module]:
    vit: dict[str, Any] = {**TINY, "num_hidden_layers": 3, "image_size": size, "patch_size": size // 4}
    swin: dict[str, Any] = {"image_size": size, "patch_size": size // 8, "embed_dim": 12, "depths": [1, 1]}
    convnext: dict[str, Any] = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2}
    resnet: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    swin |= {"num_heads": [1, 2], "window_size": 2}
    return {
        "vit": ViTForImageClassification(ViTConfig(**vit)),
        "deit": DeiTForImageClassificationWithTeacher(DeiTConfig(**vit)),
        "swin": SwinForImageClassification(SwinConfig(**swin, **LABELS)),
        "convnext": ConvNextForImageClassification(ConvNextConfig(**convnext, **LABELS)),
        "resnet": ResNetForImageClassification(ResNetConfig(**resnet, **LABELS)),
    }


NETWORKS = ["vit", "deit", "swin", "convnext", "resnet"]


def assert_same_function(model: ImageClassifier, network: nn.Module, images: Tensor) -> None:
    """Compares logits, and those of the head on the average of the map."""
    with torch.no_grad():
        outputs, expected = model.eval()(images), logits_of(network.eval()(images))
        assert_close_features(outputs.logits, expected)
        head: Any = model.head
        assert_close_features(head(average_pooled(outputs.features["map"], model.config.pool)), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_transformers_keep_their_logits(name: str, tmp_path: Path) -> None:
    data = noise(32)
    network: Any = transformers_networks(32)[name]
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="does not name its labels .*--label_names .*--trust_label_order"):
        load_transformers(str(tmp_path / "other"), data, Normalization())
    trusting = replace(data, model_labels=data.label_names)
    model, normalized = load_transformers(str(tmp_path / "other"), trusting, Normalization())
    assert_same_function(model, network, some_images(data))
    assert any("in the data's order" in note for note in normalized.notes)
    model.save_pretrained(tmp_path / "own")
    restored = ImageClassifier.from_pretrained(tmp_path / "own")
    assert_same_function(restored, network, some_images(data))
    assert_close_features(frozen(model, "fp32")(some_images(data)).logits, restored.eval()(some_images(data)).logits)
    features = image_features(model)
    assert features.head.width == model.head.in_features and features.head.size in (2, 4)
    assert len(features.stages) == {"vit": 3, "deit": 3, "swin": 2, "convnext": 3, "resnet": 2}[name]


def test_labels_and_normalization_of_transformers_are_those_of_its_files(tmp_path: Path) -> None:
    network: Any = transformers_networks(32)["vit"]
    data = noise(32)
    network.config.id2label = dict(enumerate(reversed(data.label_names)))
    network.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    model, normalized = load_transformers(str(tmp_path), data, Normalization())
    images = some_images(data)
    with torch.no_grad():
        assert_close_features(model(images).logits, network.eval()(images).logits.flip(1))
    assert normalized.mean == [0.1, 0.2, 0.3] == model.config.mean and normalized.std == [0.4, 0.5, 0.6]
    assert any("matched by name" in note for note in normalized.notes)
    _, normalized = load_transformers(str(tmp_path), data, Normalization([0.5] * 3, [0.5] * 3))
    assert normalized.mean == [0.5] * 3
    with pytest.raises(UserError, match="has 5 labels .* pass a --teacher with the same labels"):
        load_transformers(str(tmp_path), noise(32, classes=4), Normalization())
    with pytest.raises(UserError, match="pass --image_size 32"):
        load_transformers(str(tmp_path), noise(16), Normalization())


def test_a_student_with_the_configuration_of_transformers_is_saved_without_its_folder(tmp_path: Path) -> None:
    network: Any = transformers_networks(32)["vit"]
    data = noise(16)
    network.config.save_pretrained(tmp_path / "other")
    model = new_classifier(f"transformers:{tmp_path / 'other'}", data.config)
    images = some_images(data)
    assert model(images).logits.shape == (8, 5) and model.config.network is not None
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "other" / "config.json").unlink()
    restored = ImageClassifier.from_pretrained(tmp_path / "own").eval()
    torch.testing.assert_close(restored(images).logits, model.eval()(images).logits)
    with pytest.raises(UserError, match="no model"):
        new_classifier(f"transformers:{tmp_path / 'other'}", data.config)


@pytest.mark.parametrize("name", [VIT, DEIT, SWIN, CONVNEXT])
def test_networks_of_timm_load_from_a_file(name: str, tmp_path: Path) -> None:
    from kd.image_classification.teacher_model.backbones.timm_networks import timm_network

    data = noise(32)
    network = timm_network(name, 5, 32)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    model, _ = load_weights(name, str(tmp_path / "weights.pth"), data, Normalization([0.5] * 3, [0.5] * 3))
    assert_same_function(model, network, some_images(data))
    other = "timm:convnext_atto:depths=(1,1,1,1):dims=(8,8,16,32):stem_type=patch:patch_size=1"
    with pytest.raises(UserError, match="holds no weights of"):
        load_weights(other, str(tmp_path / "weights.pth"), data, Normalization())


@pytest.mark.parametrize("name", [VIT, DEIT, SWIN, CONVNEXT])
@pytest.mark.parametrize("direction", ["as teacher", "as student"])
def test_every_kind_of_method_between_a_transformer_and_a_convolutional_network(name: str, direction: str) -> None:
    data = noise(32)
    other = "resnet8" if name != SWIN else "timm:resnet18"
    teacher, student = (name, other) if direction == "as teacher" else (other, name)
    pair = Pair(new_classifier(student, data.config), new_classifier(teacher, data.config).eval(), data)
    spec = task_spec(pair.student, pair.teacher, data)
    one_by_one = len(spec.student_features.stages) == len(spec.teacher_features.stages)
    stages = ["attention", "vid"] if one_by_one else []
    for method in [METHODS[m](spec) for m in ("kd", "rkd", "fitnet", "reviewkd", "srrl", *stages)]:
        outputs, teacher_outputs = forward_both(method, pair, pair.images)
        terms = method.objective(outputs, teacher_outputs, torch.arange(8) % 5)
        assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(("teacher", "student"), [(VIT, "resnet8"), ("resnet8", VIT), (DEIT, VIT), (CONVNEXT, "vgg8")])
def test_simkd_reuses_the_classifier_on_the_last_grid(teacher: str, student: str) -> None:
    data = noise(32)
    source = new_classifier(teacher, data.config).eval()
    model = simkd_student(student, source, data, factor=2)
    head, reused = model.head.get_parameter("weight"), source.head.get_parameter("weight")
    assert torch.equal(head, reused) and not head.requires_grad
    method = simkd(model, source, SimKDArguments(), 4.0)
    outputs, teacher_outputs = forward_both(method, Pair(model, source, data), some_images(data))
    assert outputs.logits is not None and outputs.logits.shape == (8, 5)
    matched = [teacher_outputs.features[path] for path in method.teacher_features]  # type: ignore[index]
    assert matched[0].shape[2] > 1, "a grid, and not only the class token"


# ---- structures ----


def test_the_average_of_a_shifted_map() -> None:
    maps, pooled = torch.randn(2, 3, 4, 4), torch.randn(2, 12)
    shifted = with_average(maps, pooled, pool=2)
    torch.testing.assert_close(average_pooled(shifted, 2), pooled)
    differences = maps - shifted
    assert torch.allclose(differences[:, :, :2, :2].std((2, 3)), torch.zeros(2, 3), atol=1e-6)
    torch.testing.assert_close(average_pooled(with_average(maps, pooled[:, :3]), 1), pooled[:, :3])


def test_the_distiller_network_has_a_map_with_a_relu_and_2x2_averages() -> None:
    structure = find_structure(Distiller(7), "distiller", 7, 32)
    assert structure.heads == ["linear"] and structure.pool == 2 and structure.channels == 64 and structure.exact
    assert structure.last is not None and structure.last.relu and structure.last.path == "layer3"
    assert [grid.path for grid in structure.stages] == ["layer1", "layer2", "layer3"]


def test_dropout_before_the_classifier_is_kept_in_training() -> None:
    network = Averaged()
    structure = find_structure(network, "averaged", 5, 16)
    assert structure.last is not None and structure.last.path == "body" and structure.last.relu
    assert not structure.exact, "in training"
    backbone, x = NetworkBackbone(network, structure), torch.randn(4, 3, 16, 16)
    assert (average_pooled(backbone.train()(x), 1).abs() < 1e-6).float().mean() > 0.25, "dropped"
    backbone.eval()
    pooled = network.body(network.stem(x)).relu().mean((2, 3))
    torch.testing.assert_close(average_pooled(backbone(x), 1).detach(), pooled.detach(), atol=1e-5, rtol=1e-4)


def test_networks_that_return_no_logits_are_refused() -> None:
    class Returns(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Any:
            return self.value

    for value, message in (
        ("text", "returns a str, not logits"),
        (torch.zeros(2, 5, 3), r"returns a tensor of shape \(2, 5, 3\)"),
        (torch.zeros(2, 4), "returns 4 logits, the data have 5 classes"),
    ):
        with pytest.raises(UserError, match=message):
            find_structure(Returns(value), "network", 5, 16)
    with pytest.raises(UserError, match="network does not support images of 2 pixels"):
        find_structure(nn.Conv2d(3, 4, 5), "network", 5, 2)


# ---- a user's module ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `my_networks` in the working directory, which is not imported yet."""
    (tmp_path / "my_networks.py").write_text(
        "from kd_testing.other_projects import Distiller\n"
        "from torch import nn\n"
        "def small(num_classes, image_size=None):\n    return Distiller(num_classes)\n"
        "def fixed():\n    return Distiller(5)\n"
        "def fails():\n    raise RuntimeError('no such weights')\n"
        "def text():\n    return 'text'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def test_a_factory_of_the_working_directory(module: Path) -> None:
    data = noise(16)
    for name in ("my_networks:small", "my_networks:fixed"):
        model = new_classifier(name, data.config)
        assert model.config.architecture == name and model(some_images(data)).logits.shape == (8, 5)
    model.save_pretrained(module / "saved")
    sys.modules.pop("my_networks")
    with pytest.raises(UserError, match="defined in module my_networks: pass --import_module my_networks"):
        ImageClassifier.from_pretrained(module / "saved")
    assert "my_networks" not in sys.modules, "files cause no imports"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks:absent", "module my_networks has no absent"),
        ("no_such_module:small", "there is no module no_such_module .* run the command in the folder that contains"),
        ("my_networks:fails", "my_networks:fails cannot be built: RuntimeError: no such weights"),
        ("my_networks:text", "returns a str, not a torch.nn.Module"),
        ("my_networks:number", "is a int: pass a class or a function"),
    ],
)
def test_factories_that_cannot_be_used(name: str, message: str, module: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        new_classifier(name, noise(16).config)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(module: Path) -> None:
    torch.save(Distiller(5, n=2).state_dict(), module / "weights.pth")
    with pytest.raises(UserError, match="the weights of .* do not fit my_networks:small"):
        load_weights("my_networks:small", str(module / "weights.pth"), noise(16), Normalization())


# ---- learning, and export ----


@pytest.mark.slow
@pytest.mark.parametrize("name", [VIT, SWIN, CONVNEXT])
@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_transformers_are_exported(name: str, format: str, tmp_path: Path) -> None:
    data = noise(32)
    new_classifier(name, data.config).save_pretrained(tmp_path / "student")
    image_processor(data).save_pretrained(tmp_path / "student")
    words = ["--domain", "image-classification", "--format", format, "--output_dir", tmp_path / "export"]
    run_script("common/export/__main__.py", tmp_path / "student", *words)
    assert len(read_json(tmp_path / "export" / "export.json")["checks"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "size", "teacher", "student", "words"),
    [
        ("train_simkd.py", 32, VIT, "resnet8", []),
        ("train_simkd.py", 32, "resnet8", VIT, []),
        ("train_student.py", 32, DEIT, CONVNEXT, ["--method", "kd"]),
        ("train_student.py", 64, SWIN, VIT, ["--method", "fitnet:weight=1"]),
        ("train_simkd.py", 8, CONVNEXT, "shufflenetv1", []),
    ],
)
def test_transformers_learn_and_teach(
    script: str, size: int, teacher: str, student: str, words: list[str], tmp_path: Path
) -> None:
    """Handwritten digits at 8 to 64 pixels, on a CPU: both exceed three times chance, 0.1, after a short training."""
    run_script(
        f"image-classification/scripts/{script}", "--image_size", size, "--teacher", teacher, "--student", student,
        *words, "--dataset", "digits", "--optim", "adamw_torch", "--learning_rate", 3e-3, "--num_train_epochs", 12,
        "--teacher_epochs", 12, "--no_control", "--report_to", "none", "--output_dir", tmp_path,
    )  # fmt: skip
    models = read_json(tmp_path / "results.json")["models"]
    accuracies = {name: models[name]["metrics"]["test"]["accuracy"] for name in ("teacher", "student")}
    assert min(accuracies.values()) > 0.3, accuracies
