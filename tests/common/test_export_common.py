"""Export of any model: equal outputs at any size, int8 by hand, reloading, and errors."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.export.exportable import (
    Exportable,
    check_equal,
    export_student,
    max_abs_difference,
    share_of_ties,
)
from kd.common.export.int8 import Int8Embedding, Int8Linear, load_int8, quantize_dynamic
from kd.common.export.onnx import OnnxModel, load_program, quantize_onnx, to_onnx, to_program
from kd.common.metrics.cost import interleaved_latency
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script
from kd_testing.tiny import model as tiny_model

pytestmark = pytest.mark.usefixtures("onnx_operators_once")


class Mixed(nn.Module):
    """A lookup, a convolution and attention: ids and pixels -> logits (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(50, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 3, bias=False))

    def forward(self, ids: Tensor, scale: Tensor) -> Outputs:
        x = self.embedding(ids) * scale.unsqueeze(-1)  # (batch, positions, 32)
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return Outputs(logits=self.layers(x.mean(1)), features={"hidden": x})


@pytest.fixture
def mixed() -> Mixed:
    return Mixed().eval()


def batch(size: int, positions: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(50, (size, positions)), "scale": torch.rand(size, positions)}


def linear(weight: list[list[float]], bias: list[float] | None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


# ---- ONNX ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Mixed, Path]:
    """A model and the folder that holds its two graphs."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("graphs"), Mixed().eval()
    to_onnx(model, batch(2, 4), folder / "fp32.onnx", {0: "batch", 1: "position"})
    quantize_onnx(folder / "fp32.onnx", folder / "int8.onnx")
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("size", [(2, 4), (1, 1), (1, 9), (33, 2)])
def test_a_graph_gives_the_same_logits_at_any_size(exported, size):
    model, folder = exported
    inputs = batch(*size)
    torch.testing.assert_close(OnnxModel(folder / "fp32.onnx")(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_int8_graph_has_int8_weights_and_nearly_the_same_logits(exported):
    model, folder = exported
    weights = onnx.load(folder / "int8.onnx").graph.initializer
    small = {tuple(w.dims) for w in weights if w.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    assert {(50, 32), (32, 256), (256, 3)} <= small
    assert "model.convolution.weight" in {w.name for w in weights}  # fp32: its dynamic kernel would be slow
    inputs = batch(64, 5)
    expected, found = model(**inputs).logits, OnnxModel(folder / "int8.onnx")(**inputs).logits
    error = (found - expected).abs().max() / expected.std()
    assert 0 < error < 0.2


@torch.no_grad()
def test_export_is_quiet_in_eval_mode_and_leaves_only_its_files(tmp_path, capfd, recwarn):
    classifier = tiny_model(dropout=0.5).train()
    to_onnx(classifier, {"x": torch.randn(3, 6)}, tmp_path / "fp32.onnx", {0: "batch"})
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    x = torch.randn(17, 6)
    torch.testing.assert_close(OnnxModel(tmp_path / "fp32.onnx")(x=x).logits, classifier.eval()(x).logits)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]


def test_an_example_of_size_one_is_an_error(mixed, tmp_path):
    with pytest.raises(ValueError, match="ids, scale must have at least 2"):
        to_onnx(mixed, batch(1, 4), tmp_path / "model.onnx", {0: "batch", 1: "position"})
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_program_gives_the_same_logits_at_any_size(mixed, tmp_path):
    to_program(mixed, batch(2, 4), tmp_path / "model.pt2", {0: "batch", 1: "position"})
    program = load_program(tmp_path / "model.pt2")
    for size in ((2, 4), (1, 1), (1, 9), (33, 2)):
        inputs = batch(*size)
        torch.testing.assert_close(program(*inputs.values()), mixed(**inputs).logits)


class Pointwise(nn.Module):
    """Rows (batch, left) and (batch, right) -> their products (batch, left, right)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left.unsqueeze(2) * right.unsqueeze(1)


def test_each_input_may_have_other_axes(tmp_path):
    axes = {"left": {0: "batch", 1: "left"}, "right": {0: "batch", 1: "right"}}
    example = {"left": torch.rand(2, 3), "right": torch.rand(2, 4)}
    to_onnx(Pointwise(), example, tmp_path / "model.onnx", axes, "products")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert graph.output[0].name == "products"
    assert [d.dim_param for d in graph.output[0].type.tensor_type.shape.dim] == ["batch", "left", "right"]
    left, right = torch.rand(5, 1), torch.rand(5, 7)
    torch.testing.assert_close(OnnxModel(tmp_path / "model.onnx").predict(left=left, right=right),
                               torch.einsum("bl,br->blr", left, right))  # fmt: skip


# ---- int8 in torch ----


def test_int8_linear_by_hand():
    layer = Int8Linear(linear([[1.0, -0.5], [0.25, 2.0]], [10.0, 0.0]))
    # Scales 1/127 and 2/127; -63.5 rounds to the even -64, 15.875 to 16.
    assert layer.weight.tolist() == [[127, -64], [16, 127]]
    x = torch.tensor([[[3.0, -1.5], [0.0, 0.0]]])
    # Row scale 3/127, so the row is (127, -64): sums 127*127 + 64*64 = 20225 and 127*16 - 64*127 = -6096.
    first = [10 + 20225 * 3 / 127**2, -6096 * 6 / 127**2]
    torch.testing.assert_close(layer(x), torch.tensor([[first, [10.0, 0.0]]]))


def test_int8_linear_is_close_to_fp32_at_every_scale():
    layer = nn.Linear(64, 16)
    layer.weight.data *= torch.logspace(-3, 3, 16).unsqueeze(1)  # a scale per output, or small outputs would vanish
    x = torch.randn(40, 64) * torch.logspace(-3, 3, 40).unsqueeze(1)  # and one per row
    layer.bias.data.zero_()
    expected = layer(x)
    norms = x.norm(dim=1, keepdim=True) * layer.weight.norm(dim=1)
    assert ((Int8Linear(layer)(x) - expected).abs() / norms).max() < 0.01


def test_int8_embedding_is_off_by_half_a_step_at_most():
    table = nn.Embedding(7, 5)
    ids = torch.tensor([[0, 6], [3, 3]])
    half = table.weight.abs().amax(1, keepdim=True) / 127 / 2
    difference = (Int8Embedding(table)(ids) - table(ids)).abs()
    assert (difference <= half[ids] * 1.001).all()
    assert difference.max() > 0


@torch.no_grad()
def test_quantize_dynamic_returns_a_copy_and_keeps_subclasses(mixed):
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    inputs = batch(6, 5)
    small = quantize_dynamic(mixed)
    assert {type(module).__name__ for module in small.layers} == {"Int8Linear", "ReLU"}
    assert isinstance(small.embedding, Int8Embedding)
    assert not isinstance(small.attention.out_proj, Int8Linear)  # nn.MultiheadAttention reads its weights
    torch.testing.assert_close(small(**inputs).logits, mixed(**inputs).logits, rtol=0, atol=0.02)
    assert not torch.equal(small(**inputs).logits, mixed(**inputs).logits)
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())


@torch.no_grad()
def test_int8_weights_load_into_another_model_of_the_same_shape(mixed, tmp_path: Path):
    small = quantize_dynamic(mixed)
    save_model(small, str(tmp_path / "int8.safetensors"))
    assert load_file(tmp_path / "int8.safetensors")["layers.0.weight"].dtype == torch.int8
    inputs = batch(3, 4)
    loaded = load_int8(Mixed(), tmp_path / "int8.safetensors")
    assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)


class WithBottleneck(nn.Module):
    """A linear encoder before a bottleneck."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.bottleneck = DiscreteKeyValueBottleneck(8, 3, codebooks=4, codebook_size=5, **shape)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.bottleneck(self.encoder(x), mask)


@torch.no_grad()
@pytest.mark.parametrize("shape", [{"value_dim": 6}, {"decoder": "mean"}, {"decoder": "mean", "split": "projection"}])
def test_values_are_int8_with_a_scale_per_key(shape, tmp_path: Path):
    torch.manual_seed(0)
    model = WithBottleneck(**shape)
    model.bottleneck.values.normal_().mul_(torch.logspace(-2, 2, 5).view(1, 5, 1))
    model.bottleneck.freeze_keys()
    save_model(quantize_dynamic(model), str(tmp_path / "int8.safetensors"))
    stored = load_file(tmp_path / "int8.safetensors")
    values = (stored["bottleneck.values"] * stored["bottleneck.scale"]).view_as(model.bottleneck.values)
    half = model.bottleneck.values.abs().amax(-1, keepdim=True) / 127 / 2
    assert stored["bottleneck.values"].dtype == torch.int8
    assert ((values - model.bottleneck.values).abs() <= half * 1.001).all()
    assert not {"bottleneck.key_sums", "bottleneck.key_counts"} & set(stored)  # only fitting keys needs them

    loaded = load_int8(WithBottleneck(**shape), tmp_path / "int8.safetensors")
    rounded = copy.deepcopy(model)
    rounded.bottleneck.values.copy_(values)
    for inputs in ((torch.randn(20, 8),), (torch.randn(20, 6, 8), torch.rand(20, 6) < 0.7)):
        expected, tolerance = rounded(*inputs), 1e-6 if "decoder" in shape else 0.02  # the linear decoder is int8 too
        scale = expected.abs().max()
        torch.testing.assert_close(loaded(*inputs) / scale, expected / scale, rtol=0, atol=tolerance)


# ---- exporting a student ----

USAGE = """import numpy as np

x = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)
print(model({"x": x}).argmax(1))"""


def tiny_exportable(**changes: Any) -> Exportable:
    x = torch.randn(9, 6)
    arguments: dict[str, Any] = {
        "model": tiny_model(dropout=0.5).eval(),
        "inputs": {"x": x[:2]},
        "test_inputs": [{"x": x[:1]}, {"x": x}],
    }
    return Exportable(**(arguments | {"axes": {0: "batch"}, "usage": USAGE} | changes))


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_a_student_is_exported(tmp_path, capsys, format):
    def write(folder: Path) -> None:
        (folder / "labels.txt").write_text("cat")

    student = tiny_exportable(write_files=write)
    export_student("tiny", student, format, tmp_path / "export")
    folder = tmp_path / "export"
    file = {"onnx": "model.onnx", "torch.export": "model.pt2"}[format]
    assert {path.name for path in folder.iterdir()} == {file, "labels.txt", "README.md", "export.json", "SHA256SUMS"}
    checks = json.loads((folder / "export.json").read_text())["checks"]
    assert [(check["inputs"], check["output"]) for check in checks] == [
        ({"x": [1, 6]}, [1, 3]),
        ({"x": [9, 6]}, [9, 3]),
    ]
    assert max(check["difference"] for check in checks) < 1e-5
    assert str(folder) in capsys.readouterr().out
    found = run_readme(folder, *(["torch"] if format == "onnx" else []))
    expected = student.predict({"x": torch.from_numpy(found["x"])})
    np.testing.assert_allclose(found["model"]({"x": found["x"]}), expected.numpy(), atol=1e-6)
    assert capsys.readouterr().out.strip() == str(expected.argmax(1).numpy())


def slightly_wrong(x: Tensor) -> Tensor:
    return tiny_exportable().model(x).logits + torch.tensor([0.0, 0.01, 0.0])


class Branching(nn.Module):
    """Has control flow that depends on the data, which no exporter can trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": slightly_wrong},
            "on 10 of 10 rows the outputs differ by more than 0.001, at most by 0.01; nothing",
        ),
        ({"reference": lambda x: x}, "differ by more than 0.001, at most by inf"),
        ({"model": Branching()}, "student cannot be exported as"),
    ],
)
def test_an_export_with_other_outputs_writes_nothing(tmp_path, format, changes, message):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_text("an earlier one")
    with pytest.raises(UserError, match=message):
        export_student("student", tiny_exportable(**changes), format, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.read_text() for path in (tmp_path / "export").iterdir()] == ["an earlier one"]


def test_test_inputs_need_other_sizes_along_every_variable_axis():
    x = torch.randn(9, 6)
    with pytest.raises(ValueError, match="no test input has another size of x's batch"):
        tiny_exportable(test_inputs=[{"x": x[:2]}, {"x": x[4:6]}])


def test_equal_outputs():
    outputs = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 3.0]])
    close = outputs + np.array([[1e-4, 0], [0, 0], [0, 5e-4]])  # the tie is decided differently
    np.testing.assert_allclose(max_abs_difference(outputs, close), [1e-4, 0, 5e-4])
    check_equal("student", max_abs_difference(outputs, close), "texts")
    for wrong in (0.1, float("nan")):
        other = outputs + np.array([[0, 0], [0, wrong], [0, 0]])
        with pytest.raises(UserError, match="on 1 of 3 texts"):
            check_equal("student", max_abs_difference(outputs, other), "texts")
        check_equal("student", max_abs_difference(outputs, other), "texts", ties=0.001)  # one row at least
    assert max_abs_difference(np.zeros((2, 3)), np.zeros((2, 1))).tolist() == [np.inf, np.inf]
    assert max_abs_difference(np.array([1, 3]), np.array([1, 2])).tolist() == [0, 1]


def test_only_a_bottleneck_may_have_ties():
    x = torch.randn(4, 6)
    with_keys = nn.Sequential(nn.Linear(6, 4), DiscreteKeyValueBottleneck(4, 3, codebooks=2, codebook_size=4))
    example: dict[str, Any] = {"inputs": {"input": x[:2]}, "test_inputs": [{"input": x}]}
    assert share_of_ties(tiny_exportable(model=with_keys, **example).model) > 0
    assert share_of_ties(tiny_exportable().model) == 0


@pytest.fixture
def error_of(capsys) -> Callable[..., str]:
    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_script("common/export/__main__.py", *words)
        (error,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        return error

    return run


def test_bad_input_is_one_line(error_of, tmp_path):
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    assert "pass --domain, one of NLP, image-classification, reinforcement-learning" in error_of(student)
    assert "there is no domain speech" in error_of(student, "--domain", "speech")
    assert "invalid choice: 'onxn'" in error_of(student, "--format", "onxn")
    assert "no folder or file" in error_of(tmp_path / "missing")
    (tmp_path / "run" / "export").mkdir()
    assert "is not an export: choose another --output_dir" in error_of(tmp_path / "run")
    (tmp_path / "run" / "export" / "export.json").write_text("{}")
    assert "--overwrite_output_dir" in error_of(student)
    (tmp_path / "run" / "results.json").write_text("no JSON")
    assert "not valid JSON" in error_of(student, "--output_dir", tmp_path / "new")
    (tmp_path / "run" / "results.json").write_text('{"domain": "image-classification", "task": "digits"}')
    assert "no model in" in error_of(student, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- latency ----


class Recorded(nn.Module):
    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x: Tensor) -> None:
        self.calls.append(self.name)


def test_latency_is_measured_in_turns():
    calls: list[str] = []
    inputs = {"x": torch.zeros(4, 1)}
    found = interleaved_latency({name: (Recorded(name, calls), inputs) for name in "ab"}, repeats=3)
    assert calls == ["a", "a", "b", "b"] * 3  # each after a warm-up
    assert list(found) == ["a", "b"]
    assert found["a"]["batch"] == 4
    assert 0 < found["a"]["median"] <= found["a"]["p90"]
    assert np.isfinite(found["b"]["p90"])
