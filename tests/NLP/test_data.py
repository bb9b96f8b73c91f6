"""Text data: the embedded generator, local folders in every format, labels, fingerprints, and one-line errors."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import huggingface_hub
import numpy as np
import pandas
import pyarrow.csv
import pytest
import torch

from kd.common.metrics.quality import choose_threshold, confidence, scope_metrics, threshold_metrics
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.intents import INTENTS, OUT_OF_SCOPE, load_intents
from kd.nlp.data.loading import Collator, TextData, Texts, load_text_data, with_label_order
from kd.nlp.student_model.evaluation import metrics_by_split
from kd.nlp.teacher_model.teacher import tiny_bert

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Columns = dict[str, list]


def write(folder: Path, format: str = "parquet", **splits: Columns | datasets.Dataset) -> str:
    """Writes one file per split. Returns the folder as a string."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        rows = columns if isinstance(columns, datasets.Dataset) else datasets.Dataset.from_dict(columns)
        path = folder / f"{split}.{format}"
        if format == "parquet":
            rows.to_parquet(path)
        elif format == "csv":
            pyarrow.csv.write_csv(rows.data.table, path)
        elif format == "json":
            path.write_text(json.dumps(rows.to_list()), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_list()), encoding="utf-8")
    return str(folder)


def texts(count: int, start: int = 0) -> list[str]:
    return [f'text {number}, "quoted"\nand broken' for number in range(start, start + count)]


def small(labels: list, valid_labels: list | None = None, column: str = "label") -> dict[str, Any]:
    valid = labels if valid_labels is None else valid_labels
    return {
        "train": {"text": texts(len(labels)), column: labels},
        "validation": {"text": texts(len(valid), 1000), column: valid},
    }


def error_of(*arguments: object, **keywords: object) -> str:
    with pytest.raises(UserError) as caught:
        load_text_data(*arguments, **keywords)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# The embedded dataset


INTENTS_FINGERPRINT = """
from kd.common.data.fingerprints import data_fingerprint
from kd.nlp.data.intents import load_intents
print(data_fingerprint([split, rows[:]] for split, rows in load_intents().items()))
"""


@pytest.mark.slow
def test_intents_are_the_same_for_the_same_seed_and_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    """The other process has other hashes of strings."""
    command, environment = [sys.executable, "-c", INTENTS_FINGERPRINT], os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    exec(INTENTS_FINGERPRINT, {})
    assert capsys.readouterr().out == other.stdout
    assert load_intents(1)["train"]["text"][:] != load_intents(0)["train"]["text"][:]


def test_no_intent_text_occurs_twice() -> None:
    found = load_intents()
    every = [text for split in found.values() for text in split["text"]]
    assert len(every) == len(set(every)) == 14_500
    assert {name: len(rows) for name, rows in found.items()} == {"train": 10_000, "validation": 1500, "test": 3000}


def test_there_are_many_intents_some_of_them_rare_and_none_in_the_majority() -> None:
    found = load_intents()
    names = found["train"].features["intent"].names
    assert names == [*INTENTS, "oos"] and len(names) == 41
    assert "oos" in load_text_data("intents").label_names
    train = Counter(found["train"]["intent"])
    assert len(train) == 41 and sum(count < 100 for count in train.values()) == 10
    assert max(Counter(found["validation"]["intent"]).values()) / 1500 < 0.15
    assert len({word for text in found["train"]["text"] for word in text.split()}) < 3000


def test_train_never_uses_excluded_alternatives() -> None:
    found = load_intents()
    for words in ("lisbon", "risotto", "tyre", "square root"):
        assert not any(words in text for text in found["train"]["text"])
    assert any("lisbon" in text for text in found["validation"]["text"])
    domains = [set(lines.split("|")) for lines in OUT_OF_SCOPE.values()]
    assert not (domains[0] & domains[1] or domains[0] & domains[2] or domains[1] & domains[2])


def test_intents_schema() -> None:
    data = load_text_data("intents")
    assert (data.name, data.primary_metric, data.task, data.num_labels) == (
        "intents",
        "accuracy",
        "classification",
        41,
    )
    for rows in data.splits.values():
        assert rows.column_names == ["text", "label", "row", "sample_id"]
        assert rows["sample_id"][:] == list(range(len(rows)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_those_of_the_padding_of_transformers(side: str) -> None:
    made = tiny_bert(load_text_data("intents"))
    made.tokenizer.padding_side = side
    tokens = [made.tokenizer(text) for text in ("cancel", "set an alarm", "a timer")]
    rows = [{**columns, "labels": 1, "sample_id": i} for i, columns in enumerate(tokens)]
    batch = Collator(made.tokenizer)([row | {"length": 0} for row in rows])
    reference = made.tokenizer.pad(rows, return_tensors="pt")
    assert batch.keys() == reference.keys()
    for name, values in batch.items():
        assert torch.equal(values, reference[name]) and values.dtype == reference[name].dtype


# Local folders


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl", "json"])
def test_all_formats_load_the_same_data(tmp_path: Path, format: str) -> None:
    splits = small(["pear", "apple", "fig", "apple"])
    data = load_text_data(write(tmp_path / "one", format, **splits))
    assert data.label_names == ["apple", "fig", "pear"]
    assert data.splits["train"]["label"][:] == [2, 0, 1, 0]
    assert data.splits["train"]["text"][:] == splits["train"]["text"]
    assert data.name == "one" and list(data.splits) == ["train", "validation"]
    assert data.fingerprint == load_text_data(write(tmp_path / "two", "parquet", **splits)).fingerprint


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_scores_stay_floats_in_every_format(tmp_path: Path, format: str) -> None:
    pairs = {"sentence1": texts(4), "sentence2": texts(4, 50), "label": [3.8, 0.0, 4.9999, 5.0]}
    data = load_text_data(write(tmp_path / format, format, train=pairs, dev=pairs))
    assert (
        data.task == "regression"
        and data.num_labels == 1
        and data.label_names == []
        and data.primary_metric == "spearman"
    )
    assert data.splits["validation"]["label"][:] == pytest.approx([3.8, 0.0, 4.9999, 5.0])
    assert data.splits["train"].column_names == ["text", "text_pair", "label", "row", "sample_id"]
    assert data.fingerprint == load_text_data(write(tmp_path / "p", train=pairs, validation=pairs)).fingerprint


def test_one_changed_label_or_text_changes_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, splits: dict[str, Any]) -> str:
        return load_text_data(write(tmp_path / name, **splits)).fingerprint

    splits = small(["a", "b", "a"])
    first = fingerprint("first", splits)
    assert first == fingerprint("again", splits)
    assert first != fingerprint("label", small(["a", "b", "b"], ["a", "b", "a"]))
    splits["validation"]["text"][1] += "!"
    assert first != fingerprint("text", splits)


def test_named_classes_keep_their_order(tmp_path: Path) -> None:
    kind = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": texts(2), "label": [0, 1]}, features=kind)
    swapped = kind | {"label": datasets.ClassLabel(names=["a", "z"])}
    valid = datasets.Dataset.from_dict({"text": texts(2, 9), "label": [0, 1]}, features=datasets.Features(swapped))
    data = load_text_data(write(tmp_path, train=rows, validation=valid))
    assert data.label_names == ["z", "a"] and data.splits["train"]["label"][:] == [0, 1]
    assert data.splits["validation"]["label"][:] == [1, 0]  # by name, not by number


def test_labels_can_be_reordered_by_name(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path, **small(["a", "b", "c", "a"])))
    other = with_label_order(data, ["C", "more", "A", "B"])
    assert other.label_names == ["C", "more", "A", "B"] and other.splits["train"]["label"][:] == [2, 3, 0, 2]
    assert other.splits["train"]["text"][:] == data.splits["train"]["text"][:]
    assert other.fingerprint != data.fingerprint  # results cached for one order must not be used for another
    assert with_label_order(data, ["c", "b", "a"]).splits["validation"]["label"][:] == [2, 1, 0, 2]
    assert with_label_order(with_label_order(data, ["c", "b", "a"]), ["a", "b", "c"]).fingerprint == data.fingerprint
    with pytest.raises(UserError, match=r"the label 'c' \(1 row of train\), which is not among a, b"):
        with_label_order(data, ["a", "b"])


def test_a_known_task_keeps_its_label_order_and_metric_without_class_names(tmp_path: Path) -> None:
    names = ["equivalent", "not_equivalent", "equivalent"]
    pairs = {"sentence1": texts(3), "sentence2": texts(3, 50), "label": names}
    mrpc = load_text_data(write(tmp_path / "mrpc", "csv", train=pairs, validation=pairs))
    assert mrpc.primary_metric == "f1" and mrpc.label_names == ["not_equivalent", "equivalent"]
    assert mrpc.splits["train"]["label"][:] == [1, 0, 1]
    rte = pairs | {"label": ["entailment", "not_entailment", "entailment"]}
    assert load_text_data(write(tmp_path / "rte", "csv", train=rte, validation=rte)).primary_metric == "accuracy"


def test_integer_labels_are_named_by_number(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path, "csv", **small([1, 0, 2])))
    assert data.label_names == ["0", "1", "2"] and data.splits["train"]["label"][:] == [1, 0, 2]


def test_columns_are_inferred_or_named(tmp_path: Path) -> None:
    rows = {"id": [7, 8, 9], "title": texts(3), "body": texts(3, 9), "topic": ["b", "a", "b"]}
    folder = write(tmp_path / "named", train=rows, validation=rows)
    assert "--text_columns" in error_of(folder) and "title" in error_of(folder)
    data = load_text_data(folder, ["body"], "topic")
    assert data.splits["train"]["text"][:] == rows["body"] and data.label_names == ["a", "b"]
    assert load_text_data(folder, ["title", "body"], "topic").splits["train"]["text_pair"][:] == rows["body"]
    lone = {"body": texts(3), "score": [0.5, 1.5, 2.5]}
    assert load_text_data(write(tmp_path / "lone", train=lone, val=lone)).task == "regression"


# Typical files: a pandas index, a score next to the label, label names next to label ids


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_pandas_frame_with_its_index(tmp_path: Path, format: str) -> None:
    frame = pandas.DataFrame({"review": texts(20), "sentiment": ["positive", "negative"] * 10})
    if format == "csv":
        frame.to_csv(tmp_path / "train.csv")
    else:
        frame.to_parquet(tmp_path / "train.parquet", index=True)
    data = load_text_data(str(tmp_path))
    assert data.label_names == ["negative", "positive"] and data.splits["train"].column_names[:2] == ["text", "label"]
    assert data.notes[0].startswith("columns: 'review' as text, 'sentiment' as label; '")
    assert data.notes[0].endswith("not used (row numbers)")


def test_an_ambiguous_label_column_is_an_error(tmp_path: Path) -> None:
    names = ["text", "airline_sentiment", "airline_sentiment_confidence"]
    rows = dict(zip(names, [texts(8), ["good", "bad"] * 4, [0.1 * i for i in range(8)]], strict=True))
    for format in ("csv", "jsonl"):
        folder = write(tmp_path / format, format, train=rows, validation=rows)
        message = error_of(folder)
        assert "the label column (airline_sentiment, airline_sentiment_confidence)" in message
        assert "--label_column" in message
        data = load_text_data(folder, None, "airline_sentiment")
        assert data.label_names == ["bad", "good"] and data.task == "classification"
        assert data.notes[0].endswith("'airline_sentiment_confidence' not used")
        assert load_text_data(folder, None, "airline_sentiment_confidence").task == "regression"


def test_label_names_next_to_label_ids_are_not_a_second_text(tmp_path: Path) -> None:
    rows = {"text": texts(8), "label": [1, 0] * 4, "label_text": ["good", "bad"] * 4}
    data = load_text_data(write(tmp_path, "jsonl", train=rows, validation=rows))
    assert data.splits["train"].column_names == ["text", "label", "row", "sample_id"]
    assert data.notes[0] == "columns: 'text' as text, 'label' as label; 'label_text' not used"


def test_texts_and_labels_of_digits_are_the_same_in_every_split(tmp_path: Path) -> None:
    train = {"text": ["007", "12", "four", "five"], "label": ["true", "false", "maybe", "true"]}
    digits = {"text": ["007", "12"], "label": ["true", "false"]}
    data = load_text_data(write(tmp_path, "csv", train=train, validation=digits, test=digits))
    assert data.splits["validation"]["text"][:] == ["007", "12"]
    assert data.label_names == ["false", "maybe", "true"] and data.splits["test"]["label"][:] == [2, 0]


def test_rows_of_train_without_a_label_are_unlabelled(tmp_path: Path) -> None:
    splits = small(["a", "", "b", None, "a"], ["b", "", "a"])
    data = load_text_data(folder := write(tmp_path, "csv", **splits))
    assert data.label_names == ["a", "b"] and data.splits["train"]["label"][:] == [0, IGNORED, 1, IGNORED, 0]
    assert data.splits["train"]["text"][:] == texts(5)
    assert "2 of 5 rows of train have no label: they train the student by the teacher's outputs alone" in data.notes
    assert data.splits["validation"]["label"][:] == [1, 0]  # metrics need labels
    assert "1 of 3 rows of validation have no label and are left out" in data.notes
    dropped = load_text_data(folder, drop_unlabelled=True)
    assert dropped.splits["train"]["text"][:] == [texts(5)[i] for i in (0, 2, 4)]
    assert "2 of 5 rows of train have no label and are left out" in dropped.notes


@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", ["unlabelled", "unlabeled", "unsupervised"])
def test_a_split_of_unlabelled_texts_joins_train(tmp_path: Path, format: str, name: str) -> None:
    splits = small(["a", "b", "a"])
    splits["train"]["id"] = [7, 8, 9]
    extra = {"text": texts(2, 500), "label": ["a", "secret"]} if name == "unsupervised" else {"text": texts(2, 500)}
    data = load_text_data(write(tmp_path, format, **splits, **{name: extra}))
    assert data.splits["train"]["text"][:] == [*texts(3), *texts(2, 500)]
    assert data.splits["train"]["label"][:] == [0, 1, 0, IGNORED, IGNORED] and data.label_names == ["a", "b"]
    assert ("column 'label' of split unlabelled is not used" in data.notes) == (name == "unsupervised")
    dropped = load_text_data(str(tmp_path), drop_unlabelled=True)
    assert len(dropped.splits["train"]) == 3 and f"split {name} is not used" in dropped.notes


def test_scores_and_ids_may_be_missing_too(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path / "scores", "csv", **small([0.5, None, 2.0], [1.5, 0.0])))
    assert data.task == "regression" and np.isnan(data.splits["train"]["label"][1])
    assert data.notes[-2] == "labels: scores from 0 to 2"
    data = load_text_data(write(tmp_path / "ids", **small([0, -1, 2, 1, -1], [1, 0])))
    assert data.splits["train"]["label"][:] == [0, IGNORED, 2, 1, IGNORED]
    assert with_label_order(data, ["2", "1", "0"]).splits["train"]["label"][:] == [2, IGNORED, 0, 1, IGNORED]


def test_train_may_have_no_labels_at_all(tmp_path: Path) -> None:
    valid = {"text": texts(4, 90), "label": ["a", "b", "b", "a"]}
    for name, column in (("without", {}), ("empty", {"label": [""] * 3})):
        data = load_text_data(write(tmp_path / name, "csv", train={"text": texts(3)} | column, validation=valid))
        assert data.splits["train"]["label"][:] == [IGNORED] * 3 and data.label_names == ["a", "b"]
    data = load_text_data(write(tmp_path / "split", "csv", unlabeled={"text": texts(3)}, validation=valid))
    assert data.splits["train"]["label"][:] == [IGNORED] * 3
    message = error_of(write(tmp_path / "none", "csv", train={"text": texts(3)}, test=valid))
    assert "too few training rows with a label" in message and "add a validation split" in message


def test_a_placeholder_is_no_label(tmp_path: Path) -> None:
    folder = write(tmp_path, "csv", **small(["a", "unknown", "b", "?", "a"], ["b", "a", "?"]))
    data = load_text_data(folder, unlabelled_label=["unknown", "?"])
    assert data.label_names == ["a", "b"] and data.splits["train"]["label"][:] == [0, IGNORED, 1, IGNORED, 0]
    assert "no label in column 'label' is 'none'" in (message := error_of(folder, unlabelled_label=["none"]))
    assert "--unlabelled_label" in message
    named = datasets.ClassLabel(names=["a", "todo", "b"])
    rows = datasets.Dataset.from_dict(
        {"text": texts(3), "label": [2, 1, 0]},
        features=datasets.Features({"text": datasets.Value("string"), "label": named}),
    )
    data = load_text_data(
        write(tmp_path / "ids", train=rows, validation=rows.select([0, 2])), unlabelled_label=["todo"]
    )
    assert data.label_names == ["a", "b"] and data.splits["train"]["label"][:] == [1, IGNORED, 0]


def test_validation_and_samples_are_chosen_among_the_rows_with_a_label(tmp_path: Path) -> None:
    labels = ["a" if i % 8 == 0 else "b" if i % 8 == 4 else "" for i in range(400)]
    folder = write(tmp_path, "csv", train={"text": texts(400), "label": labels})
    data = load_text_data(folder)
    assert Counter(data.splits["validation"]["label"]) == {0: 5, 1: 5}
    assert Counter(data.splits["train"]["label"]) == {0: 45, 1: 45, IGNORED: 300}
    assert "10 rows of train with a label, a stratified 10%" in data.notes[-1]
    some = load_text_data(folder, max_train_samples=39)
    counts = Counter(some.splits["train"]["label"])
    assert counts[IGNORED] == 30 and counts[0] + counts[1] == 9 and abs(counts[0] - counts[1]) == 1


def test_a_row_with_neither_label_nor_text_is_left_out(tmp_path: Path) -> None:
    splits = small(["a", "", "b", ""], ["a", "b"])
    splits["train"]["text"][3] = " "
    data = load_text_data(write(tmp_path, "csv", **splits))
    assert data.splits["train"]["label"][:] == [0, IGNORED, 1]
    assert "rows of train with neither a label nor a text, left out: 1" in data.notes


def test_the_flag_decides_between_classes_and_scores(tmp_path: Path) -> None:
    folder = write(tmp_path, "csv", **small([1, 2, 5, 5]))
    assert "--task" in error_of(folder) and "--label_column" in error_of(folder)
    assert load_text_data(folder, task="classification").label_names == ["1", "2", "5"]
    data = load_text_data(folder, task="regression")
    assert data.task == "regression" and data.splits["train"]["label"][:] == [1.0, 2.0, 5.0, 5.0]


@pytest.mark.parametrize("change", ["order", "cut", "labels", "names"])
def test_the_fingerprint_depends_on_order_rows_labels_and_names(tmp_path: Path, change: str) -> None:
    splits = small(["a", "b", "c", "a"])
    first = load_text_data(write(tmp_path / "first", **splits)).fingerprint
    train = splits["train"]
    if change == "order":
        splits["train"] = {name: column[::-1] for name, column in train.items()}
    elif change == "cut":
        splits["train"] = {name: column[:-1] for name, column in train.items()}
    elif change == "labels":
        train["label"] = ["b", "a", "c", "b"]
    else:
        splits = small(["a", "b", "d", "a"])
    assert load_text_data(write(tmp_path / "other", **splits)).fingerprint != first


# Evaluation of a saved classifier


def test_known_labels_need_no_train_split_and_are_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path, "csv", test={"text": texts(4), "label": ["Good", "bad", "", "Good"]})
    for place in (tmp_path, tmp_path / "test.csv"):
        data = load_text_data(str(place), known_labels=["good", "so-so", "bad"], needs_train=False)
        assert data.label_names == ["good", "so-so", "bad"] and data.splits["test"]["label"][:] == [0, 2, 0]
    with pytest.raises(UserError, match="label 'Good' .2 rows of test., which is not among a, b"):
        load_text_data(str(tmp_path), known_labels=["a", "b"], needs_train=False)


def test_known_labels_do_not_change_the_validation_split(tmp_path: Path) -> None:
    folder = write(tmp_path, train={"text": texts(40), "label": ["a", "b"] * 20})
    first, other = load_text_data(folder), load_text_data(folder, known_labels=["b", "a"], needs_train=False)
    assert first.splits["validation"]["text"][:] == other.splits["validation"]["text"][:]
    assert [1 - label for label in first.splits["validation"]["label"]] == other.splits["validation"]["label"][:]


def test_shards_are_joined_and_other_files_noted(tmp_path: Path) -> None:
    part = small(["a", "b"])["train"]
    splits: dict[str, Any] = {
        "train-00000-of-00002": part,
        "train-00001-of-00002": part,
        "validation": part,
        "extra": part,
    }
    data = load_text_data(write(tmp_path, **splits))
    assert len(data.splits["train"]) == 4 and "split extra is not used" in data.notes
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    assert "has 1 of the 2 files of split train" in error_of(str(tmp_path))


@pytest.mark.parametrize("test", [{"text": texts(2), "label": [-1, -1]}, {"text": texts(2)}])
def test_a_test_split_without_labels_is_left_out(tmp_path: Path, test: Columns) -> None:
    data = load_text_data(write(tmp_path, **small([0, 1]), test=test))
    assert "test" not in data.splits and "the test split has no labels and is not used" in data.notes


def test_a_missing_validation_split_is_made_from_train_by_class(tmp_path: Path) -> None:
    train = {"text": texts(201), "label": ["a"] * 140 + ["b"] * 60 + ["lone"]}
    test = {"text": texts(40, 1000), "label": ["a", "b"] * 20}
    folder = write(tmp_path, train=train, test=test)
    data = load_text_data(folder)
    assert Counter(data.splits["validation"]["label"]) == {0: 14, 1: 6}
    parts = [set(data.splits[name]["text"]) for name in ("train", "validation")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(train["text"])
    assert data.splits["test"]["text"][:] == test["text"]
    assert data.splits["validation"]["sample_id"][:] == list(range(20))
    assert "set aside, the same for every seed" in data.notes[-1]
    np.random.seed(1)
    assert load_text_data(folder).fingerprint == data.fingerprint


# Errors


def test_unknown_names(tmp_path: Path) -> None:
    message = error_of("nonsense")
    assert "intents" in message and "stsb" in message and "owner/name" in message
    assert "unknown dataset" in error_of(str(tmp_path / "missing"))
    assert "no parquet, CSV or JSON file" in error_of(str(tmp_path))


def test_errors_of_splits(tmp_path: Path) -> None:
    rows = small([0, 1])["train"]
    assert "no train split" in error_of(write(tmp_path / "a", test=rows))
    write(tmp_path / "b", train=rows)
    assert "several files" in error_of(write(tmp_path / "b", "csv", train=rows))
    assert "two validation" in error_of(write(tmp_path / "c", train=rows, dev=rows, valid=rows))
    assert "too few training rows" in error_of(write(tmp_path / "d", train=rows))
    assert "empty" in error_of(
        write(tmp_path / "e", train=rows, validation=datasets.Dataset.from_dict(rows).select([]))
    )
    assert "lacks column 'label'" in error_of(write(tmp_path / "f", train=rows, validation={"text": texts(2)}))
    write(tmp_path / "g", train=rows)
    (tmp_path / "g" / "validation.jsonl").write_text('{"text": \n')
    assert "cannot read" in error_of(str(tmp_path / "g"))


def test_errors_of_columns(tmp_path: Path) -> None:
    folder = write(tmp_path, **small([0, 1]))
    assert "no column 'body'" in error_of(folder, ["body"]) and "text, label" in error_of(folder, ["body"])
    assert "no column 'topic'" in error_of(folder, None, "topic")
    assert "does not contain texts" in error_of(folder, ["label"], "text")
    lists = {"text": texts(2), "label": [[[0]], [[1]]]}
    assert "not lists of labels" in error_of(write(tmp_path / "lists", train=lists, validation=lists))


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_an_empty_text_is_named_by_its_row(tmp_path: Path, empty: str | None) -> None:
    splits = small([0, 1, 0])
    splits["validation"]["text"][2] = empty
    assert "row 2 of validation" in error_of(write(tmp_path, **splits))


def test_errors_of_labels(tmp_path: Path) -> None:
    assert "no label of validation (c) occurs in train (a, b)" in error_of(
        write(tmp_path / "a", **small(["a", "b"], ["c", "c"]))
    )
    assert "the validation split has no labels" in error_of(write(tmp_path / "c", **small([0, 1], [-1, -1])))
    assert "1, 2, which are not 0 to n-1" in (message := error_of(write(tmp_path / "d", **small([1, 2]))))
    assert "--task classification" in message and "--task regression" in message
    assert "every label of train in column 'label' is 'a'" in error_of(write(tmp_path / "g", **small(["a", "a"])))


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"], ids=["offline", "unreachable"])
def test_an_unreachable_hub_gives_one_line_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str | None
) -> None:
    """Sets the constants that HF_HUB_OFFLINE and HF_ENDPOINT set in a new process."""
    constants: Any = huggingface_hub.constants
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", endpoint is None)
    if endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    message = error_of("rte")
    assert not waits, "without the check, the library datasets retries for half a minute"
    assert message.startswith("rte") and "--dataset FOLDER" in message and "--dataset intents" in message


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_new_process_without_the_hub_ends_in_one_line(tmp_path: Path, setting: dict[str, str]) -> None:
    command = "import sys, time; time.sleep = lambda seconds: print('waits', seconds, file=sys.stderr)\n"
    command += "from kd.nlp.data.loading import load_text_data; load_text_data('rte')"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=kept | {"HF_HOME": str(tmp_path)} | setting,
        capture_output=True,
        text=True,
    )
    assert "waits" not in done.stderr, "without the check, the library datasets retries for half a minute"
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: rte" in last and "--dataset FOLDER" in last and "--dataset intents" in last


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError("gone"), ValueError("no\nsuch config")])
def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raise_error(name: str, config: str | None) -> None:
        assert (name, config, datasets.config.HF_HUB_OFFLINE) == ("owner/name", "small", True)
        raise error

    def no_route() -> None:
        raise OSError("no route to host")

    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", raise_error)
    monkeypatch.setattr(huggingface_hub, "get_session", no_route)
    assert "owner/name:small" in error_of("owner/name:small")
    assert datasets.config.HF_HUB_OFFLINE == before


def test_a_hub_dataset_and_a_folder_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sentence": texts(3), "label": ["acceptable", "unacceptable", "acceptable"]}
    loaded = {name: datasets.Dataset.from_dict(rows) for name in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(loaded))
    cola = load_text_data("cola")
    folder = load_text_data(write(tmp_path, train=rows, validation=rows))
    assert cola.fingerprint == folder.fingerprint and cola.primary_metric == folder.primary_metric == "matthews"
    assert list(cola.splits) == ["train", "validation"] and cola.name == "cola"


# Real data, where it is present


def shared(name: str) -> TextData:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no real data at ../shared/data/{name}")
    return load_text_data(str(SHARED / name))


def sizes(data: TextData) -> dict[str, int]:
    return {name: len(rows) for name, rows in data.splits.items()}


def test_clinc() -> None:
    data = shared("clinc_oos_plus")
    assert sizes(data) == {"train": 15250, "validation": 3100, "test": 5500}
    assert data.num_labels == 151 and data.label_names[42] == "oos" and data.primary_metric == "accuracy"
    assert Counter(data.splits["test"]["label"])[42] == 1000


@pytest.mark.parametrize(
    "name, rows, labels, metric",
    [
        ("glue_cola", {"train": 8551, "validation": 1043}, ["unacceptable", "acceptable"], "matthews"),
        ("glue_sst2", {"train": 67349, "validation": 872}, ["negative", "positive"], "accuracy"),
        ("glue_rte", {"train": 2490, "validation": 277}, ["entailment", "not_entailment"], "accuracy"),
        ("glue_stsb", {"train": 5749, "validation": 1500}, [], "spearman"),
        ("glue_mrpc", {"train": 3668, "validation": 408, "test": 1725}, ["not_equivalent", "equivalent"], "f1"),
        (
            "glue_mnli",
            {"train": 1600, "validation_matched": 200, "validation_mismatched": 200},
            ["entailment", "neutral", "contradiction"],
            "accuracy",
        ),
    ],
)
def test_glue(name: str, rows: dict[str, int], labels: list[str], metric: str) -> None:
    data = shared(name)
    assert (sizes(data), data.label_names, data.primary_metric) == (rows, labels, metric)


def test_stsb_keeps_its_fractions() -> None:
    data = shared("glue_stsb")
    labels = np.array(data.splits["train"]["label"][:])
    assert data.task == "regression" and labels.min() == 0 and labels.max() == 5 and (labels % 1 != 0).mean() > 0.4
    assert labels[1] == pytest.approx(3.8)


# Out of scope


def test_scope_metrics_by_hand() -> None:
    logits = np.eye(3)[[0, 1, 2, 2, 0, 2]]
    labels = np.array([0, 0, 1, 2, 2, 2])
    # in scope: rows 0-2, one correct; out of scope: rows 3-5, two recalled
    found = scope_metrics(logits, labels, ["a", "b", "oos"])
    assert found == {"accuracy_in_scope": pytest.approx(1 / 3), "oos_recall": pytest.approx(2 / 3)}
    assert scope_metrics(logits, labels, ["a", "b", "c"]) == {}
    assert scope_metrics(logits[:2], labels[:2], ["a", "b", "oos"]) == {"accuracy_in_scope": 0.5}


SCOPED = ["a", "b", "oos"]


def scoped(rows: list[tuple[float, float, float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of rows (probability of a, of b, of oos, label)."""
    return np.log(np.array([row[:3] for row in rows])), np.array([row[3] for row in rows])


def test_threshold_by_hand() -> None:
    validation = scoped(
        [
            (0.90, 0.05, 0.05, 0),
            (0.60, 0.30, 0.10, 2),
            (0.50, 0.30, 0.20, 0),
            (0.35, 0.40, 0.25, 2),
            (0.20, 0.10, 0.70, 2),
        ]
    )
    # Correct without a threshold: 3 of 5; rejecting below 0.4: 3, 0.5: 4, 0.6: 3, 0.9: 4. The best are 0.5 and 0.9.
    threshold = choose_threshold(*validation, SCOPED)
    assert threshold is not None and threshold == pytest.approx(0.5)
    test = scoped([(0.45, 0.35, 0.20, 0), (0.20, 0.70, 0.10, 1), (0.48, 0.02, 0.50, 2), (0.30, 0.44, 0.26, 2)])
    assert threshold_metrics(*test, SCOPED, threshold) == {
        "oos_threshold": threshold,
        "accuracy_threshold": 0.75,  # the first row is rejected although it is an "a"
        "accuracy_in_scope_threshold": 0.5,
        "oos_recall_threshold": 1.0,  # one by its logits, one by its low confidence
    }
    assert choose_threshold(*validation, ["a", "b", "c"]) is None
    assert choose_threshold(validation[0], np.zeros(5, int), SCOPED) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_the_best_of_all_possible_ones(seed: int) -> None:
    """Compares with an exhaustive search. Equal confidences are rejected together."""
    generator = np.random.default_rng(seed)
    logits = generator.integers(-2, 3, size=(40, 4)).astype(np.float32)
    labels = np.append(generator.integers(0, 4, size=39), 1)
    names = ["a", "oos", "b", "c"]
    accuracies = {
        value: threshold_metrics(logits, labels, names, value)["accuracy_threshold"] for value in confidence(logits, 1)
    }
    best = max(accuracies.values())
    assert choose_threshold(logits, labels, names) == min(v for v in accuracies if accuracies[v] == best)


def test_only_validation_chooses_the_threshold() -> None:
    generator = np.random.default_rng(0)
    labels = {split: generator.integers(0, 3, size=60) for split in ("test", "validation")}
    logits = {split: generator.normal(size=(60, 3)) for split in labels}
    splits = {split: datasets.Dataset.from_dict({"labels": values}) for split, values in labels.items()}
    data, collate = TextData("scoped", splits, SCOPED, "classification", "accuracy", ""), MagicMock()
    texts = Texts(data, splits, collate)
    first = metrics_by_split(texts, logits)
    assert first["test"]["oos_threshold"] == first["validation"]["oos_threshold"] > 0
    assert first["validation"]["accuracy_threshold"] >= first["validation"]["accuracy"]
    for other in (10 * logits["test"], np.eye(3)[labels["test"]], -logits["test"]):
        again = metrics_by_split(texts, logits | {"test": other})
        assert again["validation"] == first["validation"]
        assert again["test"]["oos_threshold"] == first["test"]["oos_threshold"]
        assert again["test"] != first["test"]
    flipped = metrics_by_split(texts, logits | {"validation": np.eye(3)[labels["validation"]]})
    assert flipped["test"]["oos_threshold"] != first["test"]["oos_threshold"]
    inside = Texts(data, {"validation": datasets.Dataset.from_dict({"labels": labels["validation"] % 2})}, collate)
    assert "oos_threshold" not in metrics_by_split(inside, {"validation": logits["validation"]})["validation"]


def test_max_samples_limit_the_splits_and_change_the_fingerprint() -> None:
    data = load_text_data("intents", max_train_samples=100, max_eval_samples=50)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 100, "validation": 50, "test": 50}
    assert data.fingerprint == load_text_data("intents", max_train_samples=100, max_eval_samples=50).fingerprint
    assert data.fingerprint != load_text_data("intents").fingerprint
