"""Exported image students: the code in README.md preprocesses an image as their image processor does."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from kd.common.bottleneck.training import set_keys
from kd.image_classification.student_model.bottleneck import BottleneckProbe
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd_testing.image_files import NAMES, in_colour, photos_in, pixels
from kd_testing.image_files import large as large_data
from kd_testing.image_files import small as small_data
from kd_testing.readmes import code_of, run_readme
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("onnx_operators_once")
PROJECTOR = {"out_channels": 32, "factor": 2, "relu": True, "max_size": None}


def student_of(kind: str, data: Any, **shape: Any) -> Any:
    """A student with random weights and with running statistics that differ from those of a new network."""
    if kind == "probe":
        shape = {"codebooks": 4, "codebook_size": 8, "key_dim": 3} | shape
        model: Any = BottleneckProbe.from_encoder(None, data, shape)
        head, width = model.head, 3 * data.size**2
    else:
        parts: dict[str, Any] = {"projector": PROJECTOR} if kind == "simkd" else {}
        if kind == "bottleneck":
            parts["bottleneck"] = {"codebooks": 4, "codebook_size": 8} | shape
        model = new_classifier("resnet8", data.config, **parts)
        model.train()(torch.randn(50, 3, data.size, data.size))
        head, width = model.head, 64
    if kind in ("probe", "bottleneck"):
        set_keys(head, "new", None, torch.randn(100, width), 0)
        torch.nn.init.normal_(head.values)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "format", "large"),
    [
        ("plain", "onnx", True),
        pytest.param("simkd", "onnx", False, marks=pytest.mark.slow),
        pytest.param("simkd", "torch.export", False, marks=pytest.mark.slow),
        pytest.param("bottleneck", "torch.export", False, marks=pytest.mark.slow),
        ("probe", "torch.export", True),
    ],
)
def test_an_image_student(tmp_path, monkeypatch, capsys, kind, format, large):
    data: Any = large_data(photos_in(tmp_path / "data")) if large else small_data(in_colour(tmp_path / "data"))
    student = tmp_path / "run" / "student"
    student_of(kind, data).save_pretrained(student)
    image_processor(data).save_pretrained(student)
    (tmp_path / "run" / "results.json").write_text(json.dumps({"domain": "image-classification", "task": data.name}))
    run_script("common/export/__main__.py", student, "--format", format)
    capsys.readouterr()

    side = 101 if large else data.size  # crops of an odd size; resizing alone is the same in both libraries
    picture = Image.fromarray(pixels(1, side, side + 60 * large, 3)[0])
    picture.save(tmp_path / "run" / "image.png")  # next to the export
    found = run_readme(tmp_path / "run" / "export", *(["torch", "transformers"] if format == "onnx" else []))
    seen = AutoImageProcessor.from_pretrained(student)(picture, return_tensors="pt")["pixel_values"]
    assert found["inputs"]["pixel_values"].shape == seen.shape
    apart = np.abs(found["inputs"]["pixel_values"] - seen.numpy())
    assert apart.mean() < 0.02 if large else apart.max() < 1e-5  # two ways of rounding while resizing
    model = AutoModelForImageClassification.from_pretrained(student).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(found["inputs"]["pixel_values"])).logits
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    names = ["a", "b"] if large else sorted(NAMES, key=data.label_names.index)
    assert capsys.readouterr().out.strip() == names[expected.argmax()]


@pytest.mark.parametrize("kind", ["probe", "bottleneck"])
def test_values_in_int8(tmp_path, monkeypatch, capsys, kind):
    data = small_data(in_colour(tmp_path / "data"))
    student = tmp_path / "run" / "student"
    model = student_of(kind, data, decoder="mean", values="counted")
    model.bottleneck.add(torch.randint(8, (500, 4)), torch.randint(3, (500,)))
    model.save_pretrained(student)
    image_processor(data).save_pretrained(student)
    (tmp_path / "run" / "results.json").write_text(json.dumps({"domain": "image-classification", "task": data.name}))
    run_script("common/export/__main__.py", student, "--format", "torch-int8")
    output, folder = capsys.readouterr().out, tmp_path / "run" / "export"

    stored = load_file(folder / "model_int8.safetensors")
    values = model.bottleneck.values
    assert stored["head.values"].dtype == torch.int8 and stored["head.values"].shape == (4 * 8, 3)
    assert not {"head.label_counts", "head.key_sums"} & stored.keys()
    stated = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1]}
    assert stated["values"] == [str(values.numel() * 4), str(values.numel() + 4 * 8 * 4)]  # fp32; int8 with a scale
    assert stated["counts"][1] == "0"
    of_parts = sum(int(stated[part][1].replace(",", "")) for part in ("encoder", "keys", "values"))
    assert of_parts == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())

    picture = Image.fromarray(pixels(1, data.size, data.size, 3)[0])
    picture.save(tmp_path / "run" / "image.png")
    found: dict[str, Any] = {}
    with contextlib.chdir(tmp_path / "run"), torch.no_grad():
        exec(code_of(folder), found)
        expected = model(torch.from_numpy(found["inputs"]["pixel_values"])).logits
    bound = values.abs().amax((1, 2)).mean().item() / 254
    difference = np.abs(found["logits"] - expected.numpy()).max()
    assert 0 < difference <= bound + 1e-5
    assert json.loads((folder / "export.json").read_text())["tolerance"] == pytest.approx(bound + 1e-3)


def test_the_whole_student_is_in_the_export(tmp_path):
    """The export contains backbone, projector and head."""
    data = small_data(in_colour(tmp_path / "data"))
    model: ImageClassifier = student_of("simkd", data)
    assert model.projector is not None
    torch.nn.init.zeros_(model.projector.layers[-2].weight)
    torch.nn.init.ones_(model.projector.layers[-2].bias)
    model.save_pretrained(tmp_path / "student")
    image_processor(data).save_pretrained(tmp_path / "student")
    run_script(
        "common/export/__main__.py",
        tmp_path / "student",
        "--domain",
        "image-classification",
        "--format",
        "torch.export",
    )
    program = torch.export.load(tmp_path / "export" / "model.pt2").module()
    expected = model.head(torch.ones(1, 32))
    torch.testing.assert_close(program(torch.randn(1, 3, 10, 10)), expected)
