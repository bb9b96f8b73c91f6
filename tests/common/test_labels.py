"""Labels over all splits: classes or scores, rows without a label, and errors for ambiguous labels."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kd.common.data.label_names import map_label_ids, match_names, sort_labels
from kd.common.data.labels import Labels, read_labels
from kd.common.utils.errors import UserError

NAMED = datasets.ClassLabel(names=["neg", "pos"])


def labels(*arguments: Any, feature: Any = None, **splits: list) -> Labels:
    kind = datasets.Features({"label": feature}) if feature else None
    raw = {name: datasets.Dataset.from_dict({"label": values}, features=kind) for name, values in splits.items()}
    return read_labels(raw, "label", *arguments)


def error_of(*arguments: Any, **splits: Any) -> str:
    with pytest.raises(UserError) as caught:
        labels(*arguments, **splits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("nothing", [None, "", "  ", "nan", "NaN", "null"])
def test_rows_without_a_label_are_left_out_and_counted(nothing: str | None) -> None:
    found = labels(train=["pos", nothing, "neg", nothing], validation=["neg"])
    assert found.names == ["neg", "pos"]
    assert found.rows["train"].tolist() == [0, 2] and found.values["train"].tolist() == [1, 0]
    assert "2 of 4 rows of train have no label and are left out" in found.notes


def test_whole_numbers_are_the_same_class_in_any_notation() -> None:
    """pandas writes a column of whole numbers as 0.0, 1.0, ... if some are missing."""
    found = labels(train=[0.0, 1.0, None, 2.0], validation=[2, 0], test=["1", "0.0"])
    assert found.names == ["0", "1", "2"]
    assert {split: values.tolist() for split, values in found.values.items()} == {
        "train": [0, 1, 2],
        "validation": [2, 0],
        "test": [1, 0],
    }
    assert any("--task regression" in note for note in found.notes)
    assert labels("regression", train=[0.0, 1.0], validation=[2.0]).names == []


def test_one_fraction_in_any_split_makes_all_labels_scores() -> None:
    found = labels(train=["1", "3", "NA"], validation=["2.5", "-1"])
    assert found.names == [] and found.values["train"].dtype == np.float32
    assert found.values["train"].tolist() == [1, 3] and found.values["validation"].tolist() == [2.5, -1]
    assert "labels: scores from -1 to 3" in found.notes


def test_codes_and_truth_values_keep_their_spelling_in_every_split() -> None:
    found = labels(train=["007", "010", "true", "false"], validation=["007", "010"], test=["true"])
    assert found.names == ["007", "010", "false", "true"]
    assert found.values["validation"].tolist() == [0, 1] and found.values["test"].tolist() == [3]
    assert labels(train=[True, False], test=[False]).values["test"].tolist() == [0]


def test_the_flag_decides_whether_numbers_are_classes_or_scores() -> None:
    stars = {"train": [1, 2, 3, 5], "validation": [10]}
    message = error_of(**stars)
    assert "1, 2, 3, 5, 10" in message and "--task classification" in message and "--task regression" in message
    assert labels("classification", train=[1, 2, 3, 10], validation=[10, 2]).names == ["1", "2", "3", "10"]
    assert labels("regression", **stars).values["validation"].tolist() == [10]
    assert "such as 1.5" in (message := error_of(train=["1.5", "2", "bad"])) and "'bad'" in message
    assert "row 2 of train: 'bad'" in error_of("regression", train=["1.5", "2", "bad"])


# -1


def test_minus_one_among_ids_is_no_label_as_in_snli() -> None:
    found = labels(train=[0, 1, 2, -1, 0], validation=[2, -1, 1, 0])
    assert found.names == ["0", "1", "2"] and found.values["validation"].tolist() == [2, 1, 0]
    assert "1 of 5 rows of train have no label and are left out" in found.notes
    assert "-1 in column 'label' is treated as no label" in found.notes


def test_minus_one_on_a_scale_is_a_class() -> None:
    found = labels(train=[-1, 0, 1, 1], validation=[1, -1, 0])
    assert found.names == ["-1", "0", "1"] and found.values["train"].tolist() == [0, 1, 2, 2]
    assert labels(None, ["-1", "0", "1"], test=[-1, 1]).names == ["-1", "1"]  # the classifier has this label


def test_ambiguous_minus_one_is_rejected() -> None:
    """Two classes of which one row in a hundred has no label, or a scale?"""
    rows = [0, 1] * 99 + [-1, -1]
    assert "--task classification if -1 is a class" in error_of(train=rows, validation=[0, 1])
    assert labels("classification", train=rows, validation=[0, 1]).names == ["-1", "0", "1"]


@pytest.mark.parametrize("kind", [None, "ids"])
def test_minus_one_among_names_is_a_class(kind: str | None) -> None:
    found = labels(kind, train=["a", "-1", "b"], validation=["-1", "a"])
    assert found.names == ["-1", "a", "b"] and found.values["validation"].tolist() == [0, 1]
    assert "-1 in column 'label' is treated as a label" in found.notes


@pytest.mark.parametrize("minus_one", [-1, -1.0, "-1"])
def test_minus_one_among_ids_is_no_label(minus_one: Any) -> None:
    """Covers two ids, and ids that do not start at 0."""
    for ids in ([0, 1], [1, 2, 5]):
        column = [*map(type(minus_one), ids), minus_one]
        found = labels("ids", train=column, validation=column)
        assert found.names == list(map(str, ids)) and found.rows["train"].tolist() == list(range(len(ids)))
    for wrong in (-2, 1.5):
        assert f"row 2 of train: '{wrong}' in column 'label' is no class" in error_of("ids", train=[0, 1, wrong])


@pytest.mark.parametrize("column", [[0, 1], ["a", "b"], [0.5, 1.5]])
def test_a_test_split_of_minus_one_has_no_labels(column: list) -> None:
    found = labels(train=column, validation=column, test=[type(column[0])(-1)] * 2)
    assert "test" not in found.values and "the test split has no labels and is not used" in found.notes
    assert len(found.names) in (0, 2)


def test_declared_classes_have_their_names_and_minus_one_is_no_label() -> None:
    found = labels(feature=NAMED, train=[1, 0, -1, None], validation=[0])
    assert found.names == ["neg", "pos"] and found.values["train"].tolist() == [1, 0]
    metadata = datasets.Features({"label": NAMED}).arrow_schema.metadata
    beyond = datasets.Dataset(pa.table({"label": [0, 2]}).replace_schema_metadata(metadata))
    with pytest.raises(UserError, match="row 1 of train: label 2 in column 'label' is out of range"):
        read_labels({"train": beyond}, "label")
    raw = {
        "train": datasets.Dataset.from_dict({"label": [1, 0]}, features=datasets.Features({"label": NAMED})),
        "validation": datasets.Dataset.from_dict({"label": [0.0, None, 1.0]}),
        "test": datasets.Dataset.from_dict({"label": ["pos", "", "neg"]}),
    }
    both = read_labels(raw, "label")
    assert both.values["validation"].tolist() == [0, 1] and both.values["test"].tolist() == [1, 0]
    assert both.rows["validation"].tolist() == [0, 2]


# Splits with different labels


def test_a_label_only_in_validation_is_a_class_without_training_rows() -> None:
    found = labels(train=["a", "b"], validation=["c", "a", "c"])
    assert found.names == ["a", "b", "c"] and found.values["validation"].tolist() == [2, 0, 2]
    assert "labels of validation that never occur in train, classes without training rows: c (2 rows)" in found.notes
    two = labels(feature=datasets.ClassLabel(names=["a", "b", "c"]), train=[1, 0], test=[2, 0, 2], validation=[0])
    assert two.names == ["a", "b", "c"] and two.values["test"].tolist() == [2, 0, 2]


def test_a_class_that_only_a_later_split_declares_comes_last() -> None:
    def declaring(names: list[str]) -> datasets.Dataset:
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"label": [0, 1]}, features=features)

    found = read_labels({"train": declaring(["z", "a"]), "test": declaring(["y", "a", "unused"])}, "label", "ids")
    assert found.names == ["z", "a", "y"] and found.values["test"].tolist() == [2, 1]


def test_a_single_class_to_train_on_is_rejected() -> None:
    assert "every label of train in column 'label' is 'a'" in error_of(train=["a", "a"], validation=["a", "b"])
    assert "every label of train in column 'label' is 'neg'" in error_of(feature=NAMED, train=[0, 0], test=[1, 0])
    assert labels("ids", ["a", "b"], test=["a"]).names == ["a"], "a model may be evaluated on one class"


def test_splits_that_share_no_label_are_rejected() -> None:
    assert "no label of validation (0, 1) occurs in train (no, yes)" in error_of(
        train=["yes", "no"], validation=[0, 1]
    )
    assert "the validation split has no labels" in error_of(train=[0, 1], validation=[-1, -1])
    assert "'x' of validation (1 row) is not among the classes" in declared_error(["neg", "x"])


def declared_error(validation: list) -> str:
    raw = {
        "train": datasets.Dataset.from_dict({"label": [1, 0]}, features=datasets.Features({"label": NAMED})),
        "validation": datasets.Dataset.from_dict({"label": validation}),
    }
    with pytest.raises(UserError) as caught:
        read_labels(raw, "label")
    return str(caught.value)


@pytest.mark.parametrize("case", [str, str.upper])
def test_ids_are_mapped_to_those_of_a_model_by_name(case: Callable[[str], str]) -> None:
    ids = {"train": np.array([0, 1]), "test": np.array([1, 1])}
    data_names, names = ["cat", "dog"], [case(name) for name in ("dog", "emu", "cat")]
    found = map_label_ids("pets", ids, data_names, names)
    assert found["train"].tolist() == [2, 0] and found["test"].tolist() == [0, 0]
    with pytest.raises(
        UserError, match=r"pets has the label 'dog' \(1 row of train\), which is not among Dog, DOG, cat"
    ):
        map_label_ids("pets", ids, data_names, ["Dog", "DOG", "cat"])


@pytest.mark.parametrize("name", ["card declined", "Card_Declined", "card-declined", " CARD  DECLINED"])
def test_names_match_in_any_case_and_with_any_separator(name: str) -> None:
    assert match_names(["b", name], ["card_declined", "B"]) == [1, 0]
    unambiguous = {"Card_Declined": 0, "card-declined": 1}  # the others match both
    assert match_names([name], ["card_declined", "card-declined", "b"]) == [unambiguous.get(name, -1)]


def test_rows_without_a_label_have_none_in_any_order() -> None:
    assert map_label_ids("d", {"train": np.array([1, -100, 0])}, ["a", "b"], ["b", "c", "a"])["train"].tolist() == [
        0, -100, 2
    ]  # fmt: skip


def test_numbers_come_first_and_by_size() -> None:
    assert sort_labels({"10", "2", "b", "1", "a", "a10", "a2"}) == ["1", "2", "10", "a", "a10", "a2", "b"]
    assert sort_labels({"10", "02", "09", "-1"}) == ["-1", "02", "09", "10"]


def test_a_column_of_row_numbers_is_rejected_as_label() -> None:
    assert "30 different values in 30 rows of train" in error_of(train=list(range(30)), validation=[0, 1])
    assert len(labels("classification", train=list(range(30)), validation=[0, 1]).names) == 30
