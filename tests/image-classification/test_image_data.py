"""Image data: splits, where they come from, and errors of one line."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kd.common.data.sources import stratified
from kd.image_classification.data import distorted_digits, loading
from kd.image_classification.data.image_data import LargeImageData, SmallImageData
from kd.image_classification.data.loading import channel_statistics, load_image_data
from kd.image_classification.data.sources import read_images
from kd_testing.image_files import NAMES, draw, error_of, in_colour, pixels, png, sizes, small, write


@pytest.fixture
def colour(tmp_path: Path) -> str:
    return in_colour(tmp_path / "colour")


# Splits


def test_digits() -> None:
    data = small("digits")
    assert sizes(data) == {"train": 1294, "validation": 144, "test": 359} and data.size == 8 and not data.flip
    assert data.label_names == [str(i) for i in range(10)] and data.selection_split == "validation"
    assert data.config["id2label"][3] == "3" and data.config["image_size"] == 8
    assert data.splits["train"].labels.dtype == torch.int64 and data.splits["train"].pixels.dtype == torch.uint8
    assert data.fingerprint == small("digits").fingerprint and "stratified 10%" in data.notes[-1]
    every = torch.cat([images.pixels.flatten(1) for images in data.splits.values()])
    assert len(every) == 1797 and every.max() == 255


def test_distorted_digits_are_fixed_and_the_splits_share_no_handwriting() -> None:
    """An image without distortion, light and noise is one of scikit-learn's digits, of another set in each split."""
    data = small("distorted_digits")
    assert sizes(data) == {"train": 1500, "validation": 500, "test": 1000} and data.size == 8 and not data.flip
    assert data.label_names == [str(i) for i in range(10)]
    assert min(np.bincount(images.labels).min() / len(images) for images in data.splits.values()) > 0.08
    assert data.fingerprint == small("distorted_digits").fingerprint
    with pytest.MonkeyPatch.context() as patch:
        plain = {
            "ROTATION": 0,
            "SHEAR": 0,
            "SHIFT": 0,
            "SCALE": (1, 1),
            "BRIGHTNESS": (1, 1),
            "GRADIENT": 0,
            "NOISE": 0,
        }
        for name, value in plain.items():
            patch.setattr(distorted_digits, name, value)
        drawn = distorted_digits.distorted_digits()
    digits = load_digits()
    labels = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    parts = []
    for pixels_of_split, labels_of_split in drawn.values():
        originals = [np.round(image / (255 / 16)).tobytes() for image in pixels_of_split]
        assert [labels[original] for original in originals] == labels_of_split.tolist()
        parts.append(set(originals))
    assert sum(map(len, parts)) == len(labels) == len(set.union(*parts))


def test_validation_is_a_fixed_stratified_part_of_train(tmp_path: Path) -> None:
    labels = [0] * 120 + [1] * 60 + [2] * 20
    pictures = pixels(200, 4, 4)
    folder = write(tmp_path, NAMES, train=(pictures, labels))
    torch.manual_seed(1)
    np.random.seed(1)  # independent of the seed of a run
    data = small(folder, validation_share=0.2)
    assert Counter(data.splits["validation"].labels.tolist()) == {0: 24, 1: 12, 2: 4}
    parts = [{row.numpy().tobytes() for row in data.splits[name].pixels} for name in ("train", "validation")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {row.tobytes() for row in pictures}
    torch.manual_seed(2)
    np.random.seed(2)
    assert small(folder, validation_share=0.2).fingerprint == data.fingerprint
    assert small(folder, validation_share=0.1).fingerprint != data.fingerprint


def test_a_validation_split_is_kept(colour: str, tmp_path: Path) -> None:
    rows = (pixels(9, 4, 4), [0, 1, 2] * 3)
    data = small(write(tmp_path / "three", NAMES, train=rows, val=rows, test=rows, extra=rows))
    assert sizes(data) == {"train": 9, "validation": 9, "test": 9}
    assert data.notes == ["split extra is not used", "labels: 3 classes (cat, ant, bee)"]
    without = small(colour, validation_share=0)
    assert sizes(without) == {"train": 60, "test": 12} and without.selection_split == "test"


@pytest.mark.usefixtures("digits_once")
def test_max_train_samples_selects_the_same_images_every_time() -> None:
    labels = np.array([0] * 300 + [1] * 100)
    assert np.array_equal(stratified(labels, 0.1), stratified(labels, 0.1))
    assert labels[stratified(labels, 0.1)].tolist() == [0] * 30 + [1] * 10
    whole, part = small("digits"), small("digits", max_train_samples=200)
    assert sizes(part) == {"train": 200, "validation": 144, "test": 359}
    assert set(Counter(part.splits["train"].labels.tolist()).values()) <= {19, 20, 21}
    assert {p.numpy().tobytes() for p in part.splits["train"].pixels} <= {
        p.numpy().tobytes() for p in whole.splits["train"].pixels
    }
    assert part.fingerprint == small("digits", max_train_samples=200).fingerprint and "200 of the" in part.notes[-1]
    assert small("digits", max_train_samples=9999).fingerprint == whole.fingerprint


def test_mean_and_standard_deviation(colour: str) -> None:
    data = small(colour)
    values = data.splits["train"].pixels.numpy() / 255
    assert data.mean == pytest.approx(values.mean((0, 1, 2)), abs=6e-5)
    assert data.std == pytest.approx(values.std((0, 1, 2)), abs=6e-5)
    mean, std = channel_statistics(torch.zeros(5, 2, 2, 1, dtype=torch.uint8))
    assert mean == [0] and std == [1e-4]  # not zero, since pixels are divided by it


def test_one_changed_pixel_or_label_changes_the_fingerprint(tmp_path: Path) -> None:
    pictures, labels = pixels(6, 4, 4), [0, 1, 2, 0, 1, 2]

    def fingerprint(name: str, names: list[str] | None = NAMES) -> str:
        return small(write(tmp_path / name, names, train=(pictures, labels), test=(pictures, labels))).fingerprint

    found = [fingerprint("a"), fingerprint("names", ["a", "b", "c"]), fingerprint("again")]
    assert found[0] == found[2] != found[1]
    pictures[3, 0, 0] ^= 1
    found.append(fingerprint("pixel"))
    labels[3] = 1
    found.append(fingerprint("label"))
    assert len(set(found)) == 4


# Where images come from


def test_parquet_with_and_without_metadata_holds_the_same_pixels(tmp_path: Path) -> None:
    rows = (pixels(9, 5, 5, 3), [0, 1, 2] * 3)
    named = small(write(tmp_path / "named", NAMES, train=rows, test=rows))
    plain = small(write(tmp_path / "plain", None, train=rows, test=rows))
    assert named.label_names == NAMES and plain.label_names == ["0", "1", "2"]
    for split in ("train", "test"):
        assert torch.equal(named.splits[split].pixels, plain.splits[split].pixels)
        assert torch.equal(named.splits[split].labels, plain.splits[split].labels)
    assert torch.equal(named.splits["test"].pixels, torch.from_numpy(rows[0]))
    other = pa.table({"id": range(9), "picture": [png(p) for p in rows[0]], "kind": rows[1]})
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        pq.write_table(other, tmp_path / "other" / f"{split}.parquet")
    assert small(tmp_path / "other", label_column="kind").fingerprint == plain.fingerprint
    message = error_of(tmp_path / "other")
    assert "--label_column" in message and "id, picture, kind" in message


def test_classes_of_another_split_are_matched_by_name(tmp_path: Path) -> None:
    pictures = pixels(3, 4, 4)
    write(tmp_path, NAMES, train=(pictures, [0, 1, 2]))
    data = small(write(tmp_path, NAMES[::-1], test=(pictures, [0, 1, 2])), validation_share=0)
    assert data.splits["test"].labels.tolist() == [2, 1, 0]


def test_folders_of_images(tmp_path: Path) -> None:
    pictures = pixels(8, 6, 6, 3)
    for number, label in enumerate(["dog", "cat"] * 4):
        split = "train" if number < 6 else "test"
        draw(tmp_path / split / label / "images" / f"{number}.PNG", pictures[number])
    draw(tmp_path / "train" / "dog" / ".thumbnails" / "1.png", pictures[0])
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    data = small(tmp_path, validation_share=0)
    assert data.label_names == ["cat", "dog"] and data.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.splits["train"].pixels, torch.from_numpy(pictures[[1, 3, 5, 0, 2, 4]]))
    assert data.name == tmp_path.name and sizes(data) == {"train": 6, "test": 2}


def test_image_modes(tmp_path: Path) -> None:
    grey = pixels(1, 4, 4)[0]
    palette = Image.fromarray(pixels(1, 4, 4, 3)[0]).quantize(8)
    pictures = {
        "grey": Image.fromarray(grey),
        "grey_alpha": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (4, 4), 7)]),
        "bit": Image.fromarray(grey > 128),
        "palette": palette,
        "alpha": Image.merge("RGBA", [Image.new("L", (4, 4), value) for value in (1, 2, 3, 128)]),
    }
    assert [picture.mode for picture in pictures.values()] == ["L", "LA", "1", "P", "RGBA"]
    data = small(write(tmp_path / "mixed", NAMES, train=(pictures.values(), [0, 0, 0, 1, 1])), validation_share=0.2)
    found = torch.cat([data.splits["train"].pixels, data.splits["validation"].pixels])
    shown = [grey, (grey > 128) * np.uint8(255), np.asarray(palette.convert("RGB")), np.array([[[1, 2, 3]]], np.uint8)]
    expected = {np.broadcast_to(np.atleast_3d(array), (4, 4, 3)).tobytes() for array in shown}
    assert found.shape == (5, 4, 4, 3) and {image.numpy().tobytes() for image in found} == expected
    greys = ([pictures["grey"], pictures["bit"], pictures["grey_alpha"]], [0, 1, 0])
    data = small(write(tmp_path / "grey", NAMES, train=greys, test=greys), validation_share=0)
    assert data.splits["test"].pixels.shape == (3, 4, 4, 1) and len(data.mean) == 1


def test_images_are_turned_upright(tmp_path: Path) -> None:
    picture, exif, file = Image.fromarray(pixels(1, 4, 4)[0]), Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    picture.save(file, "PNG", exif=exif)
    rows = ([file.getvalue(), picture], [0, 1])
    data = small(write(tmp_path, NAMES, train=rows, test=rows), validation_share=0)
    assert torch.equal(data.splits["test"].pixels[0], data.splits["test"].pixels[1].flip(0, 1))


def test_resizing(tmp_path: Path) -> None:
    pictures = [pixels(1, 7, 9, 3)[0], pixels(1, 12, 5, 3)[0]]
    data = small(
        write(tmp_path, NAMES, train=(pictures, [0, 1]), test=(pictures, [0, 1])), image_size=6, validation_share=0
    )
    expected = [np.asarray(Image.fromarray(p).resize((6, 6), Image.Resampling.BILINEAR)) for p in pictures]
    assert data.size == 6 and torch.equal(data.splits["test"].pixels, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_split_without_labels_is_left_out(tmp_path: Path, labels: list) -> None:
    rows = pixels(2, 4, 4)
    data = small(write(tmp_path, NAMES, train=(rows, [0, 1]), validation=(rows, [0, 1]), test=(rows, labels)))
    assert (
        sizes(data) == {"train": 2, "validation": 2} and "the test split has no labels and is not used" in data.notes
    )


def test_cifar(shared: Path) -> None:
    data = small(shared / "data" / "cifar100", max_train_samples=500, max_eval_samples=300)
    assert sizes(data) == {"train": 500, "validation": 300, "test": 300} and data.size == 32 and data.flip
    assert data.label_names[:2] == ["apple", "aquarium_fish"] and "'fine_label' holds the labels" in data.notes[0]
    for split, each in {"train": 5, "validation": 3, "test": 3}.items():
        assert torch.bincount(data.splits[split].labels).tolist() == [each] * 100
    assert data.mean == pytest.approx([0.5071, 0.4865, 0.4409], abs=0.02)
    found = read_images(str(shared / "data" / "cifar100"), label_column="coarse_label")
    stored, names = found.splits, found.label_names
    assert {split: len(images) for split, images in stored.items()} == {"train": 50_000, "test": 10_000}
    assert len(names) == 20


# Errors


def test_errors_of_names_and_folders(tmp_path: Path) -> None:
    message = error_of("nonsense")
    assert "digits" in message and "cifar100" in message and "owner/name" in message and "folder" in message
    assert "unknown dataset" in error_of(tmp_path / "missing")
    assert "train/CLASS/NAME.png" in error_of(tmp_path)
    picture = pixels(1, 4, 4)[0]
    draw(tmp_path / "a" / "train" / "1.png", picture)
    assert "1.png is in no class" in error_of(tmp_path / "a")
    draw(tmp_path / "b" / "cat" / "1.png", picture)  # no split folder
    assert "SPLIT/CLASS/" in error_of(tmp_path / "b")
    draw(tmp_path / "c" / "test" / "cat" / "1.png", picture)
    assert "no train split" in error_of(tmp_path / "c")
    draw(tmp_path / "d" / "train" / "cat" / "1.png", picture)
    draw(tmp_path / "d" / "test" / "dog" / "1.png", picture)
    assert "every label of train in column 'label' is 'cat'" in error_of(tmp_path / "d")
    draw(tmp_path / "d" / "train" / "emu" / "1.png", picture)
    assert "no label of test (dog) occurs in train (cat, emu)" in error_of(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.parquet").write_bytes(b"PAR1")
    assert "cannot read" in error_of(tmp_path / "e")


def test_errors_of_columns(tmp_path: Path) -> None:
    rows = (pixels(4, 4, 4), [0, 1, 2, 0])
    folder = write(tmp_path, NAMES, train=rows, test=rows)
    assert "no column 'picture': the columns are image, label" in error_of(folder, image_column="picture")
    assert "no column 'kind'" in error_of(folder, label_column="kind")
    assert "'label' holds no images" in error_of(folder, image_column="label")
    assert "'image' holds no labels" in error_of(folder, label_column="image")
    listed = pa.table({"image": [png(p) for p in rows[0]], "label": [[0], [1], [0], [1]]})
    (tmp_path / "listed").mkdir()
    pq.write_table(listed, tmp_path / "listed" / "train.parquet")
    message = error_of(tmp_path / "listed")
    assert "'label' holds several labels per image" in message and "pass another --label_column" in message
    pq.write_table(pa.table({"image": [png(p) for p in rows[0]]}), tmp_path / "validation.parquet")
    assert "the validation split lacks column 'label'" in error_of(folder)
    pq.write_table(pa.table({"label": rows[1]}), tmp_path / "train.parquet")
    assert "--image_column" in error_of(folder)


def test_errors_of_labels(tmp_path: Path) -> None:
    pictures = pixels(4, 4, 4)

    def message(name: str, train: list, test: list, names: list[str] | None = NAMES) -> str:
        return error_of(write(tmp_path / name, names, train=(pictures, train), test=(pictures, test)))

    assert "row 2 of train: label 3 in column 'label' is out of range" in message("a", [0, 1, 3, 0], [0, 1, 2, 0])
    assert "row 3 of train: '-2' in column 'label' is no class" in message("e", [0, 1, 2, -2], [0, 1, 2, 0], None)
    assert "no label of test (7) occurs in train (0, 1, 2)" in message("f", [0, 1, 2, 0], [7, 7, 7, 7], None)
    assert "the train split has no labels in column 'label'" in message("g", [None, -1, -1, None], [0, 1, 2, 0])
    assert "every label of train in column 'label' is 'ant'" in message("h", [1, 1, -1, 1], [1, 1, 1, 1])
    folder = write(tmp_path / "i", None, train=(pictures, [0, 1, 0, 1]), validation=(pictures, [-1] * 4))
    assert "the validation split has no labels" in error_of(folder)


def test_a_class_only_in_test_is_kept_and_noted(tmp_path: Path) -> None:
    pictures = pixels(4, 4, 4)
    for names in (NAMES, None):
        train, test = (pictures, [0, 1, 0, 1]), (pictures, [0, 2, 0, 1])
        data = small(write(tmp_path, names, train=train, test=test), validation_share=0.5)
        expected = names or ["0", "1", "2"]
        assert data.label_names == expected and data.splits["test"].labels.tolist() == [0, 2, 0, 1]
        note = f"labels of test that never occur in train, classes without training rows: {expected[2]} (1 row)"
        assert note in data.notes


def test_errors_of_images(tmp_path: Path) -> None:
    good = [png(picture) for picture in pixels(3, 8, 8)]
    sixteen = Image.fromarray(pixels(1, 8, 8)[0].astype(np.uint16) * 257)

    def message(name: str, picture: Any) -> str:
        folder = write(tmp_path / name, NAMES, train=([*good, picture], [0, 1, 0, 1]))
        found = error_of(folder, validation_share=0.5)
        assert found.startswith("image 3 of train ") and ("replace or remove" in found or "remove the row" in found)
        if name not in ("cut", "damaged"):  # the header of the file is intact
            assert error_of(folder, validation_share=0.5, image_size=72) == found
        return found

    assert "not an image" in message("garbage", b"garbage")
    assert "the file is empty" in message("empty", b"")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    assert "more than 178,956,970 pixels" in message("huge", (tmp_path / "huge.png").read_bytes())
    assert "truncated" in message("cut", good[0][:60])
    assert "cannot be read" in message("damaged", good[0][:45] + b"\0\0\0\0" + good[0][49:])
    assert "8 bits" in message("deep", sixteen)
    assert "is missing" in message("none", None)
    for label in "ab":
        draw(tmp_path / "gone" / "train" / label / "1.png", pixels(1, 8, 8)[0])
    (tmp_path / "gone" / "train" / "a" / "2.png").symlink_to("nowhere")
    assert "2.png cannot be read (No such file" in error_of(tmp_path / "gone", validation_share=0.5)


def test_errors_of_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square, wide = pixels(2, 8, 8), pixels(1, 8, 9)
    mixed = ([*square, *wide], [0, 1, 1])
    message = error_of(write(tmp_path / "a", NAMES, train=mixed, test=mixed), validation_share=0)
    assert "9x8 pixels" in message and "8x8" in message and "--image_size N" in message
    wides = ([*wide, *wide], [0, 1])
    message = error_of(write(tmp_path / "b", NAMES, train=wides, test=wides), validation_share=0)
    assert "must be square" in message and "--image_size N" in message
    rows = (square, [0, 1])
    folder = write(tmp_path / "c", NAMES, train=rows, validation=(pixels(2, 6, 6), [0, 1]))
    assert "different sizes ([6, 8] pixels): pass --image_size N" in error_of(folder)
    folder = write(tmp_path / "d", NAMES, train=rows, test=rows)
    monkeypatch.setattr(loading, "MEMORY", 4 * 64 - 1)
    assert "8x8 pixels would take 0.0 GiB in memory: pass --image_size N; above 64" in error_of(
        folder, validation_share=0
    )
    data = load_image_data(folder, image_size=8, validation_share=0)
    assert isinstance(data, LargeImageData) and "in memory the images would take" in data.notes[-1]
    assert isinstance(load_image_data(folder, image_size=7, validation_share=0), SmallImageData)


def test_errors_of_splits(tmp_path: Path) -> None:
    rows = (pixels(4, 4, 4), [0, 1, 2, 0])
    assert "pass a --validation_share above 0" in error_of(
        write(tmp_path / "a", NAMES, train=rows), validation_share=0
    )
    assert "too few training rows to set 10%" in error_of(write(tmp_path / "b", NAMES, train=rows, test=rows))
    assert "the validation split is empty" in error_of(
        write(tmp_path / "c", NAMES, train=rows, validation=(rows[0][:0], []))
    )
    assert "the test split is empty" in error_of(write(tmp_path / "d", NAMES, train=rows, test=(rows[0][:0], [])))


def test_max_eval_samples_limits_every_other_split() -> None:
    data = small("digits", max_eval_samples=50)
    assert {split: len(images) for split, images in data.splits.items() if split != "train"} == {
        split: 50 for split in data.splits if split != "train"
    }
