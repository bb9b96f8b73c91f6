"""forget.py and add.py on image students: exact, saved, refused. The students count labels without any training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from kd.common.bottleneck.training import CodeDataset, add_samples, encode_samples, set_keys
from kd.common.training.inference import identity_collate
from kd.image_classification.data.image_data import Images, SmallImageData
from kd.image_classification.student_model.bottleneck import BottleneckProbe
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.teacher_model.classifier import new_classifier
from kd_testing.image_files import draw, small
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("digits_once")
SHAPE = {"codebooks": 8, "codebook_size": 16, "key_dim": 6}
DRAWN = torch.arange(40)  # rows of train that tests write as files


@pytest.fixture(scope="module")
def digits() -> SmallImageData:
    return small("digits")


def counted(kind: str, data: SmallImageData, folder: Path, **shape: Any) -> Path:
    """Saves a student of the digits 0 to 8 whose values have counted its training images."""
    torch.manual_seed(0)
    shape, model = SHAPE | {"decoder": "mean", "split": "projection", "values": "counted"} | shape, None
    if kind == "classifier":
        model = new_classifier("resnet8", data.config, bottleneck=shape).eval()
    else:
        model = BottleneckProbe.from_encoder(None, data, shape)
    codes = torch.stack(model_codes(model, data))
    if shape["values"] == "counted":
        known = data.splits["train"].labels < 9
        samples = CodeDataset(list(codes[known]), data.splits["train"].labels[known], torch.arange(int(known.sum())))
        add_samples(model.bottleneck, samples)
    model.save_pretrained(folder)
    image_processor(data).save_pretrained(folder)
    return folder


def model_codes(model: Any, data: SmallImageData) -> list[torch.Tensor]:
    """Codes of the training images, after keys are fitted to them."""
    views = data.views("train", torch.device("cpu"))
    with torch.no_grad():
        set_keys(
            model.bottleneck, "new", None, model.embed(views.__getitems__(list(range(len(views))))["pixel_values"]), 0
        )
    return encode_samples(model, views, identity_collate, "fp32", 250)


@pytest.fixture(scope="module", params=["classifier", "probe"])
def student(request, digits, tmp_path_factory) -> Path:
    return counted(request.param, digits, tmp_path_factory.mktemp("students") / request.param)


def write_images(folder: Path, images: Images, names: list[str] | None = None) -> Path:
    """Writes images as CLASS/NAME.png; by default the class is the digit."""
    for row, (picture, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        draw(folder / (names[row] if names else str(label)) / f"{row}.png", picture.squeeze(-1).numpy())
    return folder


def change(script: str, model: Path, output: Path, *words: object) -> Any:
    run_script(f"image-classification/scripts/{script}.py", model, "--output_dir", output, *words)
    return AutoModelForImageClassification.from_pretrained(output).eval()


def logits(model: Any, data: SmallImageData) -> torch.Tensor:
    pixels = data.views("test", torch.device("cpu")).__getitems__(list(range(50)))["pixel_values"]
    with torch.no_grad():
        return model(pixels).logits


def test_images_are_added_and_forgotten_again(student, digits, tmp_path, capsys):
    before = AutoModelForImageClassification.from_pretrained(student).eval()
    images = digits.splits["test"][digits.splits["test"].labels < 9][DRAWN]
    files = write_images(tmp_path / "files" / "train", images).parent  # every split counts, and none is made
    larger = change("add", student, tmp_path / "larger", "--examples", files)
    assert "Added 40 examples in" in capsys.readouterr().out
    added = larger.bottleneck.label_counts - before.bottleneck.label_counts
    assert torch.equal(added.sum(1), torch.bincount(images.labels, minlength=10).int().expand(8, -1))
    assert not torch.equal(logits(larger, digits), logits(before, digits))
    back = change("forget", tmp_path / "larger", tmp_path / "back", "--examples", files)
    assert "Forgot 40 examples in" in capsys.readouterr().out
    kept, found = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "back"))
    assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)
    assert torch.equal(logits(back, digits), logits(before, digits))
    with pytest.raises(SystemExit) as stopped:  # they cannot be forgotten twice
        change("forget", tmp_path / "back", tmp_path / "again", "--examples", files)
    assert stopped.value.code == 2 and "never added" in capsys.readouterr().err


def test_a_new_class_is_predicted_and_forgotten(student, digits, tmp_path, capsys):
    nines = digits.splits["train"][digits.splits["train"].labels == 9]
    files = write_images(tmp_path / "files", nines, ["new"] * len(nines))
    larger = change("add", student, tmp_path / "larger", "--examples", files)
    assert f"Added {len(nines)} examples and 1 classes (new)" in capsys.readouterr().out
    assert larger.config.id2label[10] == "new" and larger.config.label2id["new"] == 10
    before = AutoModelForImageClassification.from_pretrained(student).eval()
    tests = digits.splits["test"].labels[:50] == 9
    found = logits(larger, digits)
    assert (found.argmax(1)[tests] == 10).double().mean() > 0.6
    assert (logits(before, digits)[~tests].argmax(1) == found[~tests].argmax(1)).double().mean() > 0.8
    back = change("forget", tmp_path / "larger", tmp_path / "back", "--examples", files)
    assert torch.equal(back.bottleneck.label_counts[..., :10], before.bottleneck.label_counts)
    assert torch.equal(logits(back, digits)[:, :9], logits(before, digits)[:, :9])
    assert not (logits(back, digits).argmax(1) >= 9).any()


def test_a_class_is_forgotten(student, tmp_path, capsys):
    found = change("forget", student, tmp_path / "less", "--classes", "3")
    assert not found.bottleneck.label_counts[..., 3].any()
    assert "Exact" in capsys.readouterr().out and "## Changed" in (tmp_path / "less" / "README.md").read_text()


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory) -> Path:
    """Students, and folders of images that do not fit them."""
    folder = tmp_path_factory.mktemp("folders")
    for values in ("counted", "trained"):
        counted("classifier", digits, folder / values, values=values)
    draw(folder / "small" / "3" / "1.png", Image.new("L", (8, 8)))
    draw(folder / "large" / "3" / "1.png", Image.new("L", (16, 16)))
    draw(folder / "others" / "cat" / "1.png", Image.new("L", (8, 8)))
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("script", "student", "examples", "message"),
    [
        ("add", "trained", "small", "trained values cannot add examples: pass a student with --values counted"),
        ("forget", "trained", "small", "--examples needs counted values"),
        ("add", "counted", "large", "counted was trained on images of 8 pixels, large has 16: pass --image_size 8"),
        ("forget", "counted", "large", "counted was trained on images of 8 pixels, large has 16: pass --image_size 8"),
        ("add", "counted", "empty", "no images in folder"),
        ("add", "counted", "nonsense", "unknown dataset"),
        ("forget", "counted", "nonsense", "unknown dataset"),
        ("forget", "counted", "others", "has the label 'cat' (1 row of test), which is not among 0, 1"),
        ("add", "counted", None, "pass --examples FILE"),
    ],
)
def test_refusals(folders, tmp_path, capsys, script, student, examples, message):
    words = [] if examples is None else ["--examples", folders / examples]
    with pytest.raises(SystemExit) as stopped:
        change(script, folders / student, tmp_path / "out", *words)
    error = capsys.readouterr().err.rpartition("\r")[2].lstrip()
    assert stopped.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert message in error


def test_resized_images_are_added(digits, tmp_path):
    model = counted("probe", digits, tmp_path / "student")
    draw(tmp_path / "files" / "3" / "1.png", Image.new("L", (16, 16)))
    found = change("add", model, tmp_path / "out", "--examples", tmp_path / "files", "--image_size", 8)
    before = load_file(model / "model.safetensors")["head.label_counts"]
    assert (found.bottleneck.label_counts - before).sum((1, 2)).tolist() == [1] * 8


def test_a_student_without_a_bottleneck_is_refused(digits, tmp_path, capsys):
    new_classifier("resnet8", digits.config).save_pretrained(tmp_path / "student")
    image_processor(digits).save_pretrained(tmp_path / "student")
    with pytest.raises(SystemExit):
        change("forget", tmp_path / "student", tmp_path / "out", "--classes", "3")
    assert "has no bottleneck: pass a student of distill_bottleneck.py" in capsys.readouterr().err
