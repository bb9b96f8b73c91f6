"""The scripts that evaluate: the student of a run, the data of its recipe, and files of predictions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.common.cli import Parser
from kd.common.reporting.saved_models import class_predictions, parse_with_recipe, saved_model, write_predictions
from kd.common.training.arguments import add_evaluation_arguments
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_json, write_text


def parse(monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, object]:
    """The arguments of `evaluate.py WORDS`."""
    parser = Parser()
    add_evaluation_arguments(parser, "or a folder", "the label")
    parser.add_argument("--dataset")
    parser.add_argument("--columns", nargs="*")
    parser.add_argument("--most", type=int)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    return vars(parse_with_recipe(parser, ["dataset", "columns", "most"]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the students of two seeds."""
    folder = tmp_path / "run"
    for model in ("student", "seed3/student", "seed4/student", "stages/teacher"):
        write_json(folder / model / "config.json", {})
    for part, most in ((".", 5), ("seed3", 5), ("seed4", 7)):
        recipe = f"dataset: my data.csv\ncolumns: [first, second]\nmost: {most}\nalpha: 0.5\n"
        write_text(folder / part / "recipe.yaml", recipe)
    write_json(folder / "results.json", {"seeds": [3, 4]})
    return folder


@pytest.mark.parametrize("part", [".", "student", "stages/teacher", "seed3", "seed3/student"])
def test_the_data_are_those_of_the_recipe(
    run: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = parse(monkeypatch, run / part)
    assert (found["dataset"], found["columns"], found["most"]) == ("my data.csv", ["first", "second"], 5)
    recipe = run / ("seed3" if "seed3" in part else "") / "recipe.yaml"
    expected = f"note: --dataset 'my data.csv' --columns first second --most 5, from {recipe}\n"
    assert capsys.readouterr().out == expected


def test_flags_take_precedence_and_another_dataset_uses_no_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse(monkeypatch, run, "--most", 2)
    assert (found["dataset"], found["columns"], found["most"]) == ("my data.csv", ["first", "second"], 2)
    assert parse(monkeypatch, run / "seed4")["most"] == 7
    found = parse(monkeypatch, run, "--dataset", "other")
    assert (found["dataset"], found["columns"], found["most"]) == ("other", None, None)


def test_the_relative_path_of_a_model_is_enough(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "student")
    assert parse(monkeypatch, ".")["dataset"] == "my data.csv"


def test_a_model_outside_of_runs_needs_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b" / "c" / "d" / "e"
    folder.mkdir(parents=True)
    write_text(tmp_path / "recipe.yaml", "dataset: far\n")  # too far to be that of this model
    with pytest.raises(UserError, match="is in no run whose recipe names its data: pass --dataset"):
        parse(monkeypatch, folder)
    with pytest.raises(UserError, match="there is no folder owner/name; a model of the Hub needs --dataset"):
        parse(monkeypatch, "owner/name")
    assert parse(monkeypatch, "owner/name", "--dataset", "x")["model"] == "owner/name"


def test_a_run_stands_for_its_first_student(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert saved_model(str(run)) == str(run / "student")
    assert capsys.readouterr().out == f"note: the student of seed 3 is evaluated; the others are in {run}/seed4\n"
    assert saved_model(str(run / "seed4")) == str(run / "seed4" / "student")
    assert saved_model(str(run / "stages" / "teacher")) == str(run / "stages" / "teacher")
    (run / "student" / "config.json").unlink()
    assert saved_model(str(run)) == str(run / "stages" / "teacher")  # as in a run without a student
    assert saved_model("owner/name") == "owner/name"


LOGITS = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], dtype=np.float32)


def test_predictions_have_the_probability_of_the_prediction() -> None:
    found = class_predictions(LOGITS, np.array([1, 2]), ["a", "b", "c"])
    assert found["label"] == ["b", "c"] and found["prediction"] == ["a", "c"]
    expected = torch.tensor(LOGITS, dtype=torch.float64).softmax(1).amax(1)
    assert found["probability"] == pytest.approx(expected.tolist(), rel=1e-12)


def test_predictions_are_read_again(tmp_path: Path) -> None:
    columns = class_predictions(LOGITS, np.array([1, 2]), ['say "a, b"', "größe\nline", "c"])
    splits = {"validation": {"row": [4, 9]} | columns, "test": {"row": [0, 1]} | columns}
    for name in ("p.csv", "p.jsonl"):
        write_predictions(str(tmp_path / name), splits)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["split"] for row in rows] == ["validation", "validation", "test", "test"]
    assert rows[0]["label"] == "größe\nline" and rows[0]["prediction"] == 'say "a, b"' and rows[1]["row"] == "9"
    assert [{name: str(value) for name, value in line.items()} for line in lines] == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "p.txt"], "--predictions p.txt is no .csv or .jsonl file"),
        (["--predictions", "file/p.csv"], "file is not a writable folder"),
        (["--json", "file/p.json"], "file is not a writable folder"),
    ],
)
def test_files_that_cannot_be_written(
    run: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    (run / "file").touch()
    with pytest.raises(UserError, match=message):
        parse(monkeypatch, run, *words)
