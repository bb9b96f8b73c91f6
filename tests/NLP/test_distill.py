"""The NLP scripts from end to end on small data: all systems, killed runs, evaluation, loading, invalid input."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import set_keys
from kd.common.reporting.tables import number
from kd.common.utils.errors import UserError
from kd.nlp.data.intents import load_intents
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd_testing.paths import REPO
from kd_testing.processes import run_code
from kd_testing.readmes import code_of
from kd_testing.scripts import recipe_of, run_script
from kd_testing.tiny import NARROW_BERT
from kd_testing.verdicts import check_verdict, check_verdict_over_seeds

SCRIPTS = REPO / "NLP" / "scripts"
BRIEF = ["--from_scratch_epochs", "1", "--align_epochs", "1", "--report_to", "none"]
KEY_STUDY = str(REPO / "benchmarks" / "key_study.py")
SHORT = [*BRIEF, "--value_epochs", "2", "--codebook_size", "16"]


def script(name: str, *words: object) -> None:
    run_script(f"NLP/scripts/{name}", *words)


def distill(recipe: str, *words: object) -> None:
    name = "distill_classifier.py" if recipe == "base" else "distill_bottleneck.py"
    recipes = [SCRIPTS / f"{recipe}.yaml"] if recipe in ("new_keys", "student_only") else []
    script(name, *recipes, recipe_of(*(BRIEF if recipe == "base" else SHORT)), *words)


@pytest.fixture(scope="session")
def carried(small, tmp_path_factory) -> Path:
    """A finished run of keys_carried."""
    folder = tmp_path_factory.mktemp("runs") / "carried"
    distill("keys_carried", "--dataset", small, "--output_dir", folder)
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---- the four systems ----


def test_keys_carried_writes_a_complete_run(carried, small):
    found = results(carried)
    assert found["method"] == "keys_carried"
    assert found["data"]["train"] == 246
    scores = {role: model["metrics"]["validation"]["accuracy"] for role, model in found["models"].items()}
    assert found["retention"] == scores["student"] / scores["teacher"]
    assert found["gain_over_control"] == scores["student"] - scores["control"]
    assert found["models"]["student"]["parameters"] < found["models"]["teacher"]["parameters"]
    for name in ("recipe.yaml", "report.md", "curves.png", "student/model.safetensors", "student/README.md"):
        assert (carried / name).stat().st_size > 0
    teacher, student = (load_file(carried / name / "model.safetensors") for name in ("stages/teacher", "student"))
    assert torch.equal(teacher["bottleneck.keys"], student["bottleneck.keys"])
    assert not torch.equal(teacher["bottleneck.values"], student["bottleneck.values"])
    assert found["bytes"]["student"]["keys"] == student["bottleneck.keys"].numel() * 4
    control = load_file(carried / "stages" / "control" / "model.safetensors")
    assert not torch.equal(teacher["bottleneck.keys"], control["bottleneck.keys"])


@pytest.mark.parametrize(
    ("recipe", "words", "method"),
    [
        ("new_keys", [], "keys_new"),
        ("new_keys", "--keys random --decoder mean --split projection --pooling tokens".split(), "keys_random"),
        ("keys_carried", ["--keys", "reused"], "keys_reused"),
        ("keys_carried", ["--values", "counted", "--decoder", "mean"], "keys_carried"),
        ("student_only", ["--pooling", "cls"], "student_only"),
        ("base", ["--num_train_epochs", "1"], "kd"),
    ],
)  # fmt: skip
def test_the_other_systems(small, tmp_path, recipe, words, method):
    distill(recipe, "--dataset", small, "--output_dir", tmp_path / "run", "--no_control", *words)
    found = results(tmp_path / "run")
    assert found["method"] == method
    assert found["models"]["control"] is None
    stage = "teacher_encoder" if method == "student_only" else "teacher"
    teacher = load_file(tmp_path / "run" / "stages" / stage / "model.safetensors")
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    parts = [name for name in student if name.startswith("bottleneck.")]
    if method == "keys_reused":
        assert all(torch.equal(teacher[name], student[name]) for name in parts)
    elif "counted" in words:
        assert student["bottleneck.label_counts"][0].sum() == found["data"]["train"]
    elif method in ("keys_new", "keys_random"):
        assert not torch.equal(teacher["bottleneck.keys"], student["bottleneck.keys"])
    elif method == "kd":
        assert not parts
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
        assert isinstance(model, BertForSequenceClassification)


@pytest.fixture(scope="session")
def hidden_labels(small, tmp_path_factory) -> Path:
    """The small dataset with two thirds of its training labels hidden."""
    folder = tmp_path_factory.mktemp("data") / "hidden"
    folder.mkdir()
    train, validation = (pq.read_table(Path(small) / f"{name}.parquet") for name in ("train", "validation"))
    ids = np.where(np.arange(len(train)) % 3, -1, train["intent"])
    place = train.column_names.index("intent")
    pq.write_table(train.set_column(place, train.schema.field(place), [ids]), folder / "train.parquet")
    pq.write_table(validation, folder / "validation.parquet")
    return folder


@pytest.mark.parametrize("recipe", ["base", "new_keys"])
def test_unlabelled_texts_train_the_student_alone(hidden_labels, tmp_path, recipe):
    words = ["--num_train_epochs", 2] if recipe == "base" else []
    distill(recipe, "--dataset", hidden_labels, "--output_dir", tmp_path / "run", *words)
    found = results(tmp_path / "run")
    assert found["data"]["train"] == 246 and "164 of 246 rows of train have no label" in found["data_notes"]
    logs = {path.parent.name: json.loads(path.read_text())["history"]
            for path in (tmp_path / "run" / "stages").glob("*/stage.json")}  # fmt: skip
    assert not [name for name, entries in logs.items() for entry in entries if not np.isfinite(entry.get("loss", 0))]
    if recipe == "base":
        steps = {name: entries[-1]["step"] for name, entries in logs.items()}
        assert steps["control"] == steps["student_encoder"] + steps["student"] == 18  # 6 batches of 48 in an epoch
        assert steps["teacher"] == 6
        evaluated = [entry["step"] for entry in logs["control"] if "eval_accuracy" in entry]
        assert evaluated == [6, 12, 18]  # as often as the student


def test_methods_that_need_labels_reject_unlabelled_texts(hidden_labels, tmp_path, capsys):
    words = "--dataset", hidden_labels, "--output_dir", tmp_path / "run"
    with pytest.raises(SystemExit):
        distill("base", *words, "--method", "dkd")
    message = capsys.readouterr().err
    assert "decoupled of --method dkd needs the label" in message and "--drop_unlabelled" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def answers(small, tmp_path_factory) -> Path:
    """The small dataset as CSV files with answers of a language model: right, wrong, no class, none; few labels."""
    folder = tmp_path_factory.mktemp("data") / "answers"
    folder.mkdir()
    names = load_intents()["train"].features["intent"].names
    for split in ("train", "validation"):
        frame = pq.read_table(Path(small) / f"{split}.parquet").to_pandas()
        right = [names[i] for i in frame["intent"]]
        frame["intent"] = [name if split == "validation" or i % 3 == 0 else None for i, name in enumerate(right)]
        others = {3: names[0], 5: "not sure", 7: None}
        frame["model answer"] = [others.get(i % 8, name.replace("_", " ")) for i, name in enumerate(right)]
        frame.to_csv(folder / f"{split}.csv", sep=";", index=False)
    return folder


def test_a_student_learns_from_a_column_of_answers(answers, tmp_path, capsys):
    words = ["--dataset", answers, "--teacher_columns", "model answer", "--num_train_epochs", 2, "--report_to", "none"]
    script("distill_classifier.py", *words, "--output_dir", tmp_path / "run")
    found = results(tmp_path / "run")
    assert found["models"]["teacher"] is None and found["models"]["control"] and found["models"]["student"]
    assert not (tmp_path / "run" / "stages" / "teacher").exists()
    measured = found["teacher_outputs"]["validation"]
    assert measured["rows"] == 62 and measured["accuracy"] == pytest.approx(51 / 62, abs=0.03)
    assert found["data"]["validation"] > 62, "some rows have no answer, so that teacher and student are not compared"
    assert found["retention"] is None and found["verdict"]["teacher"] is None
    notes = found["data_notes"]
    assert "separated by semicolons" in notes and "as hard labels" in notes and "not sure" in notes
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Teacher outputs" in report and "hard labels" in report


def test_flags_of_a_teacher_model_have_no_effect_next_to_its_outputs(answers, tmp_path, capsys):
    words = ["--dataset", answers, "--teacher_columns", "model answer", "--output_dir", tmp_path / "run"]
    for more, message in (
        ("--teacher tiny-bert", "--teacher has no effect"),
        ("--align_epochs 2", "--align_epochs has no effect"),
        ("--hidden_weight 1", "--hidden_weight has no effect"),
        ("--method rkd", "needs features of a teacher"),
        ("--method dist", "pass --method kd"),
        ("--method dkd", "needs the label of every"),
        ("--teacher_columns answer", "no column 'answer'"),
    ):
        with pytest.raises(SystemExit):
            script("distill_classifier.py", *words, *more.split())
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("distill_classifier.py", "--teacher_values", "logits")
    assert "--teacher_values has no effect" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("distill_bottleneck.py", "--teacher_columns", "model answer")
    assert "only distill_classifier.py distills from a teacher's outputs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_trained_teacher_stays_unchanged(carried, small, tmp_path):
    teacher = carried / "stages" / "teacher"
    distill("keys_carried", "--dataset", small, "--teacher", teacher, "--no_control", "--output_dir", tmp_path / "run")
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert torch.equal(load_file(teacher / "model.safetensors")["bottleneck.keys"], student["bottleneck.keys"])
    assert not (tmp_path / "run" / "stages" / "teacher").exists()
    assert (
        results(tmp_path / "run")["models"]["teacher"]["metrics"] == results(carried)["models"]["teacher"]["metrics"]
    )


def test_several_seeds_share_a_teacher_and_report_means(small, tmp_path):
    run = tmp_path / "run"
    distill("keys_carried", "--dataset", small, "--output_dir", run, "--seeds", 3, 4)
    whole, *seeds = (results(folder) for folder in (run, run / "seed3", run / "seed4"))
    assert whole["seeds"] == [3, 4] and [one["seed"] for one in seeds] == [3, 4]
    check_verdict_over_seeds(whole, seeds)
    assert whole["verdict"]["shared_teacher"] and "that all seeds share" in (run / "report.md").read_text()
    for one in seeds:
        check_verdict(one)
    assert whole["shared_by_all_seeds"] == seeds[0]["shared_by_all_seeds"] == "the teacher"
    assert seeds[0]["models"]["teacher"] == seeds[1]["models"]["teacher"]
    assert {path.name for path in (run / "stages").iterdir()} == {"teacher_encoder", "teacher"}
    scores = [one["models"]["student"]["metrics"]["validation"]["accuracy"] for one in seeds]
    assert whole["models"]["student"]["metrics"]["validation"]["accuracy"] == pytest.approx(sum(scores) / 2)
    teacher, *students = (
        load_file(run / name / "model.safetensors") for name in ("stages/teacher", "seed3/student", "seed4/student")
    )
    assert all(torch.equal(teacher["bottleneck.keys"], student["bottleneck.keys"]) for student in students)
    assert not torch.equal(*(student["bottleneck.values"] for student in students))
    first = load_file(run / "student" / "model.safetensors")
    assert all(torch.equal(first[name], weight) for name, weight in students[0].items())
    assert len(list((run / "teacher_outputs").iterdir())) == 2 and not (run / "seed3" / "teacher_outputs").exists()


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("cola", "matthews"),
        ("stsb", "spearman"),
        pytest.param("sst2", "accuracy", marks=pytest.mark.slow),
        pytest.param("rte", "accuracy", marks=pytest.mark.slow),
    ],
)
def test_real_glue_tasks_run(shared, tmp_path, task, metric):
    folder = tmp_path / f"glue_{task}"
    folder.mkdir()
    for split in ("train", "validation"):
        table = pq.read_table(shared / "data" / folder.name / f"{split}.parquet")
        pq.write_table(table.slice(0, 40), folder / f"{split}.parquet")
    distill("keys_carried", "--dataset", folder, "--output_dir", tmp_path / "run", "--no_control")
    assert results(tmp_path / "run")["primary_metric"]["name"] == metric


@pytest.fixture(scope="session")
def bert(carried, tmp_path_factory) -> Path:
    """A BERT encoder without a head, like one from the Hub."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    BertModel(BertConfig(vocab_size=4000, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(carried / "student").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("width", "recipe"), [(32, "keys_carried"), (16, "base")])
def test_a_named_distilbert_as_student_of_a_bert(carried, small, bert, tmp_path, width, recipe):
    """A student of the same width has carried keys; a narrower one is aligned through regressors."""
    student = tmp_path / "distilbert"
    config = DistilBertConfig(vocab_size=4000, dim=width, hidden_dim=32, n_layers=2, n_heads=2)
    DistilBertModel(config).save_pretrained(student)
    AutoTokenizer.from_pretrained(carried / "student").save_pretrained(student)
    words = ["--teacher", bert, "--teacher_epochs", 1, "--student", student]
    words += ["--num_train_epochs", 1] if recipe == "base" else ["--codebooks", 8]
    distill(recipe, "--dataset", small, "--output_dir", tmp_path / "run", *words)
    saved = tmp_path / "run" / "student"
    measured = results(tmp_path / "run")["models"]
    assert measured["student"]["parameters"] < measured["teacher"]["parameters"]
    assert not [name for name in load_file(saved / "model.safetensors") if "regressor" in name]
    tokenizer, loaded = AutoTokenizer.from_pretrained(saved), AutoModelForSequenceClassification.from_pretrained(saved)
    encoder = loaded.encoder if recipe != "base" else loaded.distilbert
    assert isinstance(encoder, DistilBertModel)
    assert loaded(**tokenizer("set an alarm", return_tensors="pt")).logits.shape == (1, 41)


# ---- saved students ----

LOGITS_IN_ANOTHER_PROCESS = """
import sys, numpy
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = BottleneckClassifier.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], model(**tokenizer(["set an alarm", "transfer some money to my savings"], padding=True,
    return_tensors="pt")).logits.detach().numpy())
"""


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "new"])
def test_a_saved_student_has_the_same_logits_in_another_process(carried, tmp_path, fork):
    student = str(carried / "student")
    run_code(LOGITS_IN_ANOTHER_PROCESS, student, tmp_path / "logits.npy", fork=fork)
    model, tokenizer = BottleneckClassifier.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    texts = ["set an alarm", "transfer some money to my savings"]
    here = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.detach().numpy()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), here)
    assert model.config.id2label[0] == load_intents()["train"].features["intent"].names[0]


def test_a_saved_student_ignores_padding(carried):
    model = BottleneckClassifier.from_pretrained(str(carried / "student"))
    ids = torch.randint(5, 200, (3, 9))
    padded = torch.nn.functional.pad(ids, (0, 7))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 7))
    torch.testing.assert_close(model(padded, mask).logits, model(ids).logits)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_evaluate_reproduces_the_reported_metrics(carried, small, tmp_path, role):
    folder = carried / ("student" if role == "student" else "stages/teacher")
    script("evaluate.py", folder, "--dataset", small, "--json", tmp_path / "metrics.json")
    measured = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    reported = results(carried)["models"][role]["metrics"]
    for split, metrics in measured.items():
        assert metrics == {name: value for name, value in reported[split].items() if name != "agreement"}


def test_a_run_is_evaluated_on_its_own_data_with_a_file_of_predictions(carried, small, tmp_path, capsys):
    script("evaluate.py", carried, "--json", tmp_path / "m.json", "--predictions", tmp_path / "p.csv")
    assert f"note: --dataset {small}, from {carried / 'recipe.yaml'}" in capsys.readouterr().out
    reported = results(carried)["models"]["student"]["metrics"]
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    found = pandas.read_csv(tmp_path / "p.csv")
    for split, rows in found.groupby("split"):
        assert metrics[split]["accuracy"] == reported[split]["accuracy"] == (rows.label == rows.prediction).mean()
        stored = pandas.read_parquet(small / f"{split}.parquet")
        names = load_intents()["train"].features["intent"].names
        assert [names[label] for label in stored["intent"][rows.row]] == rows.label.tolist()
    assert set(found.split) == {"validation", "test"} and found.probability.between(1 / 41, 1).all()


def test_predictions_for_a_file_of_the_user_name_its_rows(carried, tmp_path):
    """Rows without a label are left out, so the numbers of the others have a gap."""
    first, second, *_ = load_intents()["train"].features["intent"].names
    texts = ["set an alarm", "no label here", "set a timer", "wake me up at six"]
    rows = pandas.DataFrame({"text": texts, "intent": [first, None, second, first]})
    rows.to_csv(tmp_path / "mine.csv", index=False)
    script("evaluate.py", carried, "--dataset", tmp_path / "mine.csv", "--predictions", tmp_path / "p.jsonl")
    found = pandas.read_json(tmp_path / "p.jsonl", lines=True)
    assert found.columns.tolist() == ["split", "row", "label", "prediction", "probability"]
    assert found.row.tolist() == [0, 2, 3] and found.label.tolist() == [first, second, first]
    script("evaluate.py", carried, "--dataset", tmp_path / "mine.csv", "--predictions", tmp_path / "p.csv",
           "--max_eval_samples", 2)  # fmt: skip
    assert len(pandas.read_csv(tmp_path / "p.csv")) == 2


def test_the_code_of_the_model_card_loads_a_student_with_a_bottleneck(carried, monkeypatch, capsys):
    monkeypatch.chdir(carried)
    card = carried / "student" / "README.md"
    exec(code_of(card.parent), {})
    assert capsys.readouterr().out.strip() in load_intents()["train"].features["intent"].names
    metadata = ModelCard.load(card).data
    assert metadata.library_name is None and metadata.pipeline_tag == "text-classification"
    assert metadata.datasets is None and metadata.base_model is None and metadata.license is None
    assert "The code needs `kd`" in card.read_text() and str(carried) not in card.read_text()


def test_logits_of_cached_codes_equal_those_of_texts(carried, small):
    model = BottleneckClassifier.from_pretrained(str(carried / "student")).train()
    assert not model.encoder.training
    ids = torch.randint(5, 200, (6, 9))
    codes = model.bottleneck.encode(model.embed(ids, torch.ones_like(ids)))
    assert torch.equal(model(codes=codes.to(torch.uint16)).logits, model(ids).logits)
    model(ids).logits.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.bottleneck.values.grad is not None


# ---- killing and continuing ----


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_student(carried, small, tmp_path):
    """SIGKILL at four moments, in different stages. The student equals that of an uninterrupted run."""
    run = tmp_path / "run"
    words = [*SHORT, "--dataset", small, "--output_dir", run]
    code = (  # of the narrow tiny-bert of these tests, in another process
        f"import runpy; from kd.nlp.teacher_model import teacher; teacher.TINY_SIZES = {NARROW_BERT}; "
        f"runpy.run_path({str(SCRIPTS / 'distill_bottleneck.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    moments = [
        "checkpoints/teacher_encoder/checkpoint-*/model.safetensors",
        "stages/teacher_encoder/stage.json",
        "checkpoints/student_encoder",
        "checkpoints/student/checkpoint-*/trainer_state.json",
    ]
    for i, moment in enumerate(moments):
        resume = ["--resume_from_checkpoint"] if i else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(run.glob(moment)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "results.json").exists(), f"finished before {moment}"
    distill("keys_carried", "--dataset", small, "--output_dir", run, "--resume_from_checkpoint")
    whole, resumed = (
        load_file(carried / "student" / "model.safetensors"),
        load_file(run / "student" / "model.safetensors"),
    )
    assert whole.keys() == resumed.keys()
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different


def test_a_run_that_is_continued_reads_its_codes(carried, small, tmp_path, monkeypatch):
    run = shutil.copytree(carried, tmp_path / "run")
    for finished in ("results.json", "student", "stages/student"):
        shutil.rmtree(run / finished) if (run / finished).is_dir() else (run / finished).unlink()
    monkeypatch.setattr("kd.common.bottleneck.training.run_inference", None)  # neither embeds nor encodes
    distill("keys_carried", "--dataset", small, "--output_dir", run, "--resume_from_checkpoint")
    assert results(run)["keys"] == results(carried)["keys"]
    whole, continued = (load_file(folder / "student" / "model.safetensors") for folder in (carried, run))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


# ---- invalid input: one line, exit code 2, no output files ----


@pytest.fixture
def unlabelled(tmp_path) -> Path:
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    (folder / "train.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    return folder


def plain_classifier(folder: Path, labels: list[str], **config: int) -> Path:
    """A saved tiny classifier with random weights."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    shape |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    BertForSequenceClassification(BertConfig(vocab_size=4000, **shape)).save_pretrained(folder)
    return folder


def error_of(capsys, folder: Path, *words: object, recipe: str = "keys_carried") -> str:
    with pytest.raises(SystemExit) as stopped:
        distill(recipe, "--output_dir", folder, *words)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if not line.endswith("]")]
    error = "\n".join(filter(None, lines))  # without progress bars
    assert stopped.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 0, error
    assert not (folder / "results.json").exists()
    assert not (folder / "student").exists()
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature must be above 0"),
        (["--alpha", "1.5"], "--alpha must be between 0 and 1"),
        (["--dataset", "nonsense"], "nonsense"),
        (["--teacher", "no/such-model"], "--teacher tiny-bert"),
        (["--keys", "carried", "--bottleneck", "student"], "--keys carried needs"),
        (["--codebooks", "7"], "7 codebooks do not divide"),
        (["--values", "counted"], "they need --decoder mean"),
        (["--values", "counted", "--decoder", "mean", "--alpha", "0.3"], "--alpha has no effect"),
        (["--student_layers", "9"], "between 1 and the teacher's 4"),
        (["--kays", "new"], "unknown flag --kays; did you mean --keys"),
        (["--keys", "old"], "invalid choice"),
    ],
)
def test_invalid_flags(capsys, tmp_path, small, words, message):
    dataset = [] if "--dataset" in words else ["--dataset", small]
    assert message in error_of(capsys, tmp_path / "run", *dataset, *words)


def test_a_dataset_without_text_columns(capsys, tmp_path, unlabelled):
    assert "--text_columns" in error_of(capsys, tmp_path / "run", "--dataset", unlabelled)


def test_an_unreachable_dataset_of_the_hub(capsys, tmp_path):
    assert "--dataset" in error_of(capsys, tmp_path / "run", "--dataset", "some-owner/some-dataset")


def test_an_unknown_key_of_a_recipe(capsys, tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("codebocks: 4\n")
    with pytest.raises(SystemExit) as stopped:
        script("distill_bottleneck.py", recipe)
    assert stopped.value.code == 2
    assert "unknown key codebocks; did you mean codebooks?" in capsys.readouterr().err


def test_a_student_too_wide_for_carried_keys(capsys, tmp_path, small, carried):
    names = load_intents()["train"].features["intent"].names
    student = plain_classifier(tmp_path / "wide", names, hidden_size=64)
    AutoTokenizer.from_pretrained(carried / "student").save_pretrained(student)
    error = error_of(capsys, tmp_path / "run", "--dataset", small, "--student", student)
    assert "has width 64" in error
    assert "have width 32" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--codebooks", "16"], "codebooks 16 here, 32 carried"),
        (["--pooling", "cls"], "are for --pooling mean, not cls"),
        (["--keys", "reused", "--decoder", "mean"], "decoder mean here, linear carried"),
    ],
)
def test_a_bottleneck_of_another_shape_than_the_teachers(capsys, tmp_path, small, carried, words, message):
    flags = ["--dataset", small, "--teacher", carried / "stages" / "teacher", "--no_control"]
    assert message in error_of(capsys, tmp_path / "run", *flags, *words)
    assert not (tmp_path / "run").exists()


def test_keys_of_a_bottleneck_with_another_decoder_can_be_carried_but_not_reused():
    student, teacher = (DiscreteKeyValueBottleneck(8, 3, 2, 4, decoder=kind) for kind in ("linear", "mean"))
    with pytest.raises(ValueError, match="decoder linear here, mean carried"):
        set_keys(student, "reused", teacher, torch.randn(10, 8), seed=0)
    set_keys(student, "carried", teacher, torch.randn(10, 8), seed=0)


def test_a_finished_run_is_only_overwritten_with_the_flag(capsys, small, carried):
    before = (carried / "results.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        distill("keys_carried", "--dataset", small, "--output_dir", carried)
    assert stopped.value.code == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (carried / "results.json").read_bytes() == before


def test_continuing_with_other_arguments_is_rejected(capsys, small, carried):
    with pytest.raises(SystemExit) as stopped:
        distill(
            "keys_carried", "--dataset", small, "--output_dir", carried, "--resume_from_checkpoint", "--alpha", 0.1
        )
    assert stopped.value.code == 2
    assert "alpha (was 0.5, now 0.1)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shell_script_runs_from_any_directory(small, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / "distill_keys_carried.sh"), *SHORT, "--dataset", str(small), "--no_control"]
    done = subprocess.run(
        [*command, "--output_dir", "here"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "student: here/student" in done.stdout
    assert (tmp_path / "here" / "student" / "model.safetensors").exists()


def test_the_key_study_needs_an_aligned_student(tmp_path, small, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    (tmp_path / "stages" / "teacher_encoder").mkdir(parents=True)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="has no aligned student"):
        runpy.run_path(KEY_STUDY)["KeyStudy"](tmp_path, str(small))


@pytest.mark.slow
def test_the_key_study_fills_its_table(carried, small, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    study = runpy.run_path(KEY_STUDY)
    study["SETTINGS"][:] = [study["SETTINGS"][0], study["SETTINGS"][-1]]
    words = ["key_study.py", carried, "--dataset", small, "--markdown", tmp_path / "keys.md"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    study["main"]()
    table = (tmp_path / "keys.md").read_text().splitlines()
    assert table[0].endswith("| carried | new | random | reused |")
    cells = [cell.strip() for row in table[2:4] for cell in row.split("|")[2:-1]]
    assert cells[-1] == "–"  # reused keys are not trained
    scores = [float(cell) for cell in cells[:-1]]
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 2


@pytest.mark.slow
def test_the_study_of_carried_keys_fills_its_tables(carried, small, tmp_path):
    pandas.DataFrame({"text": [f"a film of {n} hours" for n in range(40)]}).to_csv(tmp_path / "films.csv")
    script = "benchmarks/carried_keys.py"
    run_script(script, carried, "--dataset", small, "--others", tmp_path / "films.csv", "--markdown",
               tmp_path / "keys.md", "--figure", tmp_path / "keys.png", draw=True)  # fmt: skip
    accuracies, retrieved = (tmp_path / "keys.md").read_text().strip().split("\n\n")
    titles = [row.split("|")[1].strip() for row in accuracies.splitlines()[2:]]
    assert titles == ["carried", "new: all texts", "new: 100 texts", "new: 20 texts", "new: 40 texts of films.csv",
                      "random"]  # fmt: skip
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for cells in (row.split("|") for row in retrieved.splitlines()[2:])}  # fmt: skip
    width = BertConfig.from_pretrained(carried / "stages" / "student_encoder").hidden_size
    assert rows["embeddings, fp32"][:2] == [number(width * 4.0), "–"]
    assert rows["carried keys: equal codes"][0] == "36.00"
    assert float(rows["carried keys: equal codes"][1]) > 5 * float(rows["new keys: equal codes"][1])
    assert rows["new keys, store of the student"][1:3] == ["–", "–"]
    assert (tmp_path / "keys.png").stat().st_size > 10_000


def test_searches_by_codes_and_by_vectors(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    found = runpy.run_path(str(REPO / "benchmarks" / "code_retrieval.py"))
    store = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 2, 4]])
    assert found["most_equal"](torch.tensor([[1, 2, 4], [5, 0, 0], [0, 0, 3]]), store).tolist() == [1, 2, 0]
    vectors, others = torch.randn(30, 6), torch.randn(50, 6)
    assert torch.equal(found["closest"](vectors, others), torch.cdist(vectors, others).argmin(1))


@pytest.mark.slow
def test_two_processes_distill_like_one(small, tmp_path):
    """With torchrun on the CPU: one folder, one report, and about the same losses."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [SCRIPTS / "distill_bottleneck.py", *SHORT, "--dataset", small]
    words += ["--per_device_train_batch_size", 24, "--value_batch_size", 128, "--precision", "fp32"]
    command = [*launcher, *words, "--output_dir", tmp_path / "two", "--no_control"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = ["--output_dir", tmp_path / "one", "--no_control", "--precision", "fp32"]
    distill("keys_carried", "--dataset", small, *alone)
    losses = []
    for folder in ("one", "two"):
        history = json.loads((tmp_path / folder / "stages" / "teacher_encoder" / "stage.json").read_text())["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # dropout draws differ
    assert results(tmp_path / "two")["models"]["student"]["parameters"] > 0
