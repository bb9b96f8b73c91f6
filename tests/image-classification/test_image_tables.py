"""Tables that list image files, and a teacher's outputs in their columns or next to images in folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from kd.common.utils.files import read_json
from kd.common.utils.tasks import IGNORED
from kd.image_classification.data.image_data import SmallImageData
from kd.image_classification.data.loading import load_image_data
from kd_testing.image_files import draw, error_of, pixels, sizes, small
from kd_testing.scripts import run_script

STUDENT = "image-classification/scripts/train_student.py"
QUICK: list[Any] = [
    "--student",
    "resnet8",
    "--max_steps",
    3,
    "--per_device_train_batch_size",
    8,
    "--report_to",
    "none",
]
PLAIN = [*QUICK, "--student", "resnet8"]
P = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]])  # of cat, sea_horse and Bed
NAMES = ["cat", "sea_horse", "Bed"]


def pictures(folder: Path, count: int) -> list[str]:
    """Draws images of 8 pixels into the folder `files`, and returns their paths, relative to `folder`."""
    for number, picture in enumerate(pixels(count, 8, 8, 3)):
        draw(folder / "files" / f"{number}.png", picture)
    return [f"files/{number}.png" for number in range(count)]


def table(folder: Path, count: int = 24, name: str = "train.csv", **columns: list) -> Path:
    """Writes a CSV file of images with the classes NAMES in turn, and columns with a value per row."""
    rows = {"file": pictures(folder, count), "label": [NAMES[i % 3] for i in range(count)], **columns}
    lines = [",".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
    (folder / name).write_text("\n".join([",".join(rows), *lines]))
    return folder / name


def test_a_table_of_windows_is_read_as_it_comes(tmp_path: Path) -> None:
    """Semicolons, a byte order mark, CRLF, an index column, decimal commas, backslashes, and labels in cp1252."""
    paths = [path.replace("/", "\\") for path in pictures(tmp_path, 24)]
    lines = [f"{i};{path};{('Käfer', 'Bär')[i % 2]};0,{i}" for i, path in enumerate(paths)]
    text = "\r\n".join([";Datei;Klasse;p", *lines])
    (tmp_path / "liste.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = small(tmp_path / "liste.csv", label_column="Klasse")
    assert data.label_names == ["Bär", "Käfer"] and sizes(data) == {"train": 22, "validation": 2}
    notes = "; ".join(data.notes)
    assert "semicolons" in notes and "decimal commas" in notes and "column 'Datei' holds the paths" in notes
    (tmp_path / "alt.csv").write_bytes(text.encode("cp1252"))
    old = small(tmp_path / "alt.csv", label_column="Klasse")
    assert old.label_names == data.label_names and "Windows-1252" in "; ".join(old.notes)
    assert old.fingerprint == data.fingerprint, "the same images and labels"


def test_a_table_gives_the_pixels_and_labels_of_its_files(tmp_path: Path) -> None:
    """Relative paths are those of the table or of a folder next to it; a folder holds a table per split."""
    table(tmp_path, 6, "train.csv")
    rows = [{"file": f"{i}.png", "label": NAMES[i % 3]} for i in range(6)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = small(tmp_path, validation_share=0)
    for images in data.splits.values():
        assert np.array_equal(images.pixels.numpy(), pixels(6, 8, 8, 3))
    assert "the paths of test are relative to files/" in data.notes
    assert data.label_names == ["Bed", "cat", "sea_horse"] and data.splits["train"].labels.tolist() == [1, 2, 0] * 2
    rows = [{"file": str(tmp_path / "files" / f"{i}.png"), "label": NAMES[i % 3]} for i in range(6)]
    (tmp_path / "absolute.json").write_text(json.dumps(rows))
    assert np.array_equal(
        small(tmp_path / "absolute.json", validation_share=0.5).splits["train"].pixels.shape[1:3], (8, 8)
    )
    (tmp_path / "train.csv").unlink()
    assert "no train split" in error_of(tmp_path)


def test_errors_name_the_files_that_are_missing_and_the_columns(tmp_path: Path) -> None:
    path = table(tmp_path, 6)
    text = path.read_text()
    path.write_text(text.replace("files/3.png", "files/x.png"))
    assert "1 row of 6 name no file, such as files/x.png" in error_of(path)
    path.write_text(text.replace("files/", "https://images.org/"))
    assert "is an address: download the image" in error_of(path)
    path.write_text(text.replace(".png", ""))
    assert "of local paths of images: pass --image_column; the columns are file, label" in error_of(path)
    several = [json.dumps({"file": "files/1.png", "label": ["cat", "Bed"]})] * 3
    (tmp_path / "several.jsonl").write_text("\n".join(several))
    assert "holds several labels per image" in error_of(tmp_path / "several.jsonl")
    path.write_text(text.replace("label", "species"))
    assert "no column of labels: pass --label_column" in error_of(path)
    draw(tmp_path / "train" / "1.png", pixels(1, 6, 6)[0])
    shutil.move(path, tmp_path / "labels.csv")
    assert f"pass --dataset {tmp_path}/labels.csv" in error_of(tmp_path)


def outputs(folder: Path, count: int, **words: Any) -> Path:
    """A table with a row of P for each image, by its class, in the columns p_*; a fifth has no label."""
    columns = {f"p_{name.replace('_', ' ')}": P[np.arange(count) % 3, i].tolist() for i, name in enumerate(NAMES)}
    path = table(folder, count, **columns, **words)
    lines = path.read_text().splitlines()
    lines[2::5] = [line.replace(line.split(",")[1], "", 1) for line in lines[2::5]]
    path.write_text("\n".join(lines))
    return path


def test_columns_of_a_table_are_logits_of_their_images(tmp_path: Path) -> None:
    """softmax(logits) are the probabilities of each image's row, also in the part of train that is validation."""
    data = load_image_data(str(outputs(tmp_path, 30)), keep_unlabelled=True, teacher_columns=["p_*"])
    assert isinstance(data, SmallImageData) and data.teacher is not None
    assert sizes(data) == {"train": 28, "validation": 2}
    assert "teacher: columns 'p_cat', 'p_sea horse', 'p_Bed' as probabilities" in data.notes
    for split in ("train", "validation"):
        images, logits = data.splits[split], data.teacher.logits[split]
        found = softmax(logits.astype(float), axis=1)
        for picture, label, row in zip(images.pixels, images.labels.tolist(), found, strict=True):
            place = next(i for i, other in enumerate(pixels(30, 8, 8, 3)) if np.array_equal(picture, other))
            assert row == pytest.approx(P[place % 3][[2, 0, 1]], abs=1e-6), "in the order Bed, cat, sea_horse"
            assert label in (IGNORED, (place + 1) % 3)
    plain = load_image_data(str(tmp_path / "train.csv"), keep_unlabelled=True)
    assert plain.teacher is None and plain.fingerprint != data.fingerprint


def test_top_k_in_metadata_of_images_in_folders(tmp_path: Path) -> None:
    """Two of three classes are named; the missing mass is that of the third. One image has no answer."""
    rows = []
    for number, picture in enumerate(pixels(12, 8, 8, 3)):
        name = f"{NAMES[number % 3]}/{number}.png"
        draw(tmp_path / "train" / name, picture)
        answer = [{"label": NAMES[number % 3], "score": 0.6}, {"label": NAMES[(number + 1) % 3], "score": 0.3}]
        rows.append({"file_name": name, "answer": answer if number else None, "label": "cat"})
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    data = load_image_data(str(tmp_path), validation_share=0, teacher_columns=["answer"])
    assert data.teacher is not None
    found = softmax(data.teacher.logits["train"].astype(float), axis=1)
    labels = data.splits["train"].labels.numpy()
    answered = ~np.isnan(found).any(axis=1)
    assert answered.sum() == 11 and (found[answered].argmax(1) == labels[answered]).all()
    assert np.sort(found[answered]) == pytest.approx(np.tile([0.1, 0.3, 0.6], (11, 1)), abs=1e-6)
    notes = "; ".join(data.notes)
    assert "top-k probabilities" in notes and "1 of 12 rows of train have no output" in notes
    assert "column 'label' of metadata.jsonl is not used, since folders name the classes" in notes


def test_a_placeholder_is_no_label(tmp_path: Path) -> None:
    path = table(tmp_path, 24)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([line.replace("cat", "unknown") if i % 2 else line for i, line in enumerate(lines)]))
    assert small(path).label_names == ["Bed", "cat", "sea_horse", "unknown"]
    data = small(path, unlabelled_label=["unknown"], keep_unlabelled=True)
    assert data.label_names == ["Bed", "cat", "sea_horse"] and (data.splits["train"].labels == IGNORED).sum() == 4
    assert "correct --unlabelled_label" in error_of(path, unlabelled_label=["unknown2"])


def test_metadata_name_the_classes_of_images_outside_of_class_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, picture in enumerate(pixels(6, 8, 8, 3)):
            draw(tmp_path / split / f"{number}.png", picture)
        lines = [f"{number}.png,{NAMES[number % 3]}" for number in range(5)] + ["absent.png,cat"]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    data = small(tmp_path, validation_share=0, keep_unlabelled=True)
    assert data.label_names == ["Bed", "cat", "sea_horse"]
    assert data.splits["train"].labels.tolist() == [1, 2, 0, 1, 2, IGNORED] and sizes(data)["test"] == 5
    notes = "; ".join(data.notes)
    assert "2 rows of metadata.csv name no image" in notes and "images that metadata.csv does not name: 2" in notes
    (tmp_path / "train" / "metadata.csv").write_text("title,label\na,cat\n")
    assert "has no column file_name" in error_of(tmp_path)


def test_other_tables_next_to_class_folders_are_noted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, picture in enumerate(pixels(6, 8, 8, 3)):
            draw(tmp_path / split / NAMES[number % 3] / f"{number}.png", picture)
    (tmp_path / "metadata.csv").write_text("title,year\nMy photos,2020\n")
    data = small(tmp_path, validation_share=0)
    assert sizes(data) == {"train": 6, "test": 6}
    assert any(note.startswith("metadata.csv is not used") and "no column file_name" in note for note in data.notes)


def test_a_student_learns_from_columns_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No teacher model is loaded; the report names the outputs and their metrics; `evaluate.py` repeats its own."""
    path, run = outputs(tmp_path / "data", 60), tmp_path / "run"
    run_script(
        STUDENT, "--dataset", path, "--teacher_columns", "p_*", "--student", "resnet8", *QUICK, "--output_dir", run
    )
    results = read_json(run / "results.json")
    assert results["models"]["teacher"] is None and results["models"]["control"] and results["models"]["student"]
    assert not (run / "stages" / "teacher").exists()
    assert (
        results["teacher_outputs"]["train"]["accuracy"] == 1 and results["teacher_outputs"]["validation"]["rows"] == 5
    )
    report = (run / "report.md").read_text()
    assert "of the teacher's 1.000" in report
    card = (run / "student" / "README.md").read_text()
    assert "distilled from the outputs of a teacher in the data (columns 'p_cat'" in card
    assert "Teacher outputs" in report and "as probabilities" in report
    assert "12 of 60 rows of train have no label" in report
    run_script("image-classification/scripts/evaluate.py", run, "--json", tmp_path / "metrics.json")
    found = read_json(tmp_path / "metrics.json")["metrics"]["validation"]["accuracy"]
    assert found == results["models"]["student"]["metrics"]["validation"]["accuracy"]


def test_flags_that_do_not_fit_columns_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = outputs(tmp_path, 30, answer=[NAMES[i % 3] for i in range(30)], numbers=["0 1 2"] * 30)
    for words, message in (
        ("--teacher_columns p_* --teacher resnet8", "--teacher has no effect"),
        ("--teacher_columns p_* --teacher_accuracy 0.9", "--teacher_accuracy has no effect"),
        ("--teacher_columns p_* --teacher_views views", "--teacher_views has no effect"),
        ("--teacher_columns p_* --methods kd,dist", "pass --method"),
        ("--teacher_columns p_* --method simkd", "needs a teacher's feature maps"),
        ("--teacher_columns p_* --method none", "leave out --teacher_columns"),
        ("--teacher_columns p_* --method fitnet", "needs features of a teacher, and --teacher_columns have none"),
        ("--teacher_columns p_* --method dkd", "--drop_unlabelled"),
        ("--teacher_columns answer --method dist", "pass --method kd"),
        ("--teacher_columns q_*", "no column 'q_*' for --teacher_columns"),
        ("--teacher_values logits", "--teacher_values has no effect"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_script(STUDENT, "--dataset", path, *words.split(), *QUICK, "--output_dir", tmp_path / "run")
        error = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and message in error, (words, error)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train_bottleneck", "train_simkd", "sweep", "distill_bottleneck", "train_teacher"])
def test_scripts_that_need_more_than_outputs_name_the_one_that_does_not(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(f"image-classification/scripts/{script}.py", "--teacher_columns", "p_*")
    assert exit.value.code == 2 and "only train_student.py distills from a teacher's" in capsys.readouterr().err
