"""Model cards of image students, and the places of images in files of predictions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from kd.common.reporting.model_card import Card
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.student_model.cards import card_of
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd_testing.image_files import draw
from kd_testing.readmes import run_readme, run_readme_alone


def card(student: ImageClassifier, labels_only: bool = False, **arguments: Any) -> Card:
    arguments = {"dataset": "digits", "teacher": "resnet8x4", "ensemble_teachers": []} | arguments
    return card_of(SimpleNamespace(argument=arguments.get), student, labels_only)  # type: ignore[arg-type]


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_code_of_a_network_of_timm_runs_without_this_project(alone: bool, tmp_path: Path) -> None:
    data = load_image_data("digits", image_size=32)
    student = new_classifier("timm:test_resnet", data.config)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            torch.nn.init.uniform_(module.running_mean)  # buffers are loaded too
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    image_processor(data).save_pretrained(folder)
    (folder / "README.md").write_text(f"```python\n{card(student).usage}\n```\n")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    picture = AutoImageProcessor.from_pretrained(folder)(Image.open(tmp_path / "image.png"), return_tensors="pt")
    expected = student.eval()(**picture).logits
    if alone:
        printed = run_readme_alone(folder, after="print(logits.argmax().item())")
        assert printed.splitlines()[-1] == str(expected.argmax().item())
    else:
        torch.testing.assert_close(run_readme(folder)["logits"], expected)


def test_a_card_names_the_teacher_and_the_data_of_the_hub(tmp_path: Path) -> None:
    data = load_image_data("digits")
    student = new_classifier("resnet8", data.config)
    assert (card(student).origins, card(student).licence, card(student).dataset) == ([], None, None)
    assert "from kd." in card(student).usage and card(student, dataset="cifar100").dataset == "uoft-cs/cifar100"
    student.save_pretrained(tmp_path / "teacher")
    assert card(student, teacher=str(tmp_path / "teacher")).origins == [str(tmp_path / "teacher")]
    assert card(student, labels_only=True, teacher=str(tmp_path / "teacher")).origins == []
    assert card(student, teacher="timm:resnet18").origins == []  # digits are not its classes: it is trained first
    imagenet = new_classifier("resnet8", data.config | {"id2label": dict(enumerate(map(str, range(1000))))})
    found = card(imagenet, teacher="timm:resnet18", dataset="imagenet")
    assert found.origins == ["timm/resnet18.a1_in1k"] and found.licence == "apache-2.0"


def test_places_of_images_in_folders_are_their_files(tmp_path: Path) -> None:
    for name in ("1/b.png", "0/a.png"):
        draw(tmp_path / "new" / name, Image.new("RGB", (8, 8)))
    data = load_image_data(str(tmp_path / "new"), label_names=["0", "1"])
    paths = [str(tmp_path / "new" / name) for name in ("0/a.png", "1/b.png")]
    assert data.places == {"test": {"row": [0, 1], "file": paths}}
    assert load_image_data("digits").places["test"]["row"][:3] == [0, 1, 2]
