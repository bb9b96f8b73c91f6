"""Weights of other projects: names, containers, and refusals."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd.common.utils.errors import UserError
from kd.image_classification.teacher_model.classifier import new_classifier
from kd.image_classification.teacher_model.published import Normalization, load_weights
from kd.image_classification.teacher_model.state_dicts import read_state_dict, rename
from kd_testing.image_networks import assert_close_features, randomize_norms
from kd_testing.image_pairs import noise, some_images
from kd_testing.other_projects import ResNet, networks

KNOWN = Normalization([0.5] * 3, [0.3] * 3)


def saved(folder: Path, contents: Any) -> str:
    torch.save(contents, folder / "weights.pth")
    return str(folder / "weights.pth")


def state_of(classes: int = 5) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    network = ResNet(classes, 1, 16, 16, "shortcut", "linear")
    randomize_norms(network)
    return network.eval(), network.state_dict()


@pytest.mark.parametrize("naming", networks(5))
def test_networks_of_each_repository_keep_their_logits_by_name(naming: str, tmp_path: Path) -> None:
    architecture, network = networks(5)[naming]
    randomize_norms(network)
    shuffled = dict(reversed(network.state_dict().items()))  # so that the order does not match
    data = noise(32)
    model, normalized = load_weights(architecture, saved(tmp_path, {"model": shuffled}), data, KNOWN)
    images = some_images(data)
    with torch.no_grad():
        assert_close_features(model(images).logits, network.eval()(images))
    assert (normalized.mean, normalized.std) == (KNOWN.mean, KNOWN.std)
    assert any("matched with" in note and note.endswith("by name") for note in normalized.notes)


def test_unknown_names_are_matched_in_their_order(tmp_path: Path) -> None:
    network, state = state_of()
    numbered = {f"part_{i}": value for i, (name, value) in enumerate(state.items()) if "num_batches" not in name}
    data = noise(32)
    model, normalized = load_weights("resnet8", saved(tmp_path, numbered), data, KNOWN)
    with torch.no_grad():
        assert_close_features(model(some_images(data)).logits, network(some_images(data)))
    assert any(note.endswith("by order") for note in normalized.notes)


def test_containers_and_prefixes_of_training_scripts(tmp_path: Path) -> None:
    _, state = state_of()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    options = argparse.Namespace(model="resnet8", lr_decay_epochs=[150])
    for contents in (
        {"model": wrapped, "opt": options, "optimizer": {"state": {}}, "best_acc": np.float64(0.7)},
        {"state_dict": wrapped, "epoch": 3, "best_prec1": torch.tensor(71.0)},
        {"net": state, "acc": np.float32(0.9)},
        {"weights_of_anything": {f"model.module.{name}": value.half() for name, value in state.items()}},
        wrapped,
    ):
        found = read_state_dict(saved(tmp_path, contents))
        assert found.keys() == state.keys()
        assert all(torch.allclose(found[name].float(), state[name].float(), rtol=1e-2) for name in state)
        assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    save_file(state, tmp_path / "weights.safetensors")
    assert read_state_dict(tmp_path / "weights.safetensors").keys() == state.keys()


class Payload:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, state = state_of()
    (tmp_path / "damaged.pth").write_bytes(b"not weights")
    first = next(iter(state))
    cases: list[tuple[Any, str]] = [
        (network, "contains more than tensors .* is not unpickled: save the weights alone"),
        ({"model": state, "extra": Payload()}, "contains more than tensors"),
        ({"epoch": 3, "acc": 0.5}, "has no state dict, but a dictionary of epoch, acc"),
        ({"first": state, "second": state}, "has no state dict, but a dictionary of first, second"),
        ([1, 2], "has no state dict, but list"),
        (state | {first: state[first] * torch.nan}, "are damaged: conv1.weight is not finite"),
    ]
    for contents, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read_state_dict(saved(tmp_path, contents))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read weights from"):
        read_state_dict(tmp_path / "damaged.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_weights_are_matched_only_as_a_bijection_of_equal_shapes(tmp_path: Path) -> None:
    _, state = state_of()
    target = new_classifier("resnet8", noise(32).config).state_dict()
    renamed, how = rename(state, target, "resnet8")
    assert how == "name" and renamed.keys() == target.keys()
    with pytest.raises(UserError, match=r"the file has 50 tensors, the architecture 78|the file has \d+ tensors"):
        rename(state, new_classifier("resnet14", noise(32).config).state_dict(), "resnet14")
    with pytest.raises(UserError, match=r"linear.weight has shape \(5, 64\), not \(7, 64\)"):
        rename(state, new_classifier("resnet8", noise(32, 7).config).state_dict(), "resnet8")
    twice = {f"x.{name}": value for name, value in state.items()} | {"x.extra": state["linear.bias"]}
    with pytest.raises(UserError, match="tensors, the architecture"):
        rename(twice, target, "resnet8")
    with pytest.raises(UserError, match="there is no file"):
        load_weights("resnet8", str(tmp_path / "absent.pth"), noise(32), KNOWN)


def test_a_missing_normalization_is_noted_and_a_wrong_one_refused(tmp_path: Path) -> None:
    _, state = state_of()
    path, data = saved(tmp_path, state), noise(32)
    _, normalized = load_weights("resnet8", path, data, Normalization())
    assert normalized.mean == data.mean
    assert any("pass --teacher_mean and --teacher_std" in note for note in normalized.notes)
    with pytest.raises(UserError, match="--teacher_mean needs one value per channel, 1 or 3, got 2"):
        load_weights("resnet8", path, data, Normalization([0.5, 0.5], [0.3] * 3))
