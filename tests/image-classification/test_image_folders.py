"""Image folders and columns: every image is found, labels are matched by name, and unused files are reported."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kd.common.data.sources import holdout
from kd.common.utils.tasks import IGNORED
from kd.image_classification.data import loading
from kd.image_classification.data.loading import load_image_data
from kd_testing.image_files import NAMES, draw, error_of, large, photos_in, pixels, png, sizes, small, write
from kd_testing.scripts import run_script


def classes_in(folder: Path, **counts: int) -> Path:
    """Writes `counts` images of 6 pixels to each class folder."""
    for seed, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pixels(count, 6, 6, 3, seed=seed)):
            draw(folder / name / f"{number}.png", picture)
    return folder


def columns_in(folder: Path, labels: Any, test: Any = None, **more: list) -> Path:
    """Writes parquet files without metadata, with one image per label that depends only on the row."""
    folder.mkdir(parents=True)
    for split, of_split in (("train", labels), ("test", test)):
        if of_split is not None:
            pictures = [png(picture) for picture in pixels(len(of_split), 6, 6)]
            pq.write_table(pa.table({"image": pictures, "label": of_split} | more), folder / f"{split}.parquet")
    return folder


# Which files are images


def test_images_of_every_format_are_found(tmp_path: Path) -> None:
    """All files are found, with the pixels that Pillow decodes; lossless formats equal the source."""
    formats = ["PNG", "BMP", "TIFF", "GIF", "PPM", "TGA", "JPEG", "WEBP", "PCX", "ICO", "JPEG2000"]
    suffixes = ["png", "BMP", "tif", "gif", "ppm", "tga", "JPG", "webp", "pcx", "ico", "jp2"]
    written = {}
    for label, source in zip("ab", pixels(2, 16, 16, 3), strict=True):
        for number, (kind, suffix) in enumerate(zip(formats, suffixes, strict=True)):
            path = tmp_path / "train" / label / f"{number:02}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source).save(path, kind)
            written[str(path)] = source
        Image.fromarray(source).save(tmp_path / "train" / label / "zz", "PNG")
        written[str(tmp_path / "train" / label / "zz")] = source
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    data = small(tmp_path, validation_share=0)
    assert sizes(data) == {"train": 24, "test": 24} and data.notes == ["labels: 2 classes (a, b)"]
    for pixels_found, (name, source) in zip(data.splits["train"].pixels, sorted(written.items()), strict=True):
        expected = np.asarray(Image.open(name).convert("RGB"))
        assert np.array_equal(pixels_found, expected), name
        if Path(name).suffix in (".png", ".BMP", ".tif", ".ppm", ".tga", ".pcx", ""):
            assert np.array_equal(pixels_found, source), name


def test_files_that_are_not_images_are_counted_and_named(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", cat=4, dog=4)
    classes_in(tmp_path / "test", cat=1, dog=1)
    clean = small(tmp_path, validation_share=0)
    (tmp_path / "README.md").write_text("P5 is how a picture may begin")
    (tmp_path / "train" / "cat" / "labels.txt").write_text("cat")
    (tmp_path / "train" / "cat" / "film.mpg").write_bytes(b"\0\0\1\xb3" + bytes(100))
    (tmp_path / "train" / "cat" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for hidden in (".DS_Store", "Thumbs.db", "._1.png"):
        (tmp_path / "train" / "dog" / hidden).write_bytes(b"\0\0")
    draw(tmp_path / "train" / "dog" / ".thumbnails" / "1.png", pixels(1, 6, 6)[0])
    draw(tmp_path / "holiday.png", pixels(1, 6, 6)[0])
    data = small(tmp_path, validation_share=0)
    assert data.fingerprint == clean.fingerprint and clean.notes == ["labels: 2 classes (cat, dog)"]
    assert data.notes == [
        "images in no split, not used: 1 (holiday.png)",
        "files that are not images, left out: 4 (README.md, train/cat/film.mpg, train/cat/labels.txt, "
        "train/cat/phone.heic)",
        "hidden files, left out: 4",
        *clean.notes,
    ]


def test_links_to_folders_are_followed_and_cycles_end(tmp_path: Path) -> None:
    classes_in(tmp_path / "data" / "train", dog=3)
    classes_in(tmp_path / "elsewhere", cat=3)
    (tmp_path / "data" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "train" / "dog" / "again").symlink_to(tmp_path / "data")
    data = small(tmp_path / "data", validation_share=0.34)
    assert sizes(data) == {"train": 4, "validation": 2} and data.label_names == ["cat", "dog"]


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", cat=9, dog=9)
    classes_in(tmp_path / "test", cat=2, dog=0)
    assert small(tmp_path).notes[-1] == "classes without an image in test: 1 of 2 (dog)"
    classes_in(tmp_path / "train", emu=0)
    (tmp_path / "train" / "emu" / "1.heic").write_bytes(b"")
    message = error_of(tmp_path)
    assert f"class {tmp_path}/train/emu has no images but files of other kinds (emu/1.heic): add images" in message
    shutil.rmtree(tmp_path / "train" / "emu")
    (tmp_path / "val").mkdir()
    assert f"{tmp_path}/val holds no images: add images or remove the folder" in error_of(tmp_path)


def test_images_outside_of_classes_have_no_label(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", cat=9, dog=9)
    draw(tmp_path / "test" / "1.png", pixels(1, 6, 6, 3)[0])
    data = small(tmp_path)
    assert sizes(data) == {"train": 16, "validation": 2} and "test split has no labels" in data.notes[1]
    draw(tmp_path / "train" / "1.png", pixels(1, 6, 6, 3)[0])
    again = small(tmp_path)
    assert (
        again.fingerprint == data.fingerprint and "1 of 19 rows of train have no label and are left out" in again.notes
    )
    draw(tmp_path / "train" / "cat" / "small" / "1.png", pixels(1, 6, 6, 3)[0])
    assert "images deeper than their class" in small(tmp_path).notes[0]


def test_errors_explain_folders_that_are_not_datasets(tmp_path: Path) -> None:
    classes_in(tmp_path / "classes", cat=2, dog=2)
    assert "no train split, only cat, dog: put images into SPLIT/CLASS/" in error_of(tmp_path / "classes")
    classes_in(tmp_path / "deep" / "inner" / "train", cat=2, dog=2)
    assert f"pass --dataset {tmp_path}/deep/inner" in error_of(tmp_path / "deep")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    write(tmp_path / "hub" / "data", NAMES, train=(pixels(3, 4, 4), [0, 1, 2]))
    assert f"pass --dataset {tmp_path}/hub/data" in error_of(tmp_path / "hub")
    draw(tmp_path / "listed" / "train" / "1.png", pixels(1, 6, 6)[0])
    (tmp_path / "listed" / "train.csv").write_text("file,label\n2.png,cat\n")
    assert "column 'file' of train: 1 row of 1 name no file, such as 2.png" in error_of(tmp_path / "listed")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "classes")
    assert f"{archive} is a file: unpack it" in error_of(archive)
    assert "File name too long" in error_of("x" * 5000)


# Labels


@pytest.mark.parametrize(
    "labels, names, ids",
    [
        ([200002, 200001] * 3, ["200001", "200002"], [1, 0]),
        ([2**64 - 1, 2**63] * 3, [str(2**63), str(2**64 - 1)], [1, 0]),
        ([10, 2] * 3, ["2", "10"], [1, 0]),
        (["10", "2"] * 3, ["2", "10"], [1, 0]),
        (["dog", "cat"] * 3, ["cat", "dog"], [1, 0]),
        (pa.array(["dog", "cat"] * 3).dictionary_encode(), ["cat", "dog"], [1, 0]),
        ([1, 0] * 3, ["0", "1"], [1, 0]),
        ([1.0, 0.0] * 3, ["0", "1"], [1, 0]),
        ([True, False] * 3, ["False", "True"], [1, 0]),
    ],
)
def test_labels_of_every_kind_become_classes(tmp_path: Path, labels: Any, names: list[str], ids: list[int]) -> None:
    values = pa.array(labels, pa.uint64()) if names[0] == str(2**63) else labels
    data = small(columns_in(tmp_path / "data", values, values), validation_share=0)
    assert data.label_names == names and data.splits["train"].labels.tolist() == ids * 3
    assert data.splits["test"].labels.tolist() == ids * 3
    assert data.notes == [f"labels: 2 classes ({', '.join(names)})"]


def test_numbered_class_folders_are_sorted_by_number_in_every_split(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", **{"10": 2, "2": 2, "1": 2})
    classes_in(tmp_path / "validation", **{"10": 1, "2": 1})
    data = small(tmp_path)
    assert data.label_names == ["1", "2", "10"] and data.splits["validation"].labels.tolist() == [2, 1]
    assert data.notes[1:] == ["classes without an image in validation: 1 of 3 (1)"]


@pytest.mark.parametrize("missing", [None, -1, float("nan"), ""])
def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path, missing: Any) -> None:
    kind = str if missing == "" else float if missing != missing else int
    labels = [kind(value) for value in (0, 1, 0, 1)]
    data = small(columns_in(tmp_path / "data", [*labels, missing], labels), validation_share=0)
    assert sizes(data) == {"train": 4, "test": 4} and data.label_names == ["0", "1"]
    assert data.notes[-1] == "1 of 5 rows of train have no label and are left out"
    assert torch.equal(data.splits["train"].pixels, torch.from_numpy(pixels(5, 6, 6))[:4, ..., None])


def test_a_choice_among_columns_is_noted(tmp_path: Path) -> None:
    folder = columns_in(tmp_path / "data", [0, 1] * 9, target=[1, 0] * 9)
    assert small(folder).notes[0] == "column 'label' holds the labels; --label_column names another of label, target"
    assert len(small(folder, label_column="target").notes) == 2


# Splits


def test_train_keeps_an_image_of_each_class(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", cat=12, dog=12, emu=1)
    for share, left in ((0.1, {12 + 12 - 2, 12 + 12 - 3}), (0.999, {2})):
        data = small(tmp_path, validation_share=share)
        assert set(data.splits["train"].labels.tolist()) == {0, 1, 2} and len(data.splits["train"]) - 1 in left
        assert f"stratified {share * 100:.4g}%" in data.notes[1]
        assert data.notes[2] == "classes without an image in validation: 1 of 3 (emu)"


def test_keeping_an_image_of_each_class_does_not_change_large_classes() -> None:
    data = load_image_data("digits")
    assert sizes(data) == {"train": 1294, "validation": 144, "test": 359}, "the split must not change"
    labels = np.arange(40) % 2
    part = holdout(labels, 0.25)
    assert np.bincount(labels[~part]).tolist() == [15, 15] and np.bincount(labels[part]).tolist() == [5, 5]


# Data for evaluation


def test_evaluation_uses_the_class_names_of_the_model(tmp_path: Path) -> None:
    names = ["dog", "Emu", "cat"]
    classes_in(tmp_path / "classes", cat=2, emu=1)
    data = small(tmp_path / "classes", label_names=names, image_size=6)
    assert sizes(data) == {"test": 3} and data.label_names == names
    assert data.splits["test"].labels.tolist() == [2, 2, 1]
    assert data.notes == [
        "classes has classes but no splits: all of its images are the test split",
        "labels: 2 classes (cat, emu)",
        "classes without an image in test: 1 of 3 (dog)",
    ]
    classes_in(tmp_path / "only_test" / "test", cat=1, dog=1)
    data = small(tmp_path / "only_test", label_names=names, image_size=5)
    assert sizes(data) == {"test": 2} and data.splits["test"].labels.tolist() == [2, 0]
    assert data.size == 5 and "images are resized to the 5 pixels of the model" in data.notes
    parquet = write(tmp_path / "parquet", ["cat", "dog"], validation=(pixels(2, 6, 6), [0, 1]))
    assert small(parquet, label_names=names).splits["validation"].labels.tolist() == [2, 0]
    message = error_of(parquet, label_names=["dog", "emu"])
    assert "has the label 'cat' (1 row of validation), which is not among dog, emu" in message
    draw(tmp_path / "flat" / "1.png", pixels(1, 6, 6)[0])
    assert "is in no class" in error_of(tmp_path / "flat", label_names=names)


def test_evaluation_uses_the_same_validation_split_as_training(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", cat=20, dog=20)
    trained = small(tmp_path)
    evaluated = small(tmp_path, label_names=["dog", "cat"])
    assert torch.equal(evaluated.splits["validation"].pixels, trained.splits["validation"].pixels)
    assert torch.equal(evaluated.splits["validation"].labels, 1 - trained.splits["validation"].labels)


# Fingerprints


@pytest.mark.parametrize("read_at_once", [2**30, 0])
def test_the_fingerprint_of_large_images_depends_on_files_order_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_at_once: int
) -> None:
    """It includes all file sizes, so it changes even if only some files are read."""
    monkeypatch.setattr(loading, "READ_AT_ONCE", read_at_once)
    monkeypatch.setattr(loading, "HASHED", 2)
    folder = Path(photos_in(tmp_path / "photos"))
    before = large(folder).fingerprint
    assert large(folder).fingerprint == before
    one, other = (folder / "train" / "a" / f"{number:02}.png" for number in (2, 4))
    assert one.stat().st_size != other.stat().st_size
    found = {before}
    for source, target in ((one, "x"), (other, one), (folder / "train" / "a" / "x", other)):
        source.rename(folder / "train" / "a" / target)  # the same files in another order
    found.add(large(folder).fingerprint)
    other.unlink()
    found.add(large(folder).fingerprint)
    (folder / "train" / "a" / "00.png").rename(folder / "train" / "b" / "00.png")
    found.add(large(folder).fingerprint)
    (folder / "train" / "b").rename(folder / "train" / "c")
    (folder / "test" / "b").rename(folder / "test" / "c")
    found.add(large(folder).fingerprint)
    assert len(found) == 5


def test_a_changed_pixel_of_equal_size_changes_the_fingerprint_of_large_images(tmp_path: Path) -> None:
    folder = Path(photos_in(tmp_path / "photos"))
    before, path = large(folder).fingerprint, folder / "train" / "a" / "04.png"
    for path in (folder / "train" / "a").iterdir():
        file = io.BytesIO()
        Image.open(path).save(file, "BMP")
        path.write_bytes(file.getvalue())
    as_bmp = large(folder).fingerprint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert len({before, as_bmp, large(folder).fingerprint}) == 3


def test_a_file_that_is_not_an_image_is_found_before_training(tmp_path: Path) -> None:
    folder = Path(photos_in(tmp_path / "photos"))
    (folder / "train" / "a" / "08.png").write_bytes(b"")
    assert error_of(folder, image_size=72) == (
        f"{folder}/train/a/08.png cannot be read (the file is empty): replace or remove it"
    )


# Images without a label


@pytest.mark.parametrize("name", ["unlabeled", "unlabelled"])
def test_a_folder_of_unlabelled_images_joins_train(tmp_path: Path, name: str) -> None:
    classes_in(tmp_path / "train", cat=4, dog=4)
    classes_in(tmp_path / "test", cat=1, dog=1)
    classes_in(tmp_path, **{name: 3})
    classes_in(tmp_path / name, cat=1)  # a folder there is no class
    data = small(tmp_path, validation_share=0, keep_unlabelled=True)
    assert sizes(data) == {"train": 12, "test": 2} and data.label_names == ["cat", "dog"]
    assert data.splits["train"].labels.tolist() == [0] * 4 + [1] * 4 + [IGNORED] * 4
    assert "4 of 12 rows of train have no label: they train the student by the teacher's outputs alone" in data.notes
    on_labels = data.labelled_train().splits
    assert on_labels["train"].labels.tolist() == [0] * 4 + [1] * 4 and len(on_labels["test"]) == 2
    left_out = small(tmp_path, validation_share=0)
    assert sizes(left_out) == {"train": 8, "test": 2} and f"split {name} is not used" in left_out.notes


def test_validation_images_have_labels(tmp_path: Path) -> None:
    data = small(columns_in(tmp_path / "d", [0, 1, -1, -1] * 20), keep_unlabelled=True)
    assert sizes(data) == {"train": 76, "validation": 4}
    assert sorted(data.splits["validation"].labels.tolist()) == [0, 0, 1, 1]
    assert (data.splits["train"].labels == IGNORED).sum() == 40


def test_unlabelled_images_train_the_student_alone(tmp_path: Path) -> None:
    classes_in(tmp_path / "data" / "train", cat=16, dog=16)
    classes_in(tmp_path / "data" / "validation", cat=6, dog=6)
    classes_in(tmp_path / "data", unlabeled=32)
    words = ["--dataset", tmp_path / "data", "--image_size", 8, "--teacher", "resnet8", "--student", "resnet8"]
    words += [
        "--num_train_epochs",
        1,
        "--teacher_epochs",
        1,
        "--per_device_train_batch_size",
        16,
        "--report_to",
        "none",
        "--method",
    ]
    script = "image-classification/scripts/train_student.py"
    run_script(script, *words, "kd", "--output_dir", tmp_path / "run")
    logs = {
        path.parent.name: json.loads(path.read_text())["history"][-1]["step"]
        for path in (tmp_path / "run" / "stages").glob("*/stage.json")
    }
    assert logs == {"teacher": 4, "control": 4, "student": 4}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["train"] == 64 and "32 of 64 rows of train have no label" in results["data_notes"]
    for method in ("dkd", "crd"):
        with pytest.raises(SystemExit):
            run_script(script, *words, method, "--output_dir", tmp_path / "needy")
    assert not (tmp_path / "needy").exists()
