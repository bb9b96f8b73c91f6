"""Strong views: the weak half equals `Views`, and the strong half depends only on seed, epoch and image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.image_classification.data import strong_views as views_module
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.data.strong_views import AUGMENTATIONS, StrongViews, cut_out, draw_operations
from kd.image_classification.data.views import Views
from kd_testing.image_files import large, photos_in, pixels
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("digits_once")
CPU = torch.device("cpu")


def views_of(kind: type[Views], channels: int = 3, seed: int = 0) -> Views:
    images = torch.from_numpy(pixels(12, 16, 16, channels))
    return kind(images, torch.arange(12) % 4, [0.5] * channels, [0.25] * channels, padding=2, flip=True, seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_holds_weak_views_and_then_augmented_other_crops_of_the_same_images(channels):
    weak, both = views_of(Views, channels), views_of(StrongViews, channels)
    for epoch in (0, 3):
        weak.set_epoch(epoch)
        both.set_epoch(epoch)
        usual, batch = weak.__getitems__([4, 1, 7]), both.__getitems__([4, 1, 7])
        assert batch["pixel_values"].shape == (6, 3, 16, 16)
        assert torch.equal(batch["pixel_values"][:3], usual["pixel_values"])
        assert batch["sample_id"].tolist() == [4, 1, 7] * 2 and batch["labels"].tolist() == [0, 1, 3] * 2
        changed = (batch["pixel_values"][3:] != usual["pixel_values"]).flatten(1).any(1)
        assert changed.all()
        assert "view" not in batch


def test_crops_of_weak_and_strong_views_are_independent(monkeypatch):
    """Without operations and cutout, a strong view is one of 50 crops, and rarely the weak one."""
    monkeypatch.setattr(views_module, "OPERATIONS", 0)
    monkeypatch.setattr(views_module, "CUT_OUT", 0.0)
    images = torch.from_numpy(pixels(60, 16, 16, 3))
    kind = [0.5] * 3, [0.25] * 3, 2, True
    views, plain = (k(images, torch.zeros(60, dtype=torch.long), *kind) for k in (StrongViews, Views))
    assert views.number_of_views == 50
    batch = views.__getitems__(list(range(60)))["pixel_values"]
    same, numbers = (batch[:60] == batch[60:]).flatten(1).all(1), []
    assert same.sum() < 6
    for i in range(60):
        crops = plain.normalized(plain.crop(torch.full((50,), i), torch.arange(50)))
        (found,) = (crops == batch[60 + i]).flatten(1).all(1).nonzero()
        numbers.append(found.item())
    assert len(set(numbers)) > 25, "most of the 50 crops occur"


def test_a_strong_view_depends_only_on_seed_epoch_and_image():
    views = views_of(StrongViews)
    state = torch.get_rng_state()
    alone, among = views.__getitems__([5]), views.__getitems__([2, 5, 9])
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not change"
    assert torch.equal(alone["pixel_values"][1], among["pixel_values"][4])
    assert torch.equal(alone["pixel_values"][1], views_of(StrongViews).__getitems__([5])["pixel_values"][1])
    other_seed = views_of(StrongViews, seed=1)
    assert not torch.equal(alone["pixel_values"][1], other_seed.__getitems__([5])["pixel_values"][1])
    views.set_epoch(1)
    assert not torch.equal(alone["pixel_values"][1], views.__getitems__([5])["pixel_values"][1])


def test_magnitudes_are_random_and_within_the_published_ranges():
    """The ranges of MLKD's RandAugment, as its code lists them."""
    ranges = sorted((low, high) for _, low, high in AUGMENTATIONS)
    assert ranges == sorted([(0, 0)] * 3 + [(0.05, 0.95)] * 4 + [(4, 8), (-30, 30), (0, 256)] + [(-0.3, 0.3)] * 4)
    generator, drawn = torch.Generator().manual_seed(0), {}
    for _ in range(600):
        operations = draw_operations(generator)
        assert len(operations) == 2
        for operation in operations:
            function, magnitude = operation.args
            drawn.setdefault(function, []).append(magnitude)
    assert drawn.keys() == {operation for operation, _, _ in AUGMENTATIONS}
    for operation, low, high in AUGMENTATIONS:
        found = drawn[operation]
        assert 40 < len(found) < 140, "all operations are equally likely"
        assert low <= min(found) <= max(found) <= high
        assert max(found) - min(found) >= 0.8 * (high - low)


def test_each_operation_matches_pillow():
    """Compares with the Pillow calls of MLKD's code at the same magnitude, up to rounding and edges."""
    image = torch.from_numpy(pixels(1, 16, 16, 3)[0]).permute(2, 0, 1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    named = {
        "autocontrast": lambda v: ImageOps.autocontrast(picture),
        "brightness": lambda v: ImageEnhance.Brightness(picture).enhance(v),
        "colour": lambda v: ImageEnhance.Color(picture).enhance(v),
        "contrast": lambda v: ImageEnhance.Contrast(picture).enhance(v),
        "equalize": lambda v: ImageOps.equalize(picture),
        "identity": lambda v: picture,
        "posterize": lambda v: ImageOps.posterize(picture, int(v)),
        "rotate": lambda v: picture.rotate(v),
        "sharpness": lambda v: ImageEnhance.Sharpness(picture).enhance(v),
        "shear_x": lambda v: picture.transform((16, 16), Image.Transform.AFFINE, (1, v, 0, 0, 1, 0)),
        "shear_y": lambda v: picture.transform((16, 16), Image.Transform.AFFINE, (1, 0, 0, v, 1, 0)),
        "solarize": lambda v: ImageOps.solarize(picture, v),
        "translate_x": lambda v: picture.transform((16, 16), Image.Transform.AFFINE, (1, 0, -v * 16, 0, 1, 0)),
        "translate_y": lambda v: picture.transform((16, 16), Image.Transform.AFFINE, (1, 0, 0, 0, 1, -v * 16)),
    }
    for (operation, low, high), (name, expected) in zip(AUGMENTATIONS, named.items(), strict=True):
        for share in (0.25, 0.75):  # at these magnitudes no shift is half a pixel
            magnitude = low + share * (high - low)
            if name.startswith("translate"):
                magnitude = round(16 * magnitude) / 16  # Pillow rounds to the nearest pixel
            found = operation(image, magnitude).permute(1, 2, 0).numpy().astype(int)
            gap = abs(found - np.asarray(expected(magnitude)).astype(int)).max(2)
            assert (gap > 2).mean() < 0.15, (name, magnitude)


def test_each_operation_runs_at_both_ends_of_its_range():
    image = torch.from_numpy(pixels(1, 16, 16, 3)[0]).permute(2, 0, 1)
    for operation, *ends in AUGMENTATIONS:
        for magnitude in (*ends, ends[1] - 0.5 * (ends[1] > 1)):
            found = operation(image, magnitude)
            assert found.dtype == torch.uint8 and found.shape == image.shape
    solarize = next(operation for operation, _, high in AUGMENTATIONS if high == 256)
    assert torch.equal(solarize(image, 255.5), image), "no value reaches this threshold"
    assert torch.equal(solarize(image, 0.0), 255 - image)


def test_cutout_is_a_square_of_up_to_half_the_width_that_may_exceed_the_border():
    generator, sides, cut = torch.Generator().manual_seed(0), set(), 0
    for _ in range(300):
        image = cut_out(torch.zeros(1, 32, 32, dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8), generator)
        filled = (image[0] == 7).nonzero()
        if len(filled):
            height, width = (filled.max(0).values - filled.min(0).values + 1).tolist()
            assert len(filled) == height * width and max(height, width) <= 16
            at_border = filled.max() == 31
            assert height == width or at_border
            cut += height != width
            sides.add(max(height, width))
    assert min(sides) < 3 and max(sides) > 14 and cut > 10


@pytest.mark.parametrize("script, words", [("train_simkd.py", []), ("train_student.py", ["--method", "kd"])])
def test_a_student_and_its_control_are_trained_on_both(script, words, tmp_path: Path):
    run_script(f"image-classification/scripts/{script}", "--dataset", "digits", "--teacher", "resnet8", "--student",
               "resnet8", *words, "--strong_augmentation", "--max_train_samples", 64, "--num_train_epochs", 1,
               "--report_to", "none", "--output_dir", tmp_path / "run")  # fmt: skip
    results = read_json(tmp_path / "run" / "results.json")
    assert results["models"]["control"] and results["models"]["student"]
    assert "strong_augmentation: true" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_large_images_and_cached_views_are_rejected_with_strong_augmentation(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="at most 64 pixels"):
        large(photos_in(tmp_path / "photos")).views("train", CPU, augment=True, strong=True)
    words = ["--strong_augmentation", "--teacher_views", tmp_path / "v", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        run_script("image-classification/scripts/train_student.py", *words)
    assert stopped.value.code == 2 and "--teacher_views" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert isinstance(load_image_data("digits").views("train", CPU, augment=True, strong=True), StrongViews)
