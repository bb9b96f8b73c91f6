"""Numbered views of small images, and views of large images, which are decoded for each batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kd.common.training.inference import identity_collate, run_inference
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.image_classification.data import sources
from kd.image_classification.data.large_views import LargeViews
from kd.image_classification.data.loading import IMAGENET_MEAN as MEAN
from kd.image_classification.data.loading import IMAGENET_STD as STD
from kd.image_classification.data.views import ImageViews, Views
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.distillation import ImageRun
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd_testing.image_files import in_colour, large, photos_in, pixels, sizes, small

CPU = torch.device("cpu")


@pytest.fixture
def colour(tmp_path: Path) -> str:
    return in_colour(tmp_path / "colour")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return photos_in(tmp_path_factory.mktemp("photos"))


def epoch_of(loader: DataLoader, views: ImageViews, epoch: int) -> dict[str, torch.Tensor]:
    views.set_epoch(epoch)
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# Small images


@pytest.mark.parametrize("channels, flip", [(3, True), (1, True), (1, False)])
def test_every_view_matches_its_number(channels: int, flip: bool) -> None:
    images, padding = pixels(3, 9, 9, channels), 4
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    views = Views(torch.from_numpy(images), torch.arange(3), mean, std, padding, flip)
    assert views.number_of_views == (162 if flip else 81)
    numbers = torch.arange(views.number_of_views)
    for image in range(3):
        found = views.normalized(views.crop(torch.full_like(numbers, image), numbers))
        padded = np.pad(images[image], ((4, 4), (4, 4), (0, 0)))
        for number in range(views.number_of_views):
            mirrored, place = (number % 2, number // 2) if flip else (0, number)
            top, left = divmod(place, 9)
            expected = padded[top : top + 9, left : left + 9]
            expected = expected[:, ::-1] if mirrored else expected
            expected = np.broadcast_to((expected / 255 - mean) / std, (9, 9, 3)).transpose(2, 0, 1)
            np.testing.assert_allclose(found[number], expected, atol=1e-5)


def test_a_batch_of_views() -> None:
    for channels in (1, 3):
        views = Views(torch.from_numpy(pixels(20, 8, 8, channels)), torch.arange(20), [0.5], [0.5], 1, True)
        batch = views.__getitems__([7, 3, 11])
        assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
        assert batch["labels"].tolist() == batch["sample_id"].tolist() == [7, 3, 11]
        assert torch.equal(batch["pixel_values"], views.normalized(views.crop(batch["sample_id"], batch["view"])))


def test_evaluation_views_are_the_whole_images(colour: str) -> None:
    data = small(colour)
    batch = data.views("test", CPU).__getitems__([0, 5])
    shown = batch["pixel_values"] * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    expected = data.splits["test"].pixels[[0, 5]].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)
    assert batch["view"].tolist() == [0, 0]


def test_only_color_images_are_mirrored(colour: str) -> None:
    assert Views(torch.zeros(1, 32, 32, 3), torch.zeros(1), [0.0], [1.0], 4, True).number_of_views == 162
    for dataset, flip in ((colour, True), ("digits", False)):
        views = small(dataset).views("train", CPU, augment=True)
        assert views.padding == 1 and views.flip == flip and views.number_of_views == (18 if flip else 9)


def test_views_depend_only_on_seed_and_epoch(colour: str) -> None:
    def drawn(seed: int, *epochs: int) -> list[int]:
        views = small(colour).views("train", CPU, augment=True, seed=seed)
        for epoch in epochs:
            torch.rand(3)
            views.set_epoch(epoch)
        return views.__getitems__(list(range(54)))["view"].tolist()

    assert drawn(0) == drawn(0, 3, 0) and drawn(0, 5) == drawn(0, 1, 2, 5)
    assert drawn(0, 0) != drawn(0, 1) and drawn(0, 1) != drawn(1, 1) and drawn(0, 1) != drawn(1, 0)
    assert set(drawn(0, 7)) == set(range(18))


def test_small_views_are_the_same_in_worker_processes(colour: str) -> None:
    views = small(colour).views("train", CPU, augment=True)
    here = DataLoader(views, 20, collate_fn=identity_collate)
    there = DataLoader(views, 20, collate_fn=identity_collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        expected = epoch_of(here, views, epoch)
        assert torch.equal(epoch_of(there, views, epoch)["pixel_values"], expected["pixel_values"])


# Large images


def test_large_images_have_the_same_interface(photos: str) -> None:
    data = large(photos)
    assert sizes(data) == {"train": 16, "validation": 4, "test": 4} and data.size == 72
    assert data.label_names == ["a", "b"] and data.selection_split == "validation"
    assert (data.mean, data.std) == (MEAN, STD)
    assert data.config["image_size"] == 72 and data.splits["train"].labels.dtype == torch.int64
    assert "stratified 20%" in data.notes[-1]
    assert data.fingerprint == large(photos).fingerprint != large(photos, image_size=80).fingerprint
    for augment in (False, True):
        batch = data.views("train", CPU, augment).__getitems__([3, 0])
        assert batch["pixel_values"].shape == (2, 3, 72, 72) and batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
        assert batch["sample_id"].tolist() == [3, 0]
        assert torch.equal(batch["labels"], data.splits["train"].labels[[3, 0]])
    # 0.png is grey
    shown = (batch["pixel_values"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])[1]
    torch.testing.assert_close(shown[0], shown[2])


def test_large_and_small_images_are_split_alike(photos: str) -> None:
    in_memory = small(photos, image_size=8, validation_share=0.2)
    for split, images in large(photos).splits.items():
        assert torch.equal(images.labels, in_memory.splits[split].labels)
        assert images.image(1).size == (100, 80)
    assert sizes(large(photos, max_train_samples=6)) == {"train": 6, "validation": 4, "test": 4}


def test_imagenet_is_large(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sources.read_image_splits(photos)
    monkeypatch.setattr(sources, "read_image_splits", lambda *_: found)
    data = large("imagenet", image_size=None)
    assert data.size == 224 and data.name == "imagenet"
    assert large("imagenet", image_size=32).size == 32


def test_evaluation_views_are_center_crops_of_large_images(photos: str) -> None:
    data = large(photos)
    shown = data.views("test", CPU).__getitems__([0, 3])["pixel_values"]
    files = sorted((Path(photos) / "test").rglob("*.png"))
    for found, path in zip(shown, (files[0], files[3]), strict=True):
        picture = Image.open(path).convert("RGB").resize((int(82 * 100 / 80), 82), Image.Resampling.BILINEAR)
        left, top = round((picture.width - 72) / 2), round((picture.height - 72) / 2)
        crop = np.asarray(picture.crop((left, top, left + 72, top + 72)))
        np.testing.assert_allclose(found, ((crop / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_views_of_large_images_are_the_same_in_worker_processes(photos: str) -> None:
    def loader(views: ImageViews, workers: int) -> DataLoader:
        return DataLoader(
            views, 5, collate_fn=identity_collate, num_workers=workers, persistent_workers=workers > 0, shuffle=False
        )

    data = large(photos)
    views, again = (data.views("train", CPU, augment=True, seed=3) for _ in range(2))
    here, there = loader(views, 0), loader(again, 2)
    epochs = [epoch_of(here, views, epoch)["pixel_values"] for epoch in range(2)]
    for epoch in (0, 1, 0):  # with persistent workers
        assert torch.equal(epoch_of(there, again, epoch)["pixel_values"], epochs[epoch])
    assert all(not torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    other = data.views("train", CPU, augment=True, seed=4).__getitems__([0])["pixel_values"][0]
    assert not torch.equal(other, epochs[0][0])
    views.set_epoch(0)
    torch.testing.assert_close(views.__getitems__([5, 2])["pixel_values"], epochs[0][[5, 2]])  # in any batch


def test_each_large_image_has_a_different_view(photos: str) -> None:
    copies = large(photos).splits["train"][torch.zeros(4, dtype=torch.long)]
    views = LargeViews(copies, 72, MEAN, STD, CPU, augment=True).__getitems__([0, 1, 2, 3])["pixel_values"]
    assert len({view.numpy().tobytes() for view in views}) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_also_from_a_worker_process(tmp_path: Path, workers: int) -> None:
    views = large(photos_in(tmp_path)).views("train", CPU)
    (tmp_path / "train" / "a" / "04.png").write_bytes(b"garbage")
    with pytest.raises(UserError) as caught:
        list(DataLoader(views, 5, collate_fn=identity_collate, num_workers=workers))
    assert str(caught.value) == f"{tmp_path}/train/a/04.png cannot be read (it is not an image): replace or remove it"


def test_views_do_not_change_the_global_generator(photos: str) -> None:
    views = large(photos).views("train", CPU, augment=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views.__getitems__([0, 1, 2])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_a_classifier_trains_and_is_evaluated_on_large_images(photos: str, tmp_path: Path) -> None:
    data = large(photos)
    training = ImageTrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        precision="fp32",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    run = ImageRun("teacher", training, data)
    model = run.train_on_labels("teacher", new_classifier("resnet8", data.config))
    history = run.history["teacher"]
    assert history[-1]["step"] == 2 and np.isfinite(history[-1]["train_loss"])
    assert isinstance(model, ImageClassifier) and model.config.image_size == 72
    outputs = run_inference(
        model,
        lambda **batch: {"logits": model(**batch).logits},
        data.views("test", CPU),
        identity_collate,
        batch_size=3,
    )
    assert torch.stack(outputs["logits"]).shape == (4, 2)
    run.report("teacher", {"teacher": ("resnet8", model)})
    results = read_json(tmp_path / "run" / "results.json")
    assert results["data"] == {"train": 16, "validation": 4, "test": 4, "fingerprint": data.fingerprint}
