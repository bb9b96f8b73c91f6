"""Evaluation of a saved classifier on new data: labels are matched by name, and a single file is enough."""

import json
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from transformers import pipeline

from kd.nlp.data.loading import load_text_data
from kd.nlp.teacher_model.teacher import labels_of, tiny_bert
from kd_testing.scripts import run_script

WORDS = {"cold": "ice snow frost", "warm": "sun beach heat", "wet": "rain river sea"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights and labels that are not in alphabetical order."""
    folder = tmp_path_factory.mktemp("saved")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["wet", "cold", "warm"])}
    )
    rows = {
        "text": [f"{words} {i}" for i in range(4) for words in WORDS.values()],
        "label": ["cold", "warm", "wet"] * 4,
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    torch.manual_seed(1)
    made = tiny_bert(load_text_data(str(folder / "data")))
    dict(made.model.named_parameters())["classifier.weight"].data *= 30  # otherwise it predicts only one class
    made.model.save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def frame() -> pandas.DataFrame:
    texts = [f"{first} {second}" for first in " ".join(WORDS.values()).split() for second in ("ice", "sun", "sea")]
    return pandas.DataFrame({"text": texts, "label": [("cold", "warm", "Wet")[i % 3] for i in range(len(texts))]})


def accuracy(model: Path, rows: pandas.DataFrame) -> float:
    found = pipeline("text-classification", model=str(model), device="cpu")(rows["text"].tolist())
    right = [one["label"] == label.lower() for one, label in zip(found, rows["label"], strict=True)]
    return sum(right) / len(right)


def evaluate(model: Path, dataset: Path, result: Path) -> dict:
    run_script("NLP/scripts/evaluate.py", model, "--dataset", dataset, "--json", result)
    return json.loads(result.read_text())["metrics"]


def test_the_accuracy_equals_that_of_a_transformers_pipeline(saved: Path, tmp_path: Path) -> None:
    rows = frame()
    rows.to_csv(tmp_path / "new.csv")
    found = evaluate(saved, tmp_path / "new.csv", tmp_path / "metrics.json")
    assert list(found) == ["test"] and found["test"]["accuracy"] == pytest.approx(accuracy(saved, rows))
    assert 0 < found["test"]["accuracy"] < 1
    some = rows[rows["label"] != "warm"]  # fewer classes than the model has, so their alphabetical ids differ
    (tmp_path / "some").mkdir()
    some.to_csv(tmp_path / "some" / "test.csv", index=False)
    found = evaluate(saved, tmp_path / "some", tmp_path / "metrics.json")
    assert found["test"]["accuracy"] == pytest.approx(accuracy(saved, some))


def test_unknown_labels_are_an_error(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().assign(label=[i % 3 for i in range(27)]).to_csv(tmp_path / "numbers.csv")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script("NLP/scripts/evaluate.py", saved, "--dataset", tmp_path / "numbers.csv")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "label '0' (9 rows of test), which is not among wet, cold, warm" in error


def test_labels_of_a_saved_classifier(saved: Path) -> None:
    assert labels_of(str(saved)) == ("classification", ["wet", "cold", "warm"])
