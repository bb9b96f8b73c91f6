"""A teacher's outputs in columns: every form that APIs and language models leave, as logits computed by hand."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from scipy.special import softmax

from kd.common.data.sources import read_splits
from kd.common.data.teacher_columns import TeacherColumns, read_teacher_columns
from kd.common.utils.errors import UserError

CLASSES = ["anger", "joy", "no_fear"]
P = [[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]]  # in the order of CLASSES


def read(columns: list[str], *others: Any, **train: list) -> TeacherColumns:
    return read_teacher_columns({"train": datasets.Dataset.from_dict(train)}, columns, CLASSES, *others)


def error_of(columns: list[str], *others: Any, **train: list) -> str:
    with pytest.raises(UserError) as caught:
        read(columns, *others, **train)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(found: TeacherColumns, temperature: float = 1.0) -> np.ndarray:
    return softmax(found.logits["train"].astype(np.float64) / temperature, axis=1)


NAMED = [dict(zip(CLASSES, row, strict=True)) for row in P]
FORMS: dict[str, tuple[list[str], dict[str, list]]] = {
    "a column for each class": (
        ["anger", "joy", "no_fear"],
        {"anger": [0.7, 0.0], "joy": [0.2, 1.0], "no_fear": [0.1, 0.0]},
    ),
    "a pattern": (["p_*"], {"p_joy": [0.2, 1.0], "p_anger": [0.7, 0.0], "p_no_fear": [0.1, 0.0]}),
    "text": (["p_*"], {"p_joy": ["0.2", "1"], "p_anger": ["0.70", "0"], "p_no_fear": ["0.1", "0.0"]}),
    "beginning and end": (["* score"], {"Joy score": [0.2, 1.0], "Anger score": [0.7, 0], "No-fear score": [0.1, 0]}),
    "names in JSON": (["answer"], {"answer": [json.dumps(row) for row in NAMED]}),
    "names in Python": (["answer"], {"answer": [str(row) for row in NAMED]}),
    "names": (["answer"], {"answer": NAMED}),
    "pipeline": (
        ["answer"],
        {"answer": [[{"label": name, "score": p} for name, p in row.items()][::-1] for row in NAMED]},
    ),
    "two columns of lists": (
        ["labels", "scores"],
        {"labels": [CLASSES[::-1], CLASSES], "scores": [P[0][::-1], P[1]]},
    ),
    "lists": (["answer"], {"answer": P}),
    "percentages": (["p_*"], {"p_joy": [20, 100], "p_anger": [70, 0], "p_no_fear": [10, 0]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_probabilities_gives_the_same_distributions(form: str) -> None:
    columns, train = FORMS[form]
    found = read(columns, None, CLASSES, **train)
    np.testing.assert_allclose(at(found), P, atol=1e-6)
    powers = np.array(P) ** (1 / 4)
    np.testing.assert_allclose(at(found, 4.0), powers / powers.sum(1, keepdims=True), atol=1e-6)
    assert not found.complete and ("percentages" if form == "percentages" else "probabilities") in found.description


def test_logits_and_log_probabilities_are_used_as_they_are() -> None:
    rows = [[2.5, -1.0, 0.25], [-3.0, 8.0, 1.0]]
    found = read(
        ["z*"], **dict(zip(["z0_anger", "z0_joy", "z0_no_fear"], map(list, zip(*rows, strict=True)), strict=True))
    )
    np.testing.assert_allclose(found.logits["train"], rows)
    assert found.complete and found.description.endswith("as logits")
    logs = np.log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(at(read(["answer"], None, CLASSES, answer=logs.tolist())), np.exp(logs), atol=1e-6)


@pytest.mark.parametrize("logs", [False, True])
def test_the_missing_mass_of_top_k_is_divided_among_the_other_classes(logs: bool) -> None:
    rows = [{"joy": 0.9}, {"anger": 0.6, "no fear": 0.4}, {"joy": 0.5, "anger": 0.3}]
    if logs:
        rows = [{name: math.log(p) for name, p in row.items()} for row in rows]
    found = read(["top"], top=[json.dumps(row) for row in rows])
    np.testing.assert_allclose(at(found), [[0.05, 0.9, 0.05], [0.6, 0.0, 0.4], [0.3, 0.5, 0.2]], atol=1e-6)
    assert f"as top-k {'log-' if logs else ''}probabilities" in found.notes[0]
    flat = read(["name", "p"], name=["joy", None, "anger"], p=[0.9, None, 0.6])
    np.testing.assert_allclose(at(flat)[[0, 2]], [[0.05, 0.9, 0.05], [0.6, 0.2, 0.2]], atol=1e-6)
    assert "1 of 3 rows of train have no output of the teacher" in flat.notes


def test_a_hard_label_is_one_hot_at_every_temperature() -> None:
    found = read(["answer"], answer=["joy", "No Fear", "ANGER", "I am not sure", None])
    for temperature in (1.0, 8.0):
        np.testing.assert_array_equal(at(found, temperature)[:3], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert np.isnan(found.logits["train"][3:]).all() and found.description.endswith("as hard labels")
    assert "1 row with an answer that is no class have no output: I am not sure" in found.notes
    assert "--trust_label_order" in error_of(["answer"], answer=[0, 2])
    assert at(read(["answer"], None, CLASSES, answer=[0, 2])).argmax(1).tolist() == [0, 2]
    assert "no hard label of --teacher_columns (x)" in error_of(["answer"], answer=["x"])


def test_lists_have_the_order_of_the_names() -> None:
    assert "--trust_label_order" in (message := error_of(["answer"], answer=P)) and "--label_names" in message
    found = read(["answer"], None, ["no_fear", "anger", "joy"], answer=P)
    np.testing.assert_allclose(at(found)[0], [0.2, 0.1, 0.7], atol=1e-6)
    assert "are not the 3 classes" in error_of(["answer"], None, ["a", "b", "c"], answer=P)
    assert "2 numbers in the column" in error_of(["answer"], None, CLASSES, answer=[[0.5, 0.5]])


def test_probabilities_that_do_not_add_up_need_the_flag() -> None:
    scores = {"anger": [8.0, 2.0], "joy": [1.0, 5.0], "no_fear": [1.0, 1.0]}
    assert "--teacher_values" in error_of(CLASSES, **scores)
    found = read(CLASSES, "probabilities", **scores)
    np.testing.assert_allclose(at(found), [[0.8, 0.1, 0.1], [0.25, 0.625, 0.125]], atol=1e-6)
    assert "the probabilities of 2 rows of train do not add up to 1 and are scaled" in found.notes
    np.testing.assert_allclose(read(CLASSES, "logits", **scores).logits["train"][0], [8, 1, 1])
    assert "row 0 of train: a probability of --teacher_columns is negative" in error_of(
        CLASSES, "probabilities", anger=[-1.0], joy=[1.0], no_fear=[1.0]
    )


@pytest.mark.parametrize(
    ("columns", "train", "message"),
    [
        (["missing"], {"answer": ["joy"]}, "no column 'missing' for --teacher_columns: the columns are answer"),
        (["p_*"], {"p_joy": [0.5], "p_anger": [0.5]}, "do not match the 3 classes"),
        (
            ["answer"],
            {"answer": ['{"joy": 0.5, "hate": 0.5}']},
            "'hate' in --teacher_columns is not among",
        ),
        (["answer"], {"answer": ['[{"x": "joy", "score": 1}]']}, "rename its keys"),
        (["answer"], {"answer": ["joy", '{"joy": 1}']}, "different forms"),
        (["answer"], {"answer": [None, ""]}, "are empty"),
        (["answer"], {"answer": ['{"joy": -2.0, "anger": 1.5}']}, "--teacher_values"),
        (["answer"], {"answer": ['{"joy": "high"}']}, "'high' in --teacher_columns is no number"),
        (["a", "b"], {"a": [["joy"]], "b": [[0.5, 0.5]]}, "1 names and 2 numbers"),
    ],
)
def test_errors_name_the_flag_or_the_row(columns: list[str], train: dict[str, list], message: str) -> None:
    assert message in error_of(columns, **train)


def test_numbers_of_a_regression() -> None:
    raw = {"train": datasets.Dataset.from_dict({"score": ["0.5", "", "2"]})}
    found = read_teacher_columns(raw, ["score"], [])
    np.testing.assert_array_equal(found.logits["train"], [[0.5], [math.nan], [2.0]])
    with pytest.raises(UserError, match="row 0 of train: 'high' in column"):
        read_teacher_columns({"train": datasets.Dataset.from_dict({"score": ["high"]})}, ["score"], [])


def test_a_csv_file_of_pandas(tmp_path: Path) -> None:
    """pandas writes dictionaries as Python literals, and lists with single quotes."""
    pandas.DataFrame({"text": ["a", "b"], "answer": NAMED}).to_csv(tmp_path / "train.csv")
    raw, _ = read_splits(str(tmp_path), {})
    np.testing.assert_allclose(at(read_teacher_columns(raw, ["answer"], CLASSES)), P, atol=1e-6)
