"""The image scripts end to end on the embedded digits: methods, resume, evaluation, loading, sweeps, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel

from kd.common.reporting.results import validate
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.data.sources import embedded_digits
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)
from kd.image_classification.student_model.evaluation import predict
from kd.image_classification.student_model.sweep import Student
from kd.image_classification.student_model.sweep_report import compare_students, table_on_test
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.teacher import load_trained
from kd_testing.image_files import draw
from kd_testing.paths import REPO
from kd_testing.processes import run_code
from kd_testing.readmes import code_of
from kd_testing.scripts import run_script
from kd_testing.verdicts import check_verdict, check_verdict_over_seeds

pytestmark = pytest.mark.usefixtures("digits_once")
SCRIPTS = REPO / "image-classification" / "scripts"
SHORT = ["--dataset", "digits", "--max_train_samples", 256, "--num_train_epochs", 1, "--report_to", "none"]
PAIR = ["--student", "resnet8"]


def script(name: str, *words: object) -> None:
    run_script(f"image-classification/scripts/{name}", *words)


def results_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    validate(results)
    return results


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """The run of a teacher trained on the embedded digits."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    script("train_teacher.py", "--dataset", "digits", "--architecture", "resnet8x2", "--num_train_epochs", 4,
           "--learning_rate", 0.05, "--report_to", "none", "--output_dir", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def simkd(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simkd") / "run"
    script("train_simkd.py", *SHORT, *PAIR, "--teacher", teacher, "--output_dir", folder)
    return folder


def test_teacher_run_is_accurate_and_reported(teacher):
    results = results_of(teacher)
    assert results["models"]["teacher"]["metrics"]["validation"]["accuracy"] > 0.9
    assert results["models"]["student"] is None and results["retention"] is None
    assert results["data"] == {"train": 1294, "validation": 144, "test": 359, **results["data"]}
    for name in ("report.md", "curves.png", "recipe.yaml", "stages/teacher/model.safetensors"):
        assert (teacher / name).exists()


def test_simkd_trains_and_reports_student_and_control(simkd, teacher):
    results = results_of(simkd)
    models = results["models"]
    assert models["teacher"]["parameters"] > 2 * models["student"]["parameters"]
    assert models["control"]["parameters"] == models["student"]["parameters"]
    assert results["retention"] == pytest.approx(
        models["student"]["metrics"]["validation"]["accuracy"] / models["teacher"]["metrics"]["validation"]["accuracy"]
    )
    check_verdict(results)
    parts = results["parameters_of_parts"]["student"]
    assert parts["backbone"] + parts["projector"] + parts["head"] == models["student"]["parameters"]
    assert "agreement" in models["student"]["metrics"]["test"]
    student, teacher_weights = weights(simkd), load_file(teacher / "stages" / "teacher" / "model.safetensors")
    assert torch.equal(student["head.weight"], teacher_weights["head.weight"]), "the teacher's head must not change"
    assert "projector" in (simkd / "report.md").read_text()


LOAD = """
import sys, json, torch, common
from PIL import Image
from transformers import AutoImageProcessor
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.data.sources import embedded_digits
from kd.image_classification.student_model.evaluation import predict
model = ImageClassifier.from_pretrained(sys.argv[1]).eval()
data = load_image_data("digits")
torch.save(torch.from_numpy(predict(model, data, "test")), sys.argv[2])
picture = Image.fromarray(data.splits["test"].pixels[0, :, :, 0].numpy()).convert("RGB")
pixels = AutoImageProcessor.from_pretrained(sys.argv[1])(picture, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    torch.save(model(pixels).logits, sys.argv[3])
"""


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "new"])
def test_a_student_loaded_in_another_process_returns_the_same_logits(simkd, tmp_path, fork):
    """Logits are equal bit by bit, and the saved image processor returns the pixels that training used."""
    outputs = tmp_path / "all.pt", tmp_path / "one.pt"
    run_code(LOAD, simkd / "student", *outputs, fork=fork)
    here = torch.from_numpy(
        predict(ImageClassifier.from_pretrained(simkd / "student"), load_image_data("digits"), "test")
    )
    there, one = (torch.load(path, weights_only=True) for path in outputs)
    assert torch.equal(here, there)
    torch.testing.assert_close(one[0], there[0], rtol=1e-3, atol=1e-3)
    labels = load_image_data("digits").splits["test"].labels
    reported = results_of(simkd)["models"]["student"]["metrics"]["test"]["accuracy"]
    assert (there.argmax(1) == labels).double().mean().item() == pytest.approx(reported, abs=1e-12)


def test_evaluate_reproduces_the_reported_metrics(simkd, tmp_path, capsys):
    script("evaluate.py", simkd / "student", "--dataset", "digits", "--json", tmp_path / "metrics.json")
    again = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["test"]
    reported = results_of(simkd)["models"]["student"]["metrics"]["test"]
    assert again == {name: value for name, value in reported.items() if name != "agreement"}


def test_a_run_is_evaluated_on_its_own_data_with_a_file_of_predictions(simkd, tmp_path, capsys):
    script("evaluate.py", simkd, "--json", tmp_path / "m.json", "--predictions", tmp_path / "p.csv")
    assert "note: --dataset digits --validation_share 0.1, from " in capsys.readouterr().out
    reported = results_of(simkd)["models"]["student"]["metrics"]
    found = pandas.read_csv(tmp_path / "p.csv")
    source = embedded_digits()
    for split, rows in found.groupby("split"):
        assert (rows.label == rows.prediction).mean() == pytest.approx(reported[split]["accuracy"], abs=1e-12)
        stored = source["train" if split == "validation" else "test"].select_columns(["label"])
        assert stored[rows.row.tolist()]["label"] == rows.label.tolist()  # validation was set aside from train
    assert set(found.split) == {"validation", "test"}


def test_the_code_of_the_model_card_loads_the_student(simkd, tmp_path, monkeypatch, capsys):
    shutil.copytree(simkd / "student", tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), "red").save("image.png")
    exec(code_of(tmp_path / "student"), {})
    assert capsys.readouterr().out.strip() in map(str, range(10))
    text = (tmp_path / "student" / "README.md").read_text()
    card = ModelCard(text).data
    assert card.pipeline_tag == "image-classification" and card.library_name is None and card.base_model is None
    assert {result.dataset_split for result in card.eval_results} == {"validation", "test"}
    assert "The code needs `kd`" in text and str(simkd.parent) not in text


@pytest.mark.parametrize(
    "words",
    [
        ["--projector", "multi", "--feature_loss", "kl-channel", "--use_labels"],
        ["--projector", "all-layer", "--feature_loss", "cosine", "--cls_weight", 1, "--kl_weight", 1],
    ],
)
def test_variants_of_simkd_train(words, teacher, tmp_path):
    script(
        "train_simkd.py", *SHORT, *PAIR, "--teacher", teacher, "--no_control", "--output_dir", tmp_path / "r", *words
    )
    results = results_of(tmp_path / "r")
    assert results["method"] == f"simkd_{words[1]}" and results["models"]["control"] is None
    logged = json.loads((tmp_path / "r" / "stages" / "student" / "stage.json").read_text())["history"][0]
    assert logged["loss"] == pytest.approx(sum(v for k, v in logged.items() if k.startswith("loss_")), rel=1e-3)
    assert ("masked_share" in logged) == ("--use_labels" in words)


@pytest.mark.parametrize("method", ["none", "kd", "fitnet", "attention"])
def test_methods_train_a_plain_student(method, teacher, tmp_path):
    words = [] if method == "none" else ["--teacher", teacher]
    words += ["--teacher_views", tmp_path / "views"] if method == "kd" else []
    script("train_student.py", *SHORT, *PAIR, "--method", method, "--output_dir", tmp_path / "r", *words)  # fmt: skip
    results = results_of(tmp_path / "r")
    assert results["method"] == method
    assert (results["gain_over_control"] is None) == (method == "none")
    assert (tmp_path / "views").exists() == (method == "kd")


def test_two_momentums_train_another_student_and_the_same_control(teacher, tmp_path):
    for name, words in (("sgd", []), ("dot", ["--dot_delta", 0.075])):
        script("train_student.py", *SHORT, *PAIR, "--teacher", teacher, *words, "--output_dir", tmp_path / name)
    differs = []
    for stage in ("control", "student"):
        sgd, dot = (load_file(tmp_path / run / "stages" / stage / "model.safetensors") for run in ("sgd", "dot"))
        differs.append(any(not torch.equal(weight, dot[key]) for key, weight in sgd.items()))
    assert differs == [False, True]
    assert "dot_delta: 0.075" in (tmp_path / "dot" / "recipe.yaml").read_text()


def test_the_logits_of_ensemble_teachers_are_averaged(teacher, tmp_path, capsys):
    """The same teacher twice equals that teacher at twice the cost; methods with features reject ensembles."""
    words = [*SHORT, *PAIR, "--no_control", "--teacher", teacher]
    script("train_student.py", *words, "--method", "kd", "--output_dir", tmp_path / "one")
    assert f"student: {tmp_path / 'one' / 'student'}\nreport:  " in capsys.readouterr().out
    script(
        "train_student.py", *words, "--method", "kd", "--ensemble_teachers", teacher, "--ensemble_weights", 2, 2,
        "--output_dir", tmp_path / "two",
    )  # fmt: skip
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    for split, metrics in one["models"]["teacher"]["metrics"].items():
        assert two["models"]["teacher"]["metrics"][split] == pytest.approx(metrics)
    assert two["models"]["teacher"]["parameters"] == 2 * one["models"]["teacher"]["parameters"]
    assert two["models"]["teacher"]["name"] == f"{teacher} + {teacher}"
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-4)
    other = tmp_path / "other"
    shutil.copytree(teacher / "stages" / "teacher", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"mean": [0.5]}))
    for method, more, message in (("sp", teacher, "needs a single teacher"), ("kd", other, "another normalization"),
                                  ("kd", "resnet8", "is not a trained classifier")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            script("train_student.py", *words, "--method", method, "--ensemble_teachers", more, "--output_dir",
                   tmp_path / "rejected")  # fmt: skip
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "rejected").exists()


def test_a_student_with_counted_values(teacher, tmp_path):
    script("distill_bottleneck.py", *SHORT, *PAIR, "--teacher", teacher, "--keys", "new", "--codebook_size", 16,
           "--values", "counted", "--decoder", "mean", "--no_control", "--output_dir", tmp_path)  # fmt: skip
    counts = weights(tmp_path)["head.label_counts"]
    assert (counts.sum((1, 2)) == results_of(tmp_path)["data"]["train"]).all()

    images = load_image_data("digits", max_train_samples=256).splits["train"][torch.arange(30)]
    for row, (picture, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        folder = tmp_path / "forget" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.squeeze(-1).numpy()).save(folder / f"{row}.png")
    script("forget.py", tmp_path, "--examples", tmp_path / "forget", "--output_dir", tmp_path / "less")
    removed = counts - load_file(tmp_path / "less" / "model.safetensors")["head.label_counts"]
    assert torch.equal(removed.sum(1), torch.bincount(images.labels, minlength=10).int().expand(len(counts), -1))
    script("forget.py", tmp_path, "--classes", "3", "--output_dir", tmp_path / "without")
    assert not load_file(tmp_path / "without" / "model.safetensors")["head.label_counts"][..., 3].any()


@pytest.mark.parametrize("keys", ["carried", "new", "reused"])
def test_distilling_a_bottleneck_into_a_bottleneck(keys, teacher, tmp_path, monkeypatch):
    words = [*SHORT, *PAIR, "--teacher", teacher, "--keys", keys, "--codebook_size", 16, "--codebooks", 16,
             "--value_epochs", 2, "--no_control", "--output_dir", tmp_path]  # fmt: skip
    script("distill_bottleneck.py", *words)
    results = results_of(tmp_path)
    assert results["method"] == f"keys_{keys}" and results["parameters_of_parts"]["student"]["head"] > 0
    student = weights(tmp_path)
    teacher_weights = load_file(tmp_path / "stages" / "teacher" / "model.safetensors")
    aligned = load_file(tmp_path / "stages" / "student_encoder" / "model.safetensors")
    assert torch.equal(student["head.keys"], teacher_weights["head.keys"]) == (keys != "new")
    assert torch.equal(student["head.values"], teacher_weights["head.values"]) == (keys == "reused")
    with pytest.raises(SystemExit) as stopped:
        script("distill_bottleneck.py", *SHORT, *PAIR, "--teacher", tmp_path / "stages" / "teacher", "--output_dir",
               tmp_path / "again")  # fmt: skip
    assert stopped.value.code == 2
    if keys == "carried":
        for finished in ("student", "stages/student"):
            shutil.rmtree(tmp_path / finished)
        (tmp_path / "results.json").unlink()
        monkeypatch.setattr("kd.common.bottleneck.training.run_inference", None)  # codes are read, not computed
        script("distill_bottleneck.py", *words, "--resume_from_checkpoint")
        assert all(torch.equal(weights(tmp_path)[name], weight) for name, weight in student.items())
        assert results_of(tmp_path)["bytes"]["student"] == results["bytes"]["student"]
    for name in aligned:  # the backbone is frozen, including its batch norms
        assert name.startswith("head.") or torch.equal(student[name], aligned[name]), name


def test_an_invalid_bottleneck_is_rejected_before_training(teacher, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("distill_bottleneck.py", *SHORT, *PAIR, "--teacher", teacher, "--codebooks", 7, "--output_dir",
               tmp_path / "run")  # fmt: skip
    assert stopped.value.code == 2 and "7 codebooks do not divide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_one_student(teacher, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [SCRIPTS / "train_simkd.py", *SHORT, *PAIR, "--teacher", teacher, "--output_dir", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert results_of(tmp_path / "run")["models"]["student"]["metrics"]["test"]["accuracy"] > 0


@pytest.mark.slow
def test_runs_of_several_seeds_share_the_teacher(tmp_path, capsys):
    words = [*SHORT, *PAIR, "--teacher", "resnet8"]
    script("train_student.py", *words, "--seeds", "3,4", "--output_dir", tmp_path / "several")
    results, each = results_of(tmp_path / "several"), [results_of(tmp_path / "several" / f"seed{s}") for s in (3, 4)]
    assert results["seeds"] == [3, 4] and [run["seed"] for run in each] == [3, 4]
    check_verdict_over_seeds(results, each)
    scores = [run["models"]["student"]["metrics"]["test"]["accuracy"] for run in each]
    assert results["models"]["student"]["metrics"]["test"]["accuracy"] == pytest.approx(sum(scores) / 2)
    assert [path.parent.parent.name for path in (tmp_path / "several").rglob("stages/teacher")] == ["several"]
    script("train_student.py", *words, "--seed", 3, "--output_dir", tmp_path / "alone")
    for folder in ("several", "several/seed3"):
        assert all(torch.equal(w, weights(tmp_path / "alone")[k]) for k, w in weights(tmp_path / folder).items())
    shutil.rmtree(tmp_path / "several" / "seed4")  # as if killed before this seed
    (tmp_path / "several" / "results.json").unlink()
    script("train_student.py", *words, "--seeds", "3,4", "--output_dir", tmp_path / "several",
           "--resume_from_checkpoint")  # fmt: skip
    assert results_of(tmp_path / "several")["models"]["student"]["metrics"] == results["models"]["student"]["metrics"]


def test_the_seed_determines_the_student(teacher, simkd, tmp_path):
    for name, seed in (("same", 0), ("other", 7)):
        script("train_simkd.py", *SHORT, *PAIR, "--teacher", teacher, "--no_control", "--seed", seed,
               "--output_dir", tmp_path / name)  # fmt: skip
    same, other = weights(tmp_path / "same"), weights(tmp_path / "other")
    assert all(torch.equal(value, same[key]) for key, value in weights(simkd).items())
    assert not torch.equal(other["backbone.conv1.weight"], same["backbone.conv1.weight"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_student(teacher, tmp_path):
    """SIGKILL during the training of the student, after a checkpoint."""
    words = [*SHORT, *PAIR, "--teacher", teacher, "--no_control", "--projector", "all-layer", "--num_train_epochs", 8]
    script("train_simkd.py", *words, "--output_dir", tmp_path / "whole")
    command = [sys.executable, SCRIPTS / "train_simkd.py", *words, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    checkpoints = tmp_path / "killed" / "checkpoints" / "student"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/SHA256SUMS")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    script("train_simkd.py", *words, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint")
    resumed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


@pytest.mark.slow
def test_a_sweep_trains_each_student_once(teacher, tmp_path, capsys):
    common = [*SHORT, *PAIR, "--teacher", teacher, "--seeds", 0, "--output_dir", tmp_path / "s"]
    words = [*common, "--projectors", "single", "all-layer"]
    script("sweep.py", *words, "--learning_rates", 0.05)
    students = tmp_path / "s" / "seed0" / "students"
    before = {path: path.stat().st_mtime_ns for path in students.glob("*/results.json")}
    assert len(before) == 3
    script("sweep.py", *words, "--learning_rates", 0.05, 0.01, "--methods", "none", "control", "kd", "simkd")
    assert "3 of 10 students are already finished" in capsys.readouterr().out
    assert len(list(students.glob("*/results.json"))) == 10
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    stages = set((tmp_path / "s" / "seed0" / "stages").iterdir())
    shutil.rmtree(students / "kd_lr0.05")  # as if killed between the writing of two students
    script("sweep.py", *words, "--learning_rates", 0.05, 0.01, "--methods", "none", "control", "kd", "simkd")
    assert set((tmp_path / "s" / "seed0" / "stages").iterdir()) == stages and (students / "kd_lr0.05").exists()
    card = (students / "none_lr0.05" / "student" / "README.md").read_text()
    assert "trained on the labels alone" in card and "distilled from" not in card
    results = results_of(students / "simkd_single_l2_lr0.05")
    control = results_of(students / "control_lr0.05")["models"]["student"]["metrics"]["validation"]["accuracy"]
    student = results["models"]["student"]["metrics"]["validation"]["accuracy"]
    assert results["gain_over_control"] == pytest.approx(student - control)
    assert results["seed"] == 0 and results["seconds"]["student"] > 0
    table, *notes = (tmp_path / "s" / "sweep.md").read_text().split("\n\n")
    assert table.count("\n") == 11 and notes[-1] == "The variation over seeds cannot be estimated from one seed.\n"
    check_verdict(results)
    check_verdict(results_of(students / "kd_lr0.05"))  # its control was evaluated by another process
    word = results["verdict"]["control"]["word"].removesuffix(" (one seed)")
    assert any("simkd single l2 at 0.05" in note and word in note.lower() for note in notes)
    assert (tmp_path / "s" / "sweep.png").exists()
    with pytest.raises(SystemExit) as stopped:
        script("sweep.py", *words, "--learning_rates", 0.05, "--projector_factor", 4)
    assert stopped.value.code == 2 and "projector_factor (was 2, now 4)" in capsys.readouterr().err
    over = ["--projector_factor", 4, "--methods", "none", "--overwrite_output_dir"]
    script("sweep.py", *common, "--learning_rates", 0.05, *over)
    assert [path.parent.name for path in students.glob("*/results.json")] == ["none_lr0.05"]


def test_a_sweep_accepts_more_seeds_and_shares_its_teacher(tmp_path, capsys):
    words = [*SHORT, *PAIR, "--teacher", "resnet8", "--methods", "none,kd,kd:alpha=0.5", "--output_dir", tmp_path]
    script("train_student.py", *words, "--seeds", 1)
    before = weights(tmp_path / "seed1" / "students" / "kd_lr0.1")
    script("train_student.py", *words, "--seeds", "0,1")
    assert "3 of 6 students are already finished" in capsys.readouterr().out
    assert [path.parent.parent.name for path in tmp_path.rglob("stages/teacher")] == [tmp_path.name]
    assert all(torch.equal(w, before[name]) for name, w in weights(tmp_path / "seed1/students/kd_lr0.1").items())
    check_test_table(tmp_path)


def check_test_table(folder: Path) -> None:
    """The gains on test and their intervals are those of a paired t-test of scipy."""
    accuracy = {
        name: [
            results_of(folder / f"seed{seed}/students/{name}_lr0.1")["models"]["student"]["metrics"]["test"][
                "accuracy"
            ]
            for seed in (0, 1)
        ]
        for name in ("none", "kd", "kd_alpha_0_5")
    }
    rows = (folder / "sweep.md").read_text().split("On test")[1].split("\n\n")[1].splitlines()[2:]
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ") for row in rows}
    assert cells["none"][3:5] == ["–", "–"] and cells["kd"][4] == "–"
    for column, other in ((3, "none"), (4, "kd")):
        found = ttest_rel(accuracy["kd_alpha_0_5"], accuracy[other])
        interval = found.confidence_interval(0.95)
        gain = np.mean(accuracy["kd_alpha_0_5"]) - np.mean(accuracy[other])
        assert cells["kd:alpha=0.5"][column] == f"{gain:.4f} ({interval.low:.4f} to {interval.high:.4f})"


def test_the_test_table_leaves_out_a_figure_that_a_student_does_not_have():
    """Logits that are NaN after the last update have no calibration error."""
    students, results = [Student(method, None, None, 0.1) for method in ("none", "kd")], {}
    for seed in (0, 1):
        for student in students:
            metrics = {"accuracy": 0.5 + seed / 4, "agreement": 0.5, "ece": 0.1}
            metrics = {k: v for k, v in metrics.items() if k != "ece" or (student.method, seed) != ("kd", 1)}
            results[student, seed] = {"models": {"student": {"metrics": {"test": metrics}}}}
    header, (none, kd) = table_on_test(results)
    assert none[-1] == "0.1000 ± 0.0000" and kd[-1] == "0.1000 (n=1)" and len(kd) == len(header)
    assert kd[2] == none[2] == "0.6250 ± 0.1768"


@pytest.mark.slow
def test_a_diverged_student_is_reported_and_leaves_the_others_unaffected(teacher, tmp_path, capsys):
    words = [*SHORT, *PAIR, "--teacher", teacher, "--seeds", "0,1"]
    methods, infinite = "kd,kd:temperature=2", "fitnet:weight=1e39"  # infinite in single precision
    script("train_student.py", *words, "--methods", methods, "--output_dir", tmp_path / "finite")
    diverging = [*words, "--methods", f"{methods},{infinite}", "--output_dir", tmp_path / "diverging"]
    script("train_student.py", *diverging)
    capsys.readouterr()
    script("train_student.py", *diverging)
    assert "8 of 8 students are already finished" in capsys.readouterr().out, "a diverged student is not trained again"
    for student in (tmp_path / "finite").glob("seed*/students/*"):
        found = weights(tmp_path / "diverging" / student.relative_to(tmp_path / "finite"))
        assert all(torch.equal(found[name], weight) for name, weight in weights(student).items())
    folder = tmp_path / "diverging"
    diverged = {path.parent.relative_to(folder): path.read_text() for path in tmp_path.rglob("diverged.json")}
    expected = [Path(f"seed{seed}/students/fitnet_weight_1e39_lr0.1") for seed in (0, 1)]
    assert diverged == dict.fromkeys(expected, '{\n  "epoch": 1\n}\n')
    assert not list(folder.glob("seed*/students/fitnet*/student"))
    finite, report = ((tmp_path / run / "sweep.md").read_text() for run in ("finite", "diverging"))
    seeds = "seed 0 in epoch 1, seed 1 in epoch 1"
    note = f"Diverged (the loss is not finite) and left out: {infinite} at 0.1 ({seeds})."
    assert [line.rsplit("|", 2)[0] for line in report.splitlines()] == [
        line.rsplit("|", 2)[0] for line in [*finite.splitlines(), "", note]
    ]
    with pytest.raises(SystemExit) as stopped:
        script("sweep.py", *SHORT, *PAIR, "--teacher", teacher, "--methods", infinite, "--learning_rates", 0.05,
               "--output_dir", tmp_path / "all")  # fmt: skip
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: the loss of each student is not finite: fitnet")


def test_students_of_a_sweep_are_compared_over_seeds():
    """Of three seeds: kd gains 3, 4 and 5 points over the control, dkd 4, 3.5 and 4, fitnet -1, 1 and 3."""
    found: dict[tuple[Student, int], dict[str, Any]] = {}
    for method, scores in {
        "none": [0.60, 0.61, 0.62],
        "kd": [0.63, 0.65, 0.67],
        "dkd": [0.64, 0.645, 0.66],
        "fitnet": [0.59, 0.62, 0.65],
    }.items():
        for seed, (score, control) in enumerate(zip(scores, [0.60, 0.61, 0.62], strict=True)):
            found[Student(method, None, None, 0.1), seed] = {
                "models": {"student": {"metrics": {"validation": {"accuracy": score}}, "parameters": 1}},
                "gain_over_control": None if method == "none" else score - control,
                "verdict": {"control": {"gain": score - control, "interval": None, "seeds": 1}},
            }
    rule = "Verdicts on validation accuracy, by 95% intervals: paired t over the seeds."
    assert compare_students(found, "validation") == [
        rule,
        "Better than the control: kd at 0.1, dkd at 0.1.",
        "No difference shown to the control: fitnet at 0.1.",
        "No difference shown to the best, kd at 0.1: dkd at 0.1.",
    ]
    students = {key: one | {"verdict": None} for key, one in found.items() if key[0].method != "none"}
    assert compare_students(students, "validation") == [
        rule,
        "Without a control: kd at 0.1, dkd at 0.1, fitnet at 0.1.",
        "No difference shown to the best, kd at 0.1: dkd at 0.1.",
    ]


@pytest.mark.slow
def test_a_student_of_a_sweep_equals_the_same_student_trained_alone(teacher, tmp_path):
    common = [*SHORT, *PAIR, "--teacher", teacher, "--num_train_epochs", 2]
    script("sweep.py", *common, "--projectors", "multi", "single", "--learning_rates", 0.05, "--seeds", 3,
           "--output_dir", tmp_path / "s")  # fmt: skip
    script("train_simkd.py", *common, "--projector", "multi", "--learning_rate", 0.05, "--seed", 3,
           "--output_dir", tmp_path / "alone")  # fmt: skip
    together, alone = weights(tmp_path / "s/seed3/students/simkd_multi_l2_lr0.05"), weights(tmp_path / "alone")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_methods_side_by_side_equal_each_method_alone(teacher, tmp_path):
    """The methods include some with auxiliary parameters or a memory of samples."""
    common = [*SHORT, *PAIR, "--teacher", teacher, "--num_train_epochs", 2, "--no_control", "--learning_rate", 0.01]
    names = ["vid", "ctkd", "crd", "semckd"]
    script("train_student.py", *common, "--methods", ",".join(names), "--seeds", "3", "--output_dir", tmp_path / "s")
    for name in names:
        script("train_student.py", *common, "--method", name, "--seed", 3, "--output_dir", tmp_path / name)
        together, alone = weights(tmp_path / "s" / "seed3" / "students" / f"{name}_lr0.01"), weights(tmp_path / name)
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


def test_several_methods_share_a_table_of_views_and_end_in_one_table(teacher, tmp_path, capsys):
    words = [*SHORT, *PAIR, "--teacher", teacher, "--methods", "kd,kd:temperature=2", "--seeds", "0,1"]
    script("train_student.py", *words, "--teacher_views", tmp_path / "views", "--output_dir", tmp_path / "s")
    students = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("s/seed*/students/*/results.json")}
    names = "none", "kd", "kd_temperature_2"
    assert students == {f"s/seed{seed}/students/{name}_lr0.1" for name in names for seed in (0, 1)}
    assert list((tmp_path / "views").rglob("logits.f16")) and (tmp_path / "s" / "sweep.png").exists()
    assert results_of(tmp_path / "s/seed1/students/kd_lr0.1")["gain_over_control"] is not None


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_simkd.py", ["--teacher", "resnet33"], "unknown architecture 'resnet33'"),
        ("train_simkd.py", ["--student", "nonsense"], "unknown architecture 'nonsense'"),
        ("train_simkd.py", ["--projector", "double"], "invalid choice: 'double'"),
        ("train_simkd.py", ["--projector_factor", "3"], "does not divide the teacher's"),
        ("train_simkd.py", ["--feature_weight", "0", "--kl_weight", "0"], "not all be zero"),
        ("train_simkd.py", ["--dataset", "nowhere"], "unknown dataset 'nowhere'"),
        ("train_student.py", ["--method", "fitnet", "--teacher_views", "v"], "caches only logits"),
        ("train_simkd.py", ["--lr_milestones", "1", "--max_steps", "5"], "--lr_milestones are epochs"),
        ("train_simkd.py", ["--teacher", "runs/nowhere"], "no model runs/nowhere: it is not a folder"),
        ("train_simkd.py", ["--per_device_train_batch_size", "100"], "do not fill a batch of 100"),
        ("train_simkd.py", ["--validation_share", "0.9999"], "10 training images do not fill a batch of 32"),
        ("train_simkd.py", ["--validation_share", "1e-5"], "too few training rows to set 0.001% of them aside"),
        ("train_student.py", ["--teacher_views", "/dev/null/x"], "--teacher_views /dev/null/x cannot be written"),
        ("train_student.py", ["--student", "vgg8", "--image_size", "4"], "vgg8 does not support images of 4 pixels"),
        ("train_student.py", ["--seed", "-1"], "--seed must be between 0"),
        ("train_student.py", ["--method", "dkd", "--temperature", "2"], "--temperature applies to plain kd only"),
        ("train_student.py", ["--method", "kd:alpha=0.5", "--alpha", "0.2"], "--alpha applies to plain kd only"),
        ("train_student.py", ["--method", "lskd:alpha=0:weight=0"], "at least one term"),
        ("sweep.py", ["--load_best_model_at_end", "true"], "needs --metric_for_best_model"),
        ("sweep.py", ["--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy"], "leave out --load"),
        ("train_teacher.py", ["--label_smoothing_factor", "0.1"], "leave it at 0"),
        ("train_student.py", ["--method", "fitnet:wait=2"], "did you mean weight?"),
        ("train_student.py", ["--methods", "kd,kdd"], "there is no method 'kdd'"),
        ("train_student.py", ["--methods", "kd,kd:alpha=0.1"], "kd and kd:alpha=0.1 are the same method"),
        ("train_student.py", ["--methods", "dkd,dkd:beta=6", "--method_args", "dkd:beta=6"], "name it once"),
        ("sweep.py", ["--methods", "dkd", "dkd:beta=8.0"], "dkd and dkd:beta=8.0 are the same method"),
        ("train_student.py", ["--method", "dkd:beta=2:beta=3"], "beta is set twice"),
        ("train_student.py", ["--method", "kd:temperature=inf"], "temperature must be above 0, got inf"),
        ("train_student.py", ["--method_args", "dkd:beta=nan"], "beta must be at least 0, got nan"),
        (
            "train_student.py",
            ["--per_device_train_batch_size", "63", "--dataloader_drop_last", "false"],
            "64 training images leave a last batch of one image",
        ),
        ("train_student.py", ["--methods", "kd", "--seeds", "one"], "invalid int value: 'one'"),
        ("train_student.py", ["--method", "kd", "--seeds", "0,0"], "must be different seeds"),
        ("train_student.py", ["--method", "fitnet", "--feature_weight", "10"], "fitnet:weight=10"),
        ("train_student.py", ["--alpha", "2"], "--alpha must be between 0 and 1"),
        ("sweep.py", ["--learning_rates", "0.1", "0.1"], "none twice"),
        ("sweep.py", ["--methods", "kdd"], "there is no method 'kdd'"),
        ("sweep.py", ["--max_grad_norm", "1"], "leave --max_grad_norm at 0"),
        ("train_student.py", ["--dot_delta", "0.2"], "--dot_delta must be at most 0.9 and below 0.1"),
        ("train_student.py", ["--dot_delta", "0.05", "--method", "kd:alpha=0"], "or give the labels a weight"),
        ("train_teacher.py", ["--lerning_rate", "1"], "did you mean --learning_rate?"),
        ("evaluate.py", ["nowhere"], "no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(name, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [] if name == "evaluate.py" else [*SHORT, "--max_train_samples", 64]
    with pytest.raises(SystemExit) as stopped:
        script(name, *few, *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error:") and message in error
    assert not list(tmp_path.rglob("*.*"))


def test_a_folder_of_new_images_is_evaluated_by_class_name(teacher, tmp_path, capsys):
    """Digits of two of the ten classes, saved in folders, are classified as accurately as in the run."""
    test = load_image_data("digits").splits["test"]
    chosen = [row for row, label in enumerate(test.labels.tolist()) if label in (3, 7)]
    for row in chosen:
        picture = Image.fromarray(test.pixels[row, :, :, 0].numpy())
        draw(tmp_path / "new" / str(test.labels[row].item()) / f"{row}.png", picture)
    (tmp_path / "new" / "notes.txt").write_text("")
    script("evaluate.py", teacher, "--dataset", tmp_path / "new", "--json", tmp_path / "metrics.json")
    output, metrics = capsys.readouterr().out, json.loads((tmp_path / "metrics.json").read_text())
    model = ImageClassifier.from_pretrained(teacher / "stages" / "teacher")
    logits = predict(model, load_image_data("digits"), "test")[chosen]
    accuracy = (logits.argmax(1) == test.labels[chosen].numpy()).mean()
    assert metrics["metrics"].keys() == {"test"}
    assert metrics["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    for note in ("files that are not images, left out: 1 (notes.txt)", "in test: 8 of 10 (0, 1, 2, 4, 5, ...)"):
        assert note in output and any(note in line for line in metrics["data_notes"])
    (tmp_path / "new" / "7").rename(tmp_path / "new" / "seven")
    with pytest.raises(SystemExit) as stopped:
        script("evaluate.py", teacher, "--dataset", tmp_path / "new")
    assert stopped.value.code == 2 and "label 'seven' (" in capsys.readouterr().err


def test_a_damaged_teacher_is_one_line(teacher, tmp_path, capsys):
    stage = teacher / "stages" / "teacher"
    (tmp_path / "config.json").write_bytes((stage / "config.json").read_bytes())
    for content in (None, (stage / "model.safetensors").read_bytes()[:1000]):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            script("evaluate.py", tmp_path, "--dataset", "digits")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith(
            f"error: cannot read an image classifier of this project from {tmp_path}: "
        )


def modified(teacher: Path, folder: Path, change: Any) -> Path:
    """A copy of the trained teacher; `change` maps its weights to new weights."""
    shutil.copytree(teacher / "stages" / "teacher", folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_teachers_load_in_fp32_and_without_a_wrapper_prefix(teacher, tmp_path):
    changes = {
        "half": lambda w: {name: t.half() if t.is_floating_point() else t for name, t in w.items()},
        "wrapped": lambda w: {f"module.{name}": t for name, t in w.items()},
    }
    data = DataArguments("digits").load()
    original = load_trained(teacher / "stages" / "teacher", data)[0].state_dict()
    for name, change in changes.items():
        model, _ = load_trained(modified(teacher, tmp_path / name, change), data)
        for key, tensor in model.state_dict().items():
            expected = original[key].half().float() if name == "half" and tensor.is_floating_point() else original[key]
            assert torch.equal(tensor, expected), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {name: t for name, t in w.items() if "head" not in name}, "missing: head.bias, head.weight"),
        (lambda w: w | {"other.weight": torch.zeros(2)}, "unknown: other.weight"),
        (lambda w: w | {"head.weight": torch.zeros(3, 5)}, "of another size: head.weight (3, 5)"),
    ],
)
def test_a_teacher_whose_weights_do_not_fit_is_rejected(teacher, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load_trained(modified(teacher, tmp_path / "teacher", change), DataArguments("digits").load())
    assert f"the weights of {tmp_path}"[:60] in str(caught.value) and message in str(caught.value)


def test_a_teacher_at_chance_level_is_reported_before_distillation(teacher, tmp_path, capsys):
    def constant(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return weights | {"head.weight": torch.zeros_like(weights["head.weight"])}  # the same logits for each image

    folder = modified(teacher, tmp_path / "teacher", constant)
    words = [*SHORT, *PAIR, "--no_control", "--num_train_epochs", 1]
    script("train_student.py", *words, "--teacher", folder, "--output_dir", tmp_path / "run")
    [warning] = results_of(tmp_path / "run")["warnings"]
    assert warning.startswith(f"teacher {folder} is no better than chance: its validation accuracy is ")
    assert f"warning: {warning}" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.md").read_text().count(f"**Warning:** {warning}") == 1
    verdict = results_of(tmp_path / "run")["verdict"]
    assert verdict["warnings"][0] == warning and verdict["control"] is None


def test_a_file_as_teacher_is_rejected(tmp_path, capsys):
    torch.save({}, tmp_path / "teacher.pth")
    for name, message in ((tmp_path / "teacher.pth", "is a file: pass --teacher FILE --teacher_architecture NAME"),
                          ("/" + "y" * 400, "File name too long")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            script("train_simkd.py", *SHORT, *PAIR, "--teacher", name, "--output_dir", tmp_path / "run")
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_teacher_of_other_labels_or_another_size_is_rejected(teacher, tmp_path, capsys):
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in (teacher / "stages" / "teacher").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    cases = {
        "has 10 labels": {"id2label": {str(i): f"c{i}" for i in range(10)}},
        "pass --image_size 16": {"image_size": 16},
    }
    for message, change in cases.items():
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(SystemExit) as stopped:
            script("train_simkd.py", *SHORT, *PAIR, "--teacher", copy, "--output_dir", tmp_path / "run",
                   "--overwrite_output_dir")  # fmt: skip
        assert stopped.value.code == 2 and message in capsys.readouterr().err
