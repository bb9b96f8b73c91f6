"""The domain from end to end on small data: loading, distillation, evaluation, and bad input."""

import csv
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.common.reporting.results import validate
from kd.common.utils.errors import UserError
from kd.example_domain.data.loading import OVERTONES, load_data, tones
from kd.example_domain.student_model.distillation import predict
from kd.example_domain.teacher_model.classifier import Classifier, load_trained
from kd_testing.scripts import run_script

QUIET = ["--report_to", "none", "--disable_tqdm", "true"]
BRIEF = ["--num_train_epochs", 3, "--teacher_width", 32, *QUIET]


def script(name: str, *arguments: object) -> None:
    run_script(f"example-domain/scripts/{name}", *arguments)


def results_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    validate(results)
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "distill"
    script("distill.py", *BRIEF, "--output_dir", folder)
    return folder


def test_a_run_is_complete_and_its_models_have_learned(finished: Path) -> None:
    models = results_of(finished)["models"]
    scores = {role: model["metrics"]["test"]["accuracy"] for role, model in models.items()}
    assert min(scores.values()) > 1.5 / len(OVERTONES) and scores["teacher"] > 2.5 / len(OVERTONES), scores
    assert models["student"]["parameters"] == models["control"]["parameters"] < models["teacher"]["parameters"]
    verdict = results_of(finished)["verdict"]["control"]
    student, control = (models[role]["metrics"]["validation"]["accuracy"] for role in ("student", "control"))
    low, high = verdict["interval"]
    assert low <= verdict["gain"] <= high and verdict["word"].endswith("(one seed)")
    assert verdict["gain"] == pytest.approx(student - control)
    for name in ("recipe.yaml", "report.md", "curves.png", "student/model.safetensors"):
        assert (finished / name).stat().st_size > 0


def test_evaluate_reproduces_the_reported_metrics(finished: Path, tmp_path: Path) -> None:
    script("evaluate.py", finished / "student", "--json", tmp_path / "again.json")
    reported = results_of(finished)["models"]["student"]["metrics"]
    for metrics in reported.values():
        del metrics["agreement"]  # evaluate.py has no teacher
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == reported


def test_a_run_is_evaluated_on_its_own_data_and_on_a_file(finished: Path, tmp_path: Path) -> None:
    script("evaluate.py", finished, "--predictions", tmp_path / "p.csv", "--json", tmp_path / "m.json")
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("validation", "test"):
        right = [row["label"] == row["prediction"] for row in rows if row["split"] == split]
        assert metrics[split]["accuracy"] == sum(right) / len(right)
    few = [row for row in tones()["test"] if row["label"] in (1, 3)][:20]  # two of six classes
    names = [list(OVERTONES)[row["label"]] for row in few]
    datasets.Dataset.from_dict({"values": [row["values"] for row in few], "label": names}).to_json(
        tmp_path / "few.jsonl"
    )
    script("evaluate.py", finished, "--dataset", tmp_path / "few.jsonl", "--predictions", tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == names and [line["row"] for line in lines] == list(range(20))
    assert all(1 / 6 <= line["probability"] <= 1 for line in lines)


def test_samples_are_limited() -> None:
    data = load_data("tones", max_train_samples=60, max_eval_samples=30)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert len(set(data.splits["train"]["labels"][:].tolist())) == 6 and "60 of 1,500 train rows" in data.notes


def test_the_model_card_loads_the_student(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search("```python\n(.*?)```", (finished / "student" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    with chdir(finished):
        exec(code[1], {})
    assert capsys.readouterr().out.strip() in OVERTONES


def test_a_finished_run_resumes_with_its_stages_and_takes_a_trained_teacher(finished: Path, tmp_path: Path) -> None:
    before = results_of(finished)
    script("distill.py", *BRIEF, "--output_dir", finished, "--resume_from_checkpoint")
    after = results_of(finished)
    for role in ("teacher", "control", "student"):
        assert before["models"][role]["metrics"] == after["models"][role]["metrics"]
    options = ["--teacher", finished / "stages" / "teacher", "--no_control", "--output_dir", tmp_path / "run"]
    script("distill.py", *QUIET, *options, "--num_train_epochs", 1)
    again = results_of(tmp_path / "run")
    assert again["models"]["teacher"]["metrics"] == before["models"]["teacher"]["metrics"]
    assert again["models"]["control"] is None and not (tmp_path / "run" / "stages" / "teacher").exists()


def test_a_teacher_with_other_labels_or_damaged_files_is_rejected(finished: Path, tmp_path: Path) -> None:
    other = load_data(written(tmp_path))
    with pytest.raises(UserError, match="has the labels"):
        load_trained(str(finished / "student"), other)
    with pytest.raises(UserError, match="no classifier in folder"):
        load_trained(str(finished), other)
    whole = load_data("tones")
    shutil.copytree(finished / "student", tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    save_file({f"net.{name}": tensor for name, tensor in weights.items()}, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(UserError, match="do not fit its config.json: missing: backbone.*; unknown: net.backbone"):
        load_trained(str(tmp_path / "copy"), whole)
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged or truncated"):
        load_trained(str(tmp_path / "copy"), whole)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds a bert"):
        load_trained(str(tmp_path), other)


# ---- data ----


def written(folder: Path, split: str = "train", **columns: list) -> str:
    usual = {"values": [[float(i), 0.0, 1.0] for i in range(20)], "label": ["b", "a"] * 10}
    rows = datasets.Dataset.from_dict({name: column for name, column in (usual | columns).items() if column})
    rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_a_folder_is_read_and_a_missing_validation_split_is_made_from_train(tmp_path: Path) -> None:
    folder = written(tmp_path)
    written(tmp_path, "test", values=[[9.0, 8.0, 7.0]], label=["b"])
    data = load_data(folder)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 18, "validation": 2, "test": 1}
    assert data.label_names == ["a", "b"]
    assert data.splits["test"]["labels"][:].tolist() == [1]
    assert data.splits["test"]["values"][:].tolist() == [[9.0, 8.0, 7.0]]
    for row in [*data.splits["train"], *data.splits["validation"]]:
        assert row["labels"] == (row["values"][0] + 1) % 2, "a label stays with its signal"
    assert load_data(folder).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"values": []}, "no column 'values'"),
        ({"values": [[1.0]] * 19 + [[1.0, 2.0]]}, "of one length"),
        ({"values": [[1.0]] * 19 + [[float("nan")]]}, "all finite"),
        ({"label": ["a"] * 20}, "every label of train in column 'label' is 'a'"),
        ({"label": [None] * 20}, "holds no labels"),
    ],
)
def test_bad_data_are_rejected(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(written(tmp_path, "train", **columns))


def test_a_row_without_a_label_is_left_out_and_noted(tmp_path: Path) -> None:
    written(tmp_path, "validation")
    data = load_data(written(tmp_path, label=["a", None, "b", "b"] * 5))
    assert data.splits["train"]["values"][:][:, 0].tolist() == [i for i in range(20) if i % 4 != 1]
    assert "5 of 20 rows of train have no label and are left out" in data.notes


def test_labels_that_train_lacks_are_rejected(tmp_path: Path) -> None:
    written(tmp_path, "validation", label=["c"] * 20)
    with pytest.raises(UserError, match="no label of validation \\(c\\) occurs in train"):
        load_data(written(tmp_path))


def test_the_tones_are_the_same_every_time_and_their_splits_differ() -> None:
    first, again = tones(), tones()
    assert all(first[split][0] == again[split][0] for split in first)
    assert first["validation"][0]["values"] != first["test"][0]["values"]


def test_logits_do_not_depend_on_the_other_signals_of_a_batch(finished: Path) -> None:
    model, rows = Classifier.from_pretrained(finished / "student"), load_data("tones").splits["test"]
    together = torch.from_numpy(predict(model, rows))[:3]
    alone = torch.cat([model.eval()(rows[i : i + 1]["values"]).logits for i in range(3)])
    torch.testing.assert_close(together, alone.detach(), rtol=1e-4, atol=1e-5)
