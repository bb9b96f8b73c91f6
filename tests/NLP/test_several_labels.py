"""Multi-label classification of texts: layouts of the labels, a run from data to pipeline, and one-line errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import pipeline

from kd.common.utils.errors import UserError
from kd.nlp.data.columns import TASKS
from kd.nlp.data.loading import Texts, load_text_data, with_label_order
from kd.nlp.data.multilabel_intents import LABELS, load_multilabel_intents
from kd.nlp.student_model.evaluation import evaluate
from kd.nlp.teacher_model.teacher import load_trained
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script

SETS = [["joy"], ["joy", "anger"], [], ["fear"]] * 6
NAMES = ["anger", "fear", "joy"]
MARKS = [[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]] * 6
TEXTS = [f"text {i} about it" for i in range(24)]


def write(folder: Path, features: Features | None = None, **columns: list[Any]) -> str:
    for split in ("train", "validation"):
        Dataset.from_dict({"text": TEXTS, **columns}, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def ids(rows: list[list[str]], names: list[str]) -> list[list[int]]:
    return [[names.index(name) for name in row] for row in rows]


def of_names(folder: Path) -> tuple[str, dict[str, Any]]:
    return write(folder, labels=SETS), {}


def of_ids(folder: Path) -> tuple[str, dict[str, Any]]:
    kinds = Features({"text": Value("string"), "labels": List(ClassLabel(names=NAMES))})
    return write(folder, kinds, labels=ids(SETS, NAMES)), {}


def of_marks(folder: Path) -> tuple[str, dict[str, Any]]:
    return write(folder, labels=MARKS), {}


def of_strings(folder: Path) -> tuple[str, dict[str, Any]]:
    return write(folder, emotions=["; ".join(row) for row in SETS]), {
        "label_column": "emotions",
        "label_separator": ";",
    }


def of_columns(folder: Path) -> tuple[str, dict[str, Any]]:
    columns = {name: [row[i] for row in MARKS] for i, name in enumerate(NAMES)}
    return write(folder, **columns), {"label_column": NAMES}


def of_inferred_columns(folder: Path) -> tuple[str, dict[str, Any]]:
    return of_columns(folder)[0], {"task": "multi_label"}


@pytest.mark.parametrize("layout", [of_names, of_ids, of_marks, of_strings, of_columns, of_inferred_columns])
def test_every_layout_has_the_same_labels(tmp_path: Path, layout: Any) -> None:
    folder, keywords = layout(tmp_path)
    data = load_text_data(folder, **keywords)
    assert data.task == "multi_label" and data.primary_metric == "f1_micro"
    assert data.label_names == (["0", "1", "2"] if layout is of_marks else NAMES)
    assert data.splits["train"]["label"][:] == MARKS
    assert any(note.startswith("labels: any of 3 per row (") for note in data.notes)
    assert "6 of 24 rows of train have none of the labels" in data.notes


def test_the_layout_of_go_emotions(tmp_path: Path) -> None:
    """The columns of its config `simplified`: text, labels, id. Its 28 labels are in the order of the Hub."""
    names = [f"emotion {i}" for i in range(28)]
    kinds = Features({"text": Value("string"), "labels": List(ClassLabel(names=names)), "id": Value("string")})
    rows: dict[str, list] = {"labels": [[i, (i + 1) % 28] for i in range(24)], "id": [f"ee{i}" for i in range(24)]}
    data = load_text_data(write(tmp_path, kinds, **rows))
    assert data.task == "multi_label" and data.label_names == names
    assert np.asarray(data.splits["train"]["label"]).sum(axis=1).tolist() == [2] * 24
    assert TASKS["go_emotions"].task == "multi_label"


def test_rows_without_a_list_are_unlabelled(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path, labels=[None, *SETS[1:]]), drop_unlabelled=True)
    assert len(data.splits["train"]) == 23
    kept = np.asarray(load_text_data(str(tmp_path)).splits["train"]["label"])
    assert np.isnan(kept[0]).all() and kept[1:].tolist() == MARKS[1:]


def test_labels_follow_the_order_of_a_model(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path, labels=SETS))
    ordered = with_label_order(data, ["Joy", "surprise", "Anger", "Fear"])
    assert ordered.splits["train"]["label"][:] == [[joy, 0, anger, fear] for anger, fear, joy in MARKS]
    with pytest.raises(UserError, match=r"label 'anger' \(6 rows of train\)"):
        with_label_order(data, ["joy", "fear"])


@pytest.mark.parametrize(
    ("columns", "keywords", "message"),
    [
        ({"labels": SETS}, {"label_separator": ","}, "holds lists: leave out --label_separator"),
        ({"label": ["a", "b"] * 12}, {"task": "multi_label", "label_column": "label"}, "one label per text: name sev"),
        ({"label": ["a", "b"] * 12}, {"label_separator": ","}, "',' does not occur in column 'label'"),
        ({"labels": SETS}, {"task": "classification"}, "the task is classification, but column 'labels' holds lists"),
        ({"a": [0, 1] * 12, "b": [0, 2] * 12}, {"label_column": ["a", "b"]}, "2 in the label column 'b' is neither 0"),
        ({"a": [0, 1] * 12}, {"label_column": ["a", "c"]}, "no column 'c'"),
        ({"labels": [[]] * 24}, {}, "column 'labels' holds no labels"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, columns: Any, keywords: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_text_data(write(tmp_path, **columns), **keywords)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_embedded_requests_are_the_same_in_every_process() -> None:
    rows = load_multilabel_intents()
    assert rows["train"][0] == load_multilabel_intents()["train"][0]
    sizes = [len(labels) for labels in rows["validation"]["intents"]]
    assert set(sizes) == {0, 1, 2, 3} and len(LABELS) == 20
    occurring = {label for labels in rows["train"]["intents"] for label in labels}
    assert len(occurring) == len(LABELS) and not {*rows["train"]["text"]} >= {*rows["test"]["text"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few of the embedded requests."""
    folder, splits = tmp_path_factory.mktemp("multi"), load_multilabel_intents()
    for split, size in (("train", 160), ("validation", 40), ("test", 40)):
        splits[split].select(range(size)).to_parquet(folder / "data" / f"{split}.parquet")
    words = ["--dataset", folder / "data", "--align_epochs", 0, "--from_scratch_epochs", 1, "--num_train_epochs", 1]
    run_script("NLP/scripts/distill_classifier.py", *words, "--report_to", "none", "--output_dir", folder / "run")
    return folder


def test_a_run_reports_the_metrics_of_several_labels(run: Path) -> None:
    results = json.loads((run / "run" / "results.json").read_text())
    metrics = results["models"]["student"]["metrics"]["test"]
    names = {"f1_micro", "f1_macro", "map", "exact_match", "nll", "ece", "label_threshold", "f1_micro_threshold"}
    assert names < metrics.keys() and "agreement" in metrics
    assert results["primary_metric"]["name"] == "f1_micro" and results["verdict"]["control"]["interval"]
    assert "any of 20 per row" in results["data_notes"] and 0 < results["chance"] < 1


def test_the_student_loads_in_a_pipeline_and_in_the_project(run: Path) -> None:
    """The pipeline applies the sigmoid without an argument, because the config names the type of task."""
    data = load_text_data(str(run / "data"), known_labels=LABELS)
    student = load_trained(str(run / "run" / "student"), data)
    entry, logits = evaluate("student", student.model, Texts.of(data, student.tokenizer))
    stored = json.loads((run / "run" / "results.json").read_text())["models"]["student"]["metrics"]["test"]
    found = entry["metrics"]["test"]
    assert found["map"] == pytest.approx(stored["map"]) and found["nll"] == pytest.approx(stored["nll"])
    classify: Any = pipeline("text-classification", model=str(run / "run" / "student"), top_k=None)
    scores = {one["label"]: one["score"] for one in classify([data.splits["test"][0]["text"]])[0]}
    expected = 1 / (1 + np.exp(-logits["test"][0]))
    assert [scores[name] for name in LABELS] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_export(run: Path, capsys: pytest.CaptureFixture) -> None:
    """The code in README.md prints the labels from a probability of 0.5 on."""
    run_script("common/export/__main__.py", run / "run", "--format", "onnx", "--output_dir", run / "export")
    capsys.readouterr()
    found = run_readme(run / "export", "torch", "transformers")
    expected = [name for name, logit in zip(LABELS, found["logits"][0], strict=True) if logit >= 0]
    assert capsys.readouterr().out.strip() == str(expected)
    words = run / "run" / "student", "--dataset", run / "data", "--output_dir", run / "int8"
    run_script("NLP/scripts/export.py", *words)
    assert json.loads((run / "int8" / "export.json").read_text())["models"]["torch-int8"]["metrics"]["test"]["map"] > 0


def test_other_methods_and_models_are_rejected(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for script, words, message in (
        ("distill_classifier", ["--method", "dkd"], "--method dkd is for one label per text"),
        ("distill_bottleneck", [], "a bottleneck predicts one label per text"),
    ):
        with pytest.raises(SystemExit):
            run_script(f"NLP/scripts/{script}.py", "--dataset", run / "data", *words, "--output_dir", tmp_path / "r")
        assert message in capsys.readouterr().err
    single = load_text_data(write(tmp_path / "single", label=["set_alarm", "oven_on"] * 12))
    with pytest.raises(UserError, match="assigns several labels to a text"):
        load_trained(str(run / "run" / "student"), single)
