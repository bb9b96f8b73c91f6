"""`distill_classifier.py --method`: the methods of every domain on texts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from kd.common.methods import METHODS
from kd.common.methods.classification import RELATION_METHODS
from kd.common.objective import Objective
from kd.common.outputs import Outputs
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.student_model.methods import (
    check_method,
    check_smoothing,
    needs_features,
    teacher_samples,
    text_method,
)
from kd.nlp.teacher_model.teacher import tiny_bert
from kd_testing.scripts import run_script

BRIEF = ["--align_epochs", 0, "--num_train_epochs", 1, "--report_to", "none", "--per_device_train_batch_size", 48]


@pytest.fixture(scope="session")
def folder(small, tmp_path_factory) -> Path:
    """A classifier of the intents with random weights, large enough for distinct logits of texts."""
    torch.manual_seed(1)
    made = tiny_bert(load_text_data(str(small)))
    folder = tmp_path_factory.mktemp("models") / "teacher"
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(folder) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture
def texts(small, folder) -> Texts:
    return Texts.of(load_text_data(str(small)), AutoTokenizer.from_pretrained(folder))


def distill(small: Path, teacher: Path, *words: object) -> None:
    run_script("NLP/scripts/distill_classifier.py", "--dataset", small, "--teacher", teacher, *BRIEF, *words)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("dkd:beta=2:warmup=0", {"loss_task", "loss_decoupled"}),
        ("rkd", {"loss_task", "loss_distances", "loss_angles"}),
        ("cc", {"loss_task", "loss_congruence"}),
    ],
)
def test_a_student_is_distilled_and_reported(method, parts, small, folder, tmp_path):
    distill(small, folder, "--method", method, "--student_layers", 1, "--no_control", "--output_dir", tmp_path / "r")
    assert json.loads((tmp_path / "r" / "results.json").read_text())["method"] == method
    logged = json.loads((tmp_path / "r" / "stages" / "student" / "stage.json").read_text())["history"][0]
    assert {key for key in logged if key.startswith("loss_")} == parts
    saved = load_file(tmp_path / "r" / "student" / "model.safetensors")
    assert all(key.startswith(("bert.", "classifier.")) for key in saved), "auxiliary parameters must not be saved"


@pytest.mark.parametrize("name", METHODS)
def test_padding_has_no_effect(name, teacher, texts):
    student = cut_layers(teacher, 1).eval()
    torch.manual_seed(0)
    found = text_method(name, KDTrainingArguments(output_dir="unused"), student, teacher, texts)
    assert bool(found.features) == needs_features(name) == (name in RELATION_METHODS)
    assert bool(found.teacher_features) == needs_features(name)
    objective = Objective(**found.terms)
    objective.set_progress(0.5)
    tokenizer, values = texts.collate.tokenizer, []
    for length in (12, 17):
        two = ["wake me at six", "what is the weather like"]
        batch = tokenizer(two, padding="max_length", max_length=length, return_tensors="pt")
        outputs = []
        for network, features in ((student, found.features), (teacher, found.teacher_features)):
            with torch.no_grad():
                output = network(**batch, output_hidden_states=True)
            last = {feature: output.hidden_states[-1] for feature in features}
            outputs.append(Outputs(logits=output.logits, features=last, mask=batch["attention_mask"]))
        parts = objective(outputs[0], outputs[1], torch.tensor([0, 1]))
        values.append(torch.stack(list(parts.values())).detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-5)


def test_the_teachers_features_are_the_inputs_of_its_head(teacher, texts):
    features, labels = teacher_samples(teacher, texts, "cls", "fp32")
    first = texts.train["labels"].index(int(labels[0]))
    row = {key: torch.tensor([texts.train[first][key]]) for key in texts.collate.tokenizer.model_input_names}
    with torch.no_grad():
        hidden = teacher.base_model(**row).last_hidden_state
    torch.testing.assert_close(features[0], hidden[0, 0], rtol=1e-4, atol=1e-4)
    assert set(labels.tolist()) == set(texts.train["labels"]) and labels.bincount().max() <= 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "dkdd"], "there is no method 'dkdd'"),
        (["--method", "fitnet"], "there is no method 'fitnet'"),
        (["--method", "dist:tau=1"], "method dist has no argument 'tau'"),
        (["--method", "dkd:warmup=2"], "method dkd: warmup must be between 0 and 1, got 2"),
        (["--method", "sp", "--ensemble_teachers", "TEACHER"], "needs a single teacher"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(words, message, small, folder, tmp_path, capsys):
    words = [str(folder) if word == "TEACHER" else word for word in words]
    with pytest.raises(SystemExit) as stopped:
        distill(small, folder, *words, "--no_control", "--output_dir", tmp_path / "r")
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_regression_supports_only_kd_and_two_classes_support_some_methods():
    training = KDTrainingArguments(output_dir="unused")
    with pytest.raises(UserError, match="numbers: pass --method kd"):
        check_method("dist", training, "stsb", 1)
    with pytest.raises(UserError, match="at least 3 classes"):
        check_method("dkd", training, "rte", 2)
    check_method("kd", training, "stsb", 1)
    smoothed = KDTrainingArguments(output_dir="unused", label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="--label_smoothing_factor is for classification"):
        check_smoothing(smoothed, "stsb", 1)
    with pytest.raises(UserError, match="leave --label_smoothing_factor at 0"):
        check_method("dist", smoothed, "mnli", 3)
    check_smoothing(smoothed, "mnli", 3)
    for name in METHODS:
        check_method(name, training, "mnli", 3)


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_glue_checks_the_method_before_training(task, tmp_path, capsys):
    (tmp_path / "mnli").mkdir()
    (tmp_path / task).mkdir()
    with pytest.raises(SystemExit) as stopped:
        words = ["--tasks", "mnli", task, "--method", "dkd", "--output_dir", tmp_path / "r"]
        run_script("NLP/scripts/distill_glue.py", "--glue_folder", tmp_path, *words)
    assert stopped.value.code == 2 and "method dkd" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_teacher_with_a_bottleneck_distills_its_logits_into_a_plain_student(small, folder, tmp_path, capsys):
    data = load_text_data(str(small))
    encoder = AutoModelForSequenceClassification.from_pretrained(folder).base_model
    made = BottleneckClassifier.from_encoder(
        encoder, dict(enumerate(data.label_names)), "cls", codebooks=4, codebook_size=8
    )
    made.config.key_statistics = {}  # of keys that are fitted, as a run leaves them
    made.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "teacher")
    words = ["--student", folder, "--no_control"]
    distill(small, tmp_path / "teacher", *words, "--method", "dist", "--output_dir", tmp_path / "r")
    assert json.loads((tmp_path / "r" / "results.json").read_text())["method"] == "dist"
    with pytest.raises(SystemExit) as stopped:
        distill(small, tmp_path / "teacher", *words, "--method", "rkd", "--output_dir", tmp_path / "other")
    assert stopped.value.code == 2 and "has a bottleneck" in capsys.readouterr().err
