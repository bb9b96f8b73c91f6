"""Model cards of text students, and the predictions of regression models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer

from kd.nlp.data.loading import KNOWN, Texts, load_text_data
from kd.nlp.student_model.cards import card_of, usage_of
from kd.nlp.student_model.evaluation import prediction_columns
from kd_testing.readmes import run_readme, run_readme_alone

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 6,
}
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "some": 4, "text": 5}


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_code_of_a_plain_student_runs_without_this_project(
    alone: bool, regression: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: dict[str, Any] = {"num_labels": 1} if regression else {"id2label": {0: "cold", 1: "warm"}}
    student = BertForSequenceClassification(BertConfig(**SMALL, **labels))
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    BertTokenizer(vocab=VOCABULARY).save_pretrained(folder)
    usage = usage_of(student, pairs=regression, task="regression" if regression else "classification")
    (folder / "README.md").write_text(f"```python\n{usage}\n```\n")
    texts = ("some text", "another text") if regression else ("some text",)
    logits = student.eval()(**AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")).logits
    if not alone:
        torch.testing.assert_close(run_readme(folder)["logits"], logits)
    printed = run_readme_alone(folder) if alone else capsys.readouterr().out.strip()
    assert float(printed) == pytest.approx(logits.item()) if regression else printed in ("cold", "warm")


def test_a_card_names_the_models_and_the_data_of_the_hub(tmp_path: Path) -> None:
    def card(**arguments: Any) -> Any:
        arguments = {"student": None, "teacher": "tiny-bert", "dataset": "intents"} | arguments
        return card_of(SimpleNamespace(argument=arguments.get), "code", "text-classification", KNOWN)  # type: ignore[arg-type]

    assert (card().origins, card().dataset, card().library_name) == ([], None, "transformers")
    named = card(student="distilbert-base-uncased", teacher="owner/bert", ensemble_teachers=["x/y"], dataset="sst2")
    assert named.origins == ["distilbert-base-uncased", "owner/bert", "x/y"]
    assert named.dataset == "nyu-mll/glue:sst2"
    assert card(teacher="scratch", student="cut", dataset=str(tmp_path)).origins == []


def test_predictions_of_a_regression_are_values(tmp_path: Path) -> None:
    rows = pandas.DataFrame({"text": ["one", "two", "three"], "label": [0.5, 1.5, 2.5]})
    rows.to_csv(tmp_path / "test.csv", index=False)
    data = load_text_data(str(tmp_path / "test.csv"), needs_train=False)
    texts = Texts.of(data, BertTokenizer(vocab=VOCABULARY))
    found = prediction_columns(texts, {"test": np.array([[0.25], [1.0], [3.0]])})
    assert found == {"test": {"row": [0, 1, 2], "label": [0.5, 1.5, 2.5], "prediction": [0.25, 1.0, 3.0]}}


def test_rows_of_a_validation_split_that_was_set_aside_are_those_of_train(tmp_path: Path) -> None:
    texts = [f"text {i} {i % 7}" for i in range(60)]
    labels = [None if i % 10 == 3 else "ab"[i % 2] for i in range(60)]
    pandas.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / "train.csv", index=False)
    data = load_text_data(str(tmp_path), max_train_samples=20, drop_unlabelled=True)
    assert len(data.splits["train"]) == 20 and len(data.splits["validation"]) == 5
    for split in ("train", "validation"):
        rows = data.splits[split]
        assert [texts[row] for row in rows["row"]] == rows["text"][:]
        assert all(labels[row] is not None for row in rows["row"])
