"""Class-incremental learning from end to end on the embedded digits: accuracy, frozen weights, resuming, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.reporting.results import validate
from kd.image_classification.data.image_data import Images, SmallImageData
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.student_model.bottleneck import BottleneckProbe
from kd.image_classification.student_model.evaluation import predict
from kd.image_classification.student_model.incremental import (
    HeadInputs,
    HeadTraining,
    accuracy,
    embed_images,
    fit_keys,
    split_tasks,
    train_head,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd_testing.evaluations import check_evaluation
from kd_testing.processes import run_code
from kd_testing.readmes import code_of
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("digits_once")
SMALL = {"codebooks": 8, "codebook_size": 16, "key_dim": 6}
SMALL_FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", value)]


def script(*words: object) -> None:
    run_script("image-classification/scripts/train_bottleneck.py", "--dataset", "digits", *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with the default arguments."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    script("--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A finished run with a small bottleneck."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    script(*SMALL_FLAGS, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """A finished run with counted values."""
    folder = tmp_path_factory.mktemp("runs") / "counted"
    script(*SMALL_FLAGS, "--values", "counted", "--epochs_per_task", 1, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def digits() -> SmallImageData:
    data = load_image_data("digits")
    assert isinstance(data, SmallImageData)
    return data


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- results ----


def test_evaluate_repeats_the_metrics_of_a_run(small, tmp_path):
    check_evaluation(small, tmp_path, script="image-classification/scripts/evaluate.py")


def test_several_seeds_have_one_report_and_a_student_with_a_card(tmp_path, monkeypatch, capsys):
    script(*SMALL_FLAGS, "--seeds", 0, 1, "--max_train_samples", 200, "--output_dir", tmp_path / "run")
    found = results(tmp_path / "run")
    scores = [results(tmp_path / "run" / f"seed{seed}")["models"]["student"]["metrics"] for seed in (0, 1)]
    mean = np.mean([score["test"]["accuracy"] for score in scores])
    assert found["models"]["student"]["metrics"]["test"]["accuracy"] == pytest.approx(mean)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "one task after another" in card and "over the seeds 0, 1" in card
    monkeypatch.chdir(tmp_path / "run")
    Image.new("L", (8, 8)).save("image.png")
    capsys.readouterr()
    exec(code_of(tmp_path / "run" / "student"), {})
    assert capsys.readouterr().out.strip() in [str(digit) for digit in range(10)]


def test_the_probe_forgets_and_the_bottleneck_does_not(finished):
    found = results(finished)
    validate(found)
    scores = {name: splits["test"] for name, splits in found["accuracy"].items()}
    assert scores["bottleneck, class by class"] > 0.95
    assert scores["bottleneck, class by class"] > scores["bottleneck, i.i.d."] - 0.02
    assert scores["linear probe, i.i.d."] > 0.85
    assert scores["linear probe, class by class"] < 0.35
    assert found["method"] == "bottleneck_class_incremental"
    assert found["retention"] > 0.98
    assert found["gain_over_control"] > 0.6
    assert found["keys"]["fitted_to_unlabelled_images"] == found["data"]["train"]
    assert found["keys"]["usage"] > 0.95


def test_only_the_probe_fails_on_the_first_classes(finished, digits):
    first = split_tasks(digits, 1, seed=0)[:7]
    for stage, low, high in (("control", 0.0, 0.15), ("student", 0.95, 1.0)):
        model = BottleneckProbe.from_pretrained(finished / "stages" / stage)
        samples = HeadInputs.from_embeddings(model, embed_images(model, digits), digits)
        assert low <= accuracy(model, samples, "test", [c for task in first for c in task]) <= high


def test_accuracy_after_each_task_ends_in_the_final_accuracy(finished):
    found = results(finished)
    assert found["split_measured_after_each_task"] == "test"
    for name, scores in found["accuracy_of_classes_seen"].items():
        assert list(scores) == [str(number) for number in range(1, 11)]
        assert scores["10"] == pytest.approx(found["accuracy"][name]["test"], abs=1e-6)
    one_by_one = found["accuracy_of_all_classes"]
    assert set(one_by_one) == {"bottleneck, class by class", "linear probe, class by class"}
    for name, scores in one_by_one.items():
        assert found["accuracy_of_classes_seen"][name]["1"] == 1.0  # with one class, every prediction is correct
        assert scores["1"] < 0.3  # images of the other nine classes cannot be correct
    assert sorted(found["order_of_classes"].split(", ")) == [str(digit) for digit in range(10)]


def test_a_run_writes_its_files(finished):
    for name in ("recipe.yaml", "report.md", "curves.png", "forgetting.png", "student/preprocessor_config.json"):
        assert (finished / name).stat().st_size > 0


@pytest.mark.parametrize("words", [["--order_seed", 3], ["--classes_per_task", 4]])
def test_counted_values_do_not_depend_on_the_order_of_classes(counted, tmp_path, words):
    one_by_one, at_once = weights(counted / "student"), weights(counted / "stages" / "teacher")
    assert all(torch.equal(one_by_one[name], at_once[name]) for name in at_once)
    script(*SMALL_FLAGS, "--values", "counted", "--epochs_per_task", 1, *words, "--output_dir", tmp_path / "run")
    other = weights(tmp_path / "run" / "student")
    assert all(torch.equal(one_by_one[name], other[name]) for name in other)


def test_counted_values_are_compared_with_the_probe(counted, small, digits):
    found, counts = results(counted), weights(counted / "student")["head.label_counts"]
    validate(found)
    assert torch.equal(counts.sum(1), torch.bincount(digits.splits["train"].labels).int().expand(8, -1))
    assert found["accuracy"]["bottleneck, class by class"] == found["accuracy"]["bottleneck, i.i.d."]
    assert found["retention"] == 1.0 and found["gain_over_control"] > 0.3
    assert found["accuracy"]["bottleneck, class by class"]["test"] > 0.8
    assert list(found["accuracy_of_classes_seen"]["bottleneck, class by class"]) == [str(n) for n in range(1, 11)]


def test_a_counted_student_forgets(counted, tmp_path):
    forget = "image-classification/scripts/forget.py", counted, "--classes", "3", "--output_dir", tmp_path / "less"
    run_script(*forget)
    assert not weights(tmp_path / "less")["head.label_counts"][..., 3].any()


# ---- which weights training changes ----


def test_value_training_does_not_change_the_keys(finished):
    fitted = weights(finished / "stages" / "keys")
    assert not fitted["head.values"].any()
    for folder in ("student", "stages/teacher"):
        trained = weights(finished / folder)
        assert trained.keys() == fitted.keys()
        assert [name for name in fitted if not torch.equal(fitted[name], trained[name])] == ["head.values"]


def test_an_image_changes_only_the_values_of_its_keys(digits):
    model = BottleneckProbe.from_encoder(None, digits, SMALL)
    assert isinstance(model.head, DiscreteKeyValueBottleneck)
    embeddings = embed_images(model, digits)
    samples = HeadInputs.from_embeddings(fit_keys(model, embeddings["train"], seed=0), embeddings, digits)
    assert samples.inputs["train"].dtype == torch.uint16

    def values_after(*classes: int) -> torch.Tensor:
        tasks = [[c] for c in classes]
        trained, history = train_head(HeadTraining("classes", model, samples, tasks, 50.0), 2, 64, seed=0)
        assert [entry["classes_seen"] for entry in history] == [k + 1 for k in range(len(classes)) for _ in range(2)]
        return trained.head.state_dict()["values"]

    def chosen_by(label: int) -> torch.Tensor:
        codes = samples.inputs["train"][samples.labels["train"] == label].long()
        return torch.zeros(8, 16, dtype=torch.bool).scatter_(1, codes.T, True)

    first, second = values_after(3), values_after(3, 5)
    assert 0 < chosen_by(3).sum() < 8 * 16
    assert torch.equal(first.ne(0).any(-1), chosen_by(3))
    assert torch.equal(second.ne(first).any(-1), chosen_by(5))  # no momentum or decay changes the others
    assert not model.head.values.any()  # the untrained model was copied


def test_keys_do_not_depend_on_labels(digits):
    permutation = torch.randperm(len(digits.splits["train"]))
    images = digits.splits["train"]
    other = replace(digits, splits=digits.splits | {"train": Images(images.pixels, images.labels[permutation])})
    keys = []
    for data in (digits, other):
        torch.manual_seed(7)
        model = BottleneckProbe.from_encoder(None, data, SMALL)
        keys.append(fit_keys(model, embed_images(model, data)["train"], seed=7).head.keys)
    assert torch.equal(*keys)


def test_cached_codes_give_the_logits_of_the_images(finished, digits):
    model = BottleneckProbe.from_pretrained(finished / "student")
    pixels = digits.views("test", model.device).__getitems__(list(range(50)))["pixel_values"]
    assert torch.equal(model.classify(model.cache(model.embed(pixels))), model(pixels).logits)


# ---- reproducibility ----


def test_a_seed_determines_the_values(small, tmp_path):
    script(*SMALL_FLAGS, "--output_dir", tmp_path / "same")
    script(*SMALL_FLAGS, "--output_dir", tmp_path / "other", "--seed", 1)
    first, same, other = (weights(folder / "student") for folder in (small, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.values"], other["head.values"])
    assert results(small)["order_of_classes"] != results(tmp_path / "other")["order_of_classes"]


def test_a_resumed_run_gives_the_same_results(small, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "stages" / "student")
    script(*SMALL_FLAGS, "--output_dir", run, "--resume_from_checkpoint")
    assert torch.equal(weights(small / "student")["head.values"], weights(run / "student")["head.values"])
    for section in ("accuracy", "accuracy_of_classes_seen", "accuracy_of_all_classes", "keys"):
        assert results(small)[section] == results(run)[section]


LOGITS_IN_ANOTHER_PROCESS = """
import sys, numpy, torch
from kd.image_classification.student_model.bottleneck import BottleneckProbe
model = BottleneckProbe.from_pretrained(sys.argv[1])
images = torch.from_numpy(numpy.load(sys.argv[2]))
numpy.save(sys.argv[3], model(images).logits.detach().numpy())
"""


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "new"])
def test_a_saved_student_gives_the_same_logits_in_another_process(finished, digits, tmp_path, fork):
    images = digits.views("test", torch.device("cpu")).__getitems__(list(range(100)))["pixel_values"]
    np.save(tmp_path / "images.npy", images.numpy())
    paths = finished / "student", tmp_path / "images.npy", tmp_path / "logits.npy"
    run_code(LOGITS_IN_ANOTHER_PROCESS, *paths, fork=fork)
    here = BottleneckProbe.from_pretrained(finished / "student")(images).logits.detach().numpy()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), here)


def test_a_saved_student_has_the_reported_accuracy(finished, digits):
    logits = predict(BottleneckProbe.from_pretrained(finished / "student"), digits, "test")
    right = (logits.argmax(1) == digits.splits["test"].labels.numpy()).mean()
    assert right == results(finished)["models"]["student"]["metrics"]["test"]["accuracy"]


# ---- a trained network as the encoder ----


@pytest.fixture
def encoder(tmp_path, digits) -> Path:
    """A small classifier of other classes."""
    config = digits.config | {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    new_classifier("resnet8", config | {"mean": [0.5], "std": [0.25]}).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_trained_network_is_a_frozen_encoder(encoder, digits, tmp_path):
    words = ["--encoder", encoder, "--classes_per_task", 4, "--epochs_per_task", 1, *SMALL_FLAGS]
    script(*words, "--output_dir", tmp_path / "run")
    original, student = (
        ImageClassifier.from_pretrained(encoder),
        BottleneckProbe.from_pretrained(tmp_path / "run" / "student"),
    )
    assert student.encoder is not None
    kept = student.encoder.state_dict()
    assert kept
    assert all(torch.equal(original.state_dict()[name], kept[name]) for name in kept)
    assert not any(parameter.requires_grad for parameter in student.encoder.parameters())
    assert not student.train().encoder.training
    assert (student.config.mean, student.config.id2label[9]) == ([0.5], "9")
    pixels = torch.randn(3, 3, 8, 8)
    assert torch.equal(student.embed(pixels), original(pixels).features["pooled"].detach())
    found = results(tmp_path / "run")
    assert list(found["accuracy_of_classes_seen"]["bottleneck, class by class"]) == ["4", "8", "10"]


# ---- errors: one line, exit code 2, no files ----


def error_of(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        script(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dataset", "nonsense"], "unknown dataset 'nonsense'"),
        (["--encoder", "nonsense"], "unknown --encoder 'nonsense'"),
        (["--codebooks", 0], "--codebooks must be at least 1"),
        (["--codebook_size", 70000], "--codebook_size must be between 1 and 65536"),
        (["--classes_per_task", 0], "--classes_per_task must be at least 1"),
        (["--classes_per_task", 11], "--classes_per_task must be at most the 10 classes of digits"),
        (["--values", "counted", "--value_learning_rate", 3], "--values counted counts labels in one pass"),
        (["--value_learning_rate", -1], "--value_learning_rate must be above 0"),
        (["--codeboks", 3], "unknown flag --codeboks; did you mean --codebooks?"),
    ],
)  # fmt: skip
def test_bad_flags(capsys, tmp_path, words, named):
    assert named in error_of(capsys, *words, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        script(*SMALL_FLAGS, "--probe_learning_rate", 3e38, "--output_dir", tmp_path / "run")
    assert stopped.value.code == 2
    assert "the loss of linear probe, class by class is " in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "stages" / "control").exists()


def test_invalid_encoders(capsys, tmp_path, encoder):
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in error_of(capsys, "--encoder", tmp_path / "empty")
    BertConfig().save_pretrained(tmp_path / "bert")
    assert "holds a bert, not an image classifier" in error_of(capsys, "--encoder", tmp_path / "bert")
    assert "pass --image_size 8" in error_of(capsys, "--encoder", encoder, "--image_size", 16)


def test_finished_runs_are_not_overwritten_by_default(capsys, finished):
    before = (finished / "results.json").read_bytes()
    assert "--overwrite_output_dir" in error_of(capsys, "--output_dir", finished)
    assert (finished / "results.json").read_bytes() == before
