"""Backbones: published sizes and shapes, recorded maps, folding of batch norms, saving, and weights from timm."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from kd.common.methods import Feature
from kd.common.pretrained import load_model
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.matching import image_features
from kd.image_classification.teacher_model.backbones import COMMON, build_backbone
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier
from kd.image_classification.teacher_model.timm_weights import pretrained_classifier
from kd_testing.image_networks import assert_close_features, randomize_norms

# name: (parameters with a head for 100 classes, channels of the last map, its size for 32x32 and for 8x8 images,
# (channels, size) after each stage for 32x32 images)
NETWORKS: dict[str, tuple[int, int, int, int, list[tuple[int, int]]]] = {
    "resnet20": (278_324, 64, 8, 2, [(16, 32), (32, 16), (64, 8)]),
    "resnet32": (472_756, 64, 8, 2, [(16, 32), (32, 16), (64, 8)]),
    "resnet56": (861_620, 64, 8, 2, [(16, 32), (32, 16), (64, 8)]),
    "resnet110": (1_736_564, 64, 8, 2, [(16, 32), (32, 16), (64, 8)]),
    "resnet18": (11_220_132, 512, 4, 1, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    "resnet34": (21_328_292, 512, 4, 1, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    "resnet50": (23_705_252, 2048, 4, 1, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "resnet14x2": (703_732, 128, 8, 2, [(32, 32), (64, 16), (128, 8)]),
    "resnet38x2": (2_255_604, 128, 8, 2, [(32, 32), (64, 16), (128, 8)]),
    "resnet110x2": (6_911_220, 128, 8, 2, [(32, 32), (64, 16), (128, 8)]),
    "resnet8x4": (1_233_540, 256, 8, 2, [(64, 32), (128, 16), (256, 8)]),
    "resnet32x4": (7_433_860, 256, 8, 2, [(64, 32), (128, 16), (256, 8)]),
    "wrn_16_2": (703_284, 128, 8, 2, [(32, 32), (64, 16), (128, 8)]),
    "wrn_16_4": (2_772_020, 256, 8, 2, [(64, 32), (128, 16), (256, 8)]),
    "wrn_40_1": (569_780, 64, 8, 2, [(16, 32), (32, 16), (64, 8)]),
    "wrn_40_2": (2_255_156, 128, 8, 2, [(32, 32), (64, 16), (128, 8)]),
    "vgg8": (3_965_028, 512, 4, 1, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg11": (9_277_284, 512, 4, 1, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg13": (9_462_180, 512, 4, 1, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg16": (14_774_436, 512, 4, 1, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg19": (20_086_692, 512, 4, 1, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "mobilenetv2": (812_836, 1280, 2, 1, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "mobilenetv2x1.0": (2_353_060, 1280, 2, 1, [(24, 16), (32, 8), (96, 4), (320, 2)]),
    "shufflenetv1": (949_258, 960, 4, 1, [(240, 16), (480, 8), (960, 4)]),
    "shufflenetv2x0.5": (443_716, 1024, 4, 1, [(48, 16), (96, 8), (192, 4)]),
    "shufflenetv2": (1_355_528, 1024, 4, 1, [(116, 16), (232, 8), (464, 4)]),
    "shufflenetv2x1.5": (2_580_548, 1024, 4, 1, [(176, 16), (352, 8), (704, 4)]),
    "shufflenetv2x2.0": (5_549_320, 2048, 4, 1, [(244, 16), (488, 8), (976, 4)]),
}
# one per family and two of timm: with buffers that timm does not save, and with a head that widens the last map
ONE_OF_EACH = ["resnet20", "resnet50", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
FROM_TIMM = ["timm:resnet18", "timm:resnetblur18", "timm:mobilenetv3_small_050"]


def classifier(architecture: str, num_labels: int = 100) -> ImageClassifier:
    """Batch norms have random statistics, so that omitting one changes the output."""
    model = new_classifier(architecture, {"num_labels": num_labels})
    randomize_norms(model)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_sizes_and_shapes(name: str) -> None:
    parameters, channels, size, size_of_8, stages = NETWORKS[name]
    model = classifier(name)
    backbone = model.backbone
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert backbone.num_features == channels
    found: list[tuple[int, ...]] = []
    for path in backbone.stages:
        backbone.get_submodule(path).register_forward_hook(lambda module, x, y: found.append(tuple(y.shape[1:])))
    with torch.no_grad():
        assert backbone(images(32)).shape == (2, channels, size, size)
        assert found == [(width, pixels, pixels) for width, pixels in stages]
        assert backbone(images(8)).shape == (2, channels, size_of_8, size_of_8)
        assert bool((backbone(images(12)) >= 0).all()), "the last map is after a ReLU"


@pytest.mark.parametrize(
    ("name", "channels", "size", "positive"),
    [  # feat_s[-2] of RepDistiller's and mdistiller's networks for 32x32 images, read from their code
        ("resnet8x4", 256, 8, True),
        ("resnet50", 2048, 4, True),
        ("wrn_16_2", 128, 8, False),  # before the last batch norm and ReLU
        ("vgg8", 512, 4, True),
        ("mobilenetv2", 160, 2, False),  # before the 1x1 convolution to 1280 channels; a linear bottleneck
        ("shufflenetv1", 960, 4, True),
        ("shufflenetv2", 464, 4, True),  # before the 1x1 convolution to 1024
        ("shufflenetv2x1.5", 704, 4, True),
    ],
)
def test_the_last_map_is_that_of_the_toolboxes(name: str, channels: int, size: int, positive: bool) -> None:
    model = classifier(name)
    path = f"backbone.{model.backbone.stages[-1]}"
    assert image_features(model).last == Feature(path, channels, size, positive)


@pytest.mark.parametrize(("name", "channels", "size"), [("mobilenetv2", 160, 2), ("shufflenetv2x1.5", 704, 4)])
def test_remove_last_returns_the_map_of_the_last_stage(name: str, channels: int, size: int) -> None:
    whole = classifier(name).backbone
    cut = copy.deepcopy(whole)
    cut.remove_last()
    assert cut.num_features == channels and not any(key.startswith("last") for key in cut.state_dict())
    recorded: list[Tensor] = []
    whole.get_submodule(whole.stages[-1]).register_forward_hook(lambda module, x, y: recorded.append(y))
    with torch.no_grad():
        x = images()
        whole(x)
        assert cut(x).shape == (2, channels, size, size)
        torch.testing.assert_close(cut(x), recorded[0], rtol=0, atol=0)
    plain = classifier("resnet8").backbone
    plain.remove_last()
    assert plain.num_features == 64


def test_initialization_is_that_of_the_toolboxes():
    """Standard deviations: sqrt(2 / (k * k * out)) with He's initialization; 1 / sqrt(3 * fan in) with PyTorch's,
    which is uniform up to 1 / sqrt(fan in); 0.01 or PyTorch's for heads.
    """
    he, pytorch = (lambda conv: math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))), None
    for name, expected, deviation, bias in (
        ("resnet20", he, 1 / math.sqrt(3 * 64), False),
        ("wrn_16_2", he, 1 / math.sqrt(3 * 128), True),
        ("vgg8", he, 0.01, True),
        ("mobilenetv2", he, 0.01, True),
        ("shufflenetv1", pytorch, 1 / math.sqrt(3 * 960), False),
        ("shufflenetv2", pytorch, 1 / math.sqrt(3 * 1024), False),
    ):
        torch.manual_seed(0)
        model = new_classifier(name, {"num_labels": 100})
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 8000]
        assert convolutions, name
        for conv in convolutions:
            fan_in = conv.weight[0].numel()
            wanted = expected(conv) if expected else 1 / math.sqrt(3 * fan_in)
            assert conv.weight.std().item() == pytest.approx(wanted, rel=0.1), name
            assert conv.bias is None or not conv.bias.any(), name
        assert model.head.weight.std().item() == pytest.approx(deviation, rel=0.1), name
        assert (not model.head.bias.any()) == bias, name


def changed(folder: Path, **values: Any) -> Path:
    """The folder of a saved classifier, with `values` changed in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "vgg11"}, "missing: backbone.layer2.1.0.bias"),  # only adds convolutions
        ({"architecture": "resnet8"}, "missing: backbone"),
        ({"architecture": "resnet20"}, "missing: backbone"),
        ({"id2label": {0: "a"}, "label2id": {"a": 0}}, r"of another size: head.bias \(5,\) instead of \(1,\)"),
        ({"projector": {"out_channels": 512}}, "missing: projector"),
    ],
)
@pytest.mark.parametrize("load", [ImageClassifier, AutoModelForImageClassification])
def test_weights_of_another_network_raise_one_line(
    load: Any, values: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    classifier("vgg8", num_labels=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(load, changed(tmp_path, **values))
    assert "\n" not in str(caught.value) and "LOAD REPORT" not in capfd.readouterr().err


def test_common_names_are_tested() -> None:
    assert set(COMMON) <= NETWORKS.keys()


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *FROM_TIMM])
def test_hooks_record_maps_that_are_not_modified_later(name: str) -> None:
    """After a forward pass, the recorded input and output of a stage or block still belong together."""
    backbone = classifier(name).backbone
    paths = list(backbone.stages)
    for path in backbone.stages:
        stage = backbone.get_submodule(path)
        if isinstance(stage, nn.Sequential):
            paths += [f"{path}.{block}" for block, _ in stage.named_children()]
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def record(path: str) -> Any:
        return lambda module, inputs, output: recorded.__setitem__(path, (inputs[0], output))

    hooks = [backbone.get_submodule(path).register_forward_hook(record(path)) for path in paths]
    with torch.no_grad():
        backbone(images())
        for hook in hooks:
            hook.remove()
        assert len(recorded) == len(paths) > len(backbone.stages) >= 3
        for path, (before, after) in recorded.items():
            torch.testing.assert_close(backbone.get_submodule(path)(before), after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet20", 0),
        ("resnet50", 0),
        (
            "wrn_16_2",
            6,
        ),  # the batch norms of a sum, or of a map with other readers, remain: most bn1, and the last bn
        ("wrn_16_1", 7),  # also bn1 of the first block, because its shortcut reads the stem
        ("vgg8", 0),
        ("mobilenetv2", 0),
        ("shufflenetv1", 0),
        ("shufflenetv2", 0),
        ("timm:resnet18", 0),
    ],
)
def test_folding_keeps_the_outputs(name: str, left: int) -> None:
    model = classifier(name)
    fast = frozen(model, "fp32")
    assert norms(fast) == left < norms(model)
    with torch.no_grad():
        x = images()
        expected = model(x)
        found = fast(x)
    assert_close_features(found.logits, expected.logits)
    assert_close_features(found.features["map"], expected.features["map"])


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *FROM_TIMM])
def test_a_loaded_model_returns_the_same_logits(name: str, tmp_path: Path) -> None:
    model = classifier(name, num_labels=5)
    model.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x).logits, model(x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = classifier(name).train()
    model(images()).logits.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn40_2", r"unknown architecture 'wrn40_2': choose one such as .*; did you mean wrn_40_2 or wrn_40_1\?"),
        ("ShuffleV2", "did you mean shufflenetv2 or"),
        ("resnet101", r"depth of a ResNet .* 6n \+ 2, at least 8, got 101; did you mean timm:resnet101\?"),
        ("convnext_atto", r"did you mean timm:convnext_atto\?"),
        ("wrn_4_2", r"depth 6n \+ 4 and width 1 or more, got 4 and 2"),
        ("wrn_16_0", "got 16 and 0"),
        ("vgg12", "one of 8, 11, 13, 16, 19, got 12"),
        ("mobilenetv2x0.01", "at least 0.0625, got 0.01"),
        ("shufflenetv2x3", "one of 0.5, 1, 1.5, 2, got 3"),
        ("quite something else", "choose one such as [^;]*$"),
        ("timm:resnetx18", "timm has no model 'resnetx18'; did you mean one of resnet18,"),
        ("timm:resnet18.nobody", "no weights 'nobody' of resnet18, only a1_in1k, "),
        ("timm:test_vit", r"are not a map .* \(1, 101, 64\) for a batch of one\): choose a convolutional network"),
        ("timm:test_mambaout", r"are not a map .* \(1, 5, 5, 256\)"),  # channels come last
        ("timm:inception_next_atto", "Cannot disable pooling"),
    ],
)
def test_an_unknown_name_raises_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_backbone(name)
    assert "\n" not in str(caught.value)


# ---- pretrained networks of timm, from a file of random weights instead of the Hub ----


def checkpoint(folder: Path, name: str, num_classes: int = 1000) -> tuple[nn.Module, str]:
    original = timm.create_model(name, num_classes=num_classes).eval()
    randomize_norms(original)
    path = folder / "weights.safetensors"
    save_file(original.state_dict(), path)
    return original, str(path)


def test_pretrained_returns_the_logits_of_timm(tmp_path: Path) -> None:
    original, path = checkpoint(tmp_path, "resnetblur18")
    model = pretrained_classifier("resnetblur18", checkpoint=path, image_size=64)
    config: Any = model.config
    assert config.architecture == "timm:resnetblur18" and config.image_size == 64
    assert config.mean == [0.485, 0.456, 0.406] and config.std == [0.229, 0.224, 0.225]
    assert config.id2label[0] == "tench, Tinca tinca" and config.id2label[134] == "crane (n02012849)"
    assert len(config.label2id) == config.num_labels == 1000
    model.save_pretrained(tmp_path / "saved")
    loaded = ImageClassifier.from_pretrained(tmp_path / "saved").eval()
    x = images(64)
    with torch.no_grad():
        for restored in (model, loaded):
            torch.testing.assert_close(restored(x).logits, original(x), rtol=0, atol=1e-4)


def test_checkpoints_in_half_precision_and_from_a_wrapper(tmp_path: Path) -> None:
    original, _ = checkpoint(tmp_path, "test_resnet", num_classes=2)
    weights = original.state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    torch.save({"state_dict": {f"module.{name}": t for name, t in weights.items()}, "epoch": 3}, tmp_path / "all.pth")
    for file, expected in (("half.safetensors", half), ("all.pth", weights)):
        model = pretrained_classifier("test_resnet", str(tmp_path / file), label_names=["cat", "dog"])
        found = model.state_dict()
        for name, tensor in expected.items():
            copied = found[name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.model.{name}"]
            assert copied.dtype == tensor.float().dtype or not tensor.is_floating_point()
            assert torch.equal(copied, tensor.to(copied.dtype)), name


def test_pretrained_with_other_labels_and_normalization(tmp_path: Path) -> None:
    _, path = checkpoint(tmp_path, "test_resnet", num_classes=2)
    model = pretrained_classifier("test_resnet", path, label_names=["cat", "dog"], mean=[0.1] * 3, std=[0.2] * 3)
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.image_size == 160
    assert model.config.mean == [0.1] * 3 and model.config.std == [0.2] * 3


@pytest.mark.parametrize(("name", "size"), [("mobilenetv3_small_050", 64), ("test_vit", 160), ("test_convnext", 64)])
def test_pretrained_with_layers_between_pooling_and_classifier(tmp_path: Path, name: str, size: int) -> None:
    """A layer with an activation, a class token, and a layer norm."""
    original, path = checkpoint(tmp_path, name)
    model, x = pretrained_classifier(name, path, image_size=size), images(size)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, original(x), rtol=1e-4, atol=1e-3)


def test_pretrained_rejects_invalid_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = checkpoint(tmp_path, "test_resnet", num_classes=2)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint": path}, "holds no weights of timm:test_resnet with 1000 classes"),
        ({"checkpoint": str(broken)}, "cannot get timm's|cannot read weights|are damaged"),
        ({"checkpoint": str(tmp_path / "absent")}, "there is no file"),
        ({"label_names": ["cat", "dog"]}, "has 1000 classes, not the 2 of label_names"),
        ({}, "cannot get timm's pretrained weights of test_resnet .* pass the local folder of a trained classifier"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            pretrained_classifier("test_resnet", **arguments)
        assert "\n" not in str(caught.value)
