"""The labels of classifiers and data: other spellings, another order, more labels, and classifiers without names."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn

from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.teacher_model.teacher import in_label_order, load_classifier, tiny_bert
from kd_testing.scripts import run_script

LABELS = ["card_declined", "pay bill", "transfer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bank")
    rows = {"text": [f"text number {i}" for i in range(12)], "label": LABELS * 4}
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_csv(path / f"{split}.csv")
    return str(path)


def saved(folder: Path, data: TextData, labels: list[str]) -> str:
    """An untrained classifier with these labels, which load as trained ones do."""
    loaded = tiny_bert(data)
    config: Any = loaded.model.config
    loaded.model.classifier = nn.Linear(config.hidden_size, len(labels))
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def test_other_spellings_are_the_same_labels(folder: str, tmp_path: Path) -> None:
    data = load_text_data(folder)
    model = saved(tmp_path / "m", data, ["Card Declined", "PAY-BILL", "Transfer"])
    assert in_label_order(model, data) is data and load_classifier(model, data).trained


def test_class_ids_follow_the_order_of_the_model(folder: str, tmp_path: Path) -> None:
    data = load_text_data(folder)
    model = saved(tmp_path / "m", data, ["TRANSFER", "pay_bill", "card declined"])
    ordered = in_label_order(model, data)
    assert ordered.splits["train"]["label"][:3] == [2, 1, 0] and load_classifier(model, ordered).trained
    assert ordered.notes[-1] == f"class ids follow {model}: TRANSFER, pay_bill, card declined"


def test_the_model_may_have_more_labels_than_the_data(folder: str, tmp_path: Path) -> None:
    data = load_text_data(folder)
    model = saved(tmp_path / "m", data, ["transfer", "oos", "pay bill", "card declined"])
    wider = in_label_order(model, data)
    assert wider.num_labels == 4 and wider.splits["train"]["label"][:3] == [3, 2, 0]
    assert wider.notes[-1].endswith("1 of its classes have no rows") and load_classifier(model, wider).trained
    with pytest.raises(UserError, match="classifies 4 labels"):
        load_classifier(model, data)


def test_labels_without_names_need_a_flag(folder: str, tmp_path: Path) -> None:
    data = load_text_data(folder)
    model = saved(tmp_path / "m", data, ["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(UserError, match="--label_names, or --trust_label_order"):
        load_classifier(model, data)
    trusted = load_text_data(folder, trust_label_order=True)
    assert load_classifier(model, in_label_order(model, trusted)).trained
    named = in_label_order(model, load_text_data(folder, label_names=["transfer", "card_declined", "pay bill"]))
    assert named.splits["train"]["label"][:3] == [1, 2, 0] and load_classifier(model, named).trained
    with pytest.raises(UserError, match="has 3 labels, and --label_names"):
        in_label_order(model, load_text_data(folder, label_names=["transfer", "pay bill"]))
    with pytest.raises(UserError, match="classifies 3 labels"):
        load_classifier(model, load_text_data(folder, label_names=["transfer", "pay bill", "other"]))


def test_evaluation_with_named_labels(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_text_data(folder)
    order = ["transfer", "card_declined", "pay bill"]
    found = {}
    for name, labels, flags in (("a", order, []), ("b", ["LABEL_0", "LABEL_1", "LABEL_2"], ["--label_names", *order])):
        model = saved(tmp_path / name, data, labels)
        if name == "b":
            weights = tmp_path / "a" / "model.safetensors"
            (tmp_path / "b" / "model.safetensors").write_bytes(weights.read_bytes())
        file = tmp_path / f"{name}.json"
        run_script("NLP/scripts/evaluate.py", model, "--dataset", folder, "--json", file, *flags)
        found[name] = json.loads(file.read_text())["metrics"]
    assert found["a"] == found["b"]
    with pytest.raises(SystemExit):
        run_script("NLP/scripts/evaluate.py", tmp_path / "b", "--dataset", folder)
    assert "--label_names" in capsys.readouterr().err
