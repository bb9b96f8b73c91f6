"""Weak and strong views: the weak ones are those of always, the strong ones a function of seed, epoch and image."""

from pathlib import Path

import pytest
import torch
from pictures import large, photos_in, pixels
from scripts import run_script

from common.utils.errors import UserError
from common.utils.files import read_json
from image_classification.data.loading import load_image_data
from image_classification.data.strong_views import StrongViews, cut_out
from image_classification.data.views import Views

CPU = torch.device("cpu")


def views_of(kind: type[Views], channels: int = 3, seed: int = 0) -> Views:
    images = torch.from_numpy(pixels(12, 16, 16, channels))
    return kind(images, torch.arange(12) % 4, [0.5] * channels, [0.25] * channels, padding=2, flip=True, seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_holds_the_usual_views_and_then_the_same_images_changed(channels):
    weak, both = views_of(Views, channels), views_of(StrongViews, channels)
    for epoch in (0, 3):
        weak.set_epoch(epoch)
        both.set_epoch(epoch)
        usual, batch = weak.__getitems__([4, 1, 7]), both.__getitems__([4, 1, 7])
        assert batch["pixel_values"].shape == (6, 3, 16, 16)
        assert torch.equal(batch["pixel_values"][:3], usual["pixel_values"])
        assert batch["sample_id"].tolist() == [4, 1, 7] * 2 and batch["labels"].tolist() == [0, 1, 3] * 2
        changed = (batch["pixel_values"][3:] != usual["pixel_values"]).flatten(1).any(1)
        assert changed.all(), "at the least a square is cut out"
        assert "view" not in batch


def test_a_strong_view_depends_on_seed_epoch_and_image_alone():
    views = views_of(StrongViews)
    state = torch.get_rng_state()
    alone, among = views.__getitems__([5]), views.__getitems__([2, 5, 9])
    assert torch.equal(torch.get_rng_state(), state), "nothing else is disturbed"
    assert torch.equal(alone["pixel_values"][1], among["pixel_values"][4])
    assert torch.equal(alone["pixel_values"][1], views_of(StrongViews).__getitems__([5])["pixel_values"][1])
    other_seed = views_of(StrongViews, seed=1)
    assert not torch.equal(alone["pixel_values"][1], other_seed.__getitems__([5])["pixel_values"][1])
    views.set_epoch(1)
    assert not torch.equal(alone["pixel_values"][1], views.__getitems__([5])["pixel_values"][1])


def test_cutout_is_a_square_of_up_to_half_the_width():
    torch.manual_seed(0)
    widths = set()
    for _ in range(100):
        cut = (cut_out([7])(torch.zeros(1, 32, 32, dtype=torch.uint8))[0] == 7).nonzero()
        height, width = (cut.max(0).values - cut.min(0).values + 1).tolist()
        assert height == width and len(cut) == height * width
        widths.add(width)
    assert min(widths) < 6 and 13 < max(widths) <= 16


@pytest.mark.parametrize("script, words", [("train_simkd.py", []), ("train_student.py", ["--method", "kd"])])
def test_a_student_and_its_control_are_trained_on_both(script, words, tmp_path: Path):
    run_script(f"image-classification/scripts/{script}", "--teacher", "resnet8", "--student", "resnet8", *words,
               "--strong_views", "--train_samples", 64, "--num_train_epochs", 1, "--report_to", "none",
               "--output_dir", tmp_path / "run")  # fmt: skip
    results = read_json(tmp_path / "run" / "results.json")
    assert results["models"]["control"] and results["models"]["student"]
    assert "strong_views: true" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_what_has_no_strong_views_or_no_table_of_them_is_refused(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="64 pixels or less"):
        large(photos_in(tmp_path / "photos")).views("train", CPU, augment=True, strong=True)
    words = ["--strong_views", "--teacher_views", tmp_path / "v", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        run_script("image-classification/scripts/train_student.py", *words)
    assert stopped.value.code == 2 and "there is no table of them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert isinstance(load_image_data("digits").views("train", CPU, augment=True, strong=True), StrongViews)
