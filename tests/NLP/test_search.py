"""Hyperparameter search: the training of a trial, pruning, continuing, the best command, invalid input."""

import csv
import gc
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from kd.common import losses
from kd.common.objective import Objective
from kd.common.training.trainer import KDTrainer
from kd.nlp.data.intents import load_intents
from kd.nlp.data.loading import TextData, Texts, load_text_data
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.teacher_model.teacher import label_config, tiny_bert
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

TRIALS = 12  # of the finished search: the sampler draws ten at random, and two depend on these
CLASSES = {"train": 24, "validation": 12, "test": 3}  # texts per class
QUICK = (
    "--max_steps 4 --per_device_train_batch_size 32 --precision fp32 --report_to none --temperature_range 1 9".split()
)
EVALUATED_TWICE = ["--eval_strategy", "steps", "--eval_steps", "2", "--learning_rate_range", "1e-5", "1e-1"]
STUDENT = ["--student_layers", "1"]


@pytest.fixture(scope="session", autouse=True)
def _freeze_garbage() -> Iterator[None]:
    """The Trainer collects garbage three times per trial, which takes a second for the objects of imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """Texts of four embedded intents."""
    folder = tmp_path_factory.mktemp("data") / "few"
    folder.mkdir()
    for split, rows in load_intents().items():
        names, labels = rows.features["intent"].names, np.array(rows["intent"])
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for label in range(4):
                for i in np.flatnonzero(labels == label)[: CLASSES[split]].tolist():
                    writer.writerow([rows[i]["text"], names[label]])
    return folder


def classifier(folder: Path, data: TextData, steps: int = 0, **config: object) -> Path:
    """A tiny BERT for the labels of `data`, trained for some steps, and its tokenizer."""
    tokenizer = tiny_bert(data).tokenizer
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= label_config(data) | config
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **shape))
    texts = Texts.of(data, tokenizer)
    batch = texts.collate([{k: v for k, v in row.items() if k != "sample_id"} for row in texts.train])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(few, tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("models") / "teacher", load_text_data(str(few)), steps=40)


def search(*words: object, draw: bool = False) -> None:
    quick = QUICK[:-3] if "--search" in words else QUICK  # some searches leave out the temperature
    run_script("NLP/scripts/search.py", *quick, *words, draw=draw)


def found(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


def without_seconds(folder: Path) -> list[dict]:
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found(folder)["trials"]]


@pytest.fixture(scope="session")
def finished(few, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "search"
    words = [*EVALUATED_TWICE, *STUDENT, "--dataset", few, "--teacher", teacher, "--output_dir", folder]
    search(*words, "--trials", TRIALS, draw=True)
    return folder


# ---- trials ----


def test_a_finished_search_has_its_trials_control_and_table(finished):
    result = found(finished)
    trials, complete = result["trials"], [t for t in result["trials"] if t["state"] == "complete"]
    assert [trial["number"] for trial in trials] == list(range(1, TRIALS + 1))
    assert result["best"]["value"] == max(trial["value"] for trial in complete)
    for name, low, high in (("alpha", 0, 1), ("temperature", 1, 9), ("learning_rate", 1e-5, 1e-1)):
        values = [trial["parameters"][name] for trial in trials]
        assert all(low <= value <= high for value in values)
        assert len(set(values)) == TRIALS
    assert result["control"]["parameters"] == {"alpha": 1, "learning_rate": pytest.approx(1e-3)}
    rows = [row.split("|") for row in (finished / "search.md").read_text().splitlines() if row.startswith("| ")][2:]
    assert [row[1].strip() for row in rows[:-1]].index(str(result["best"]["number"])) == 0
    assert rows[-1][1].strip() == "labels only"
    assert (finished / "search.png").stat().st_size > 10_000


def test_trials_below_the_median_are_pruned(finished):
    """A trial is pruned if it is below the median of the earlier complete trials at the same step."""
    pruned = [trial for trial in found(finished)["trials"] if trial["state"] == "pruned"]
    assert pruned
    with sqlite3.connect(finished / "checkpoints" / "search.db") as database:
        rows = database.execute(
            "select t.number, t.state, v.step, v.intermediate_value from trials t join studies s using (study_id)"
            " join trial_intermediate_values v using (trial_id) where s.study_name = 'trials'"
        ).fetchall()
    states = {number: state for number, state, _, _ in rows}
    values = {(number, step): value for number, _, step, value in rows}
    for trial in pruned:
        number = trial["number"] - 1
        step = max(step for other, step in values if other == number)
        before = [values[n, step] for n in range(number) if states[n] == "COMPLETE"]
        assert trial["value"] == values[number, step]
        assert max(v for (n, _), v in values.items() if n == number) < np.median(before)


def test_trials_start_from_the_same_weights_and_train_with_their_parameters(few, teacher, tmp_path, monkeypatch):
    recorded: list[dict[str, float]] = []
    starts: list[dict[str, torch.Tensor]] = []
    compute, kl, optimizer_of = Objective.forward, losses.soft_target_kl, KDTrainer.create_optimizer

    def create_optimizer(trainer, model=None):
        starts.append({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
        optimizer = optimizer_of(trainer, model)
        recorded.append({"learning_rate": optimizer.param_groups[0]["lr"]})
        return optimizer

    def forward(objective, *outputs):
        recorded[-1]["alpha"], recorded[-1]["soft"] = (objective.weights.get(n, 0) for n in ("task", "soft_targets"))
        return compute(objective, *outputs)

    def soft_target_kl(student, teacher, temperature):
        recorded[-1]["temperature"] = temperature
        return kl(student, teacher, temperature)

    monkeypatch.setattr(KDTrainer, "create_optimizer", create_optimizer)
    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(losses, "soft_target_kl", soft_target_kl)
    search(*STUDENT, "--dataset", few, "--teacher", teacher, "--trials", 3, "--output_dir", tmp_path)
    control, *trials = recorded
    assert control == {"alpha": 1, "soft": 0, "learning_rate": pytest.approx(1e-4)}
    assert [{k: v for k, v in t.items() if k != "soft"} for t in trials] == [
        trial["parameters"] for trial in found(tmp_path)["trials"]
    ]
    assert all(trial["alpha"] + trial["soft"] == pytest.approx(1) for trial in trials)
    cut = cut_layers(BertForSequenceClassification.from_pretrained(teacher), 1).state_dict()
    assert len(starts) == 4
    assert all(torch.equal(weight, start[name]) for start in starts for name, weight in cut.items())


def test_the_best_command_reproduces_the_value_of_the_best_trial(finished, tmp_path):
    _, script, *words = found(finished)["best_command"]
    run_script(script, *words, "--output_dir", tmp_path / "best")
    measured = json.loads((tmp_path / "best" / "results.json").read_text())["models"]["student"]["metrics"]
    assert measured["validation"]["accuracy"] == pytest.approx(found(finished)["best"]["value"], abs=1e-9)
    assert "test" in measured


def test_the_test_split_has_no_influence(few, teacher, finished, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(few, without)
    (without / "test.csv").unlink()
    words = [*EVALUATED_TWICE, *STUDENT, "--no_control", "--teacher", teacher, "--output_dir", tmp_path / "run"]
    search(*words, "--dataset", without, "--trials", 2)
    assert without_seconds(tmp_path / "run") == without_seconds(finished)[:2]
    assert "test" not in found(finished)["samples"]
    assert found(tmp_path / "run")["control"] is None


def test_a_named_student_with_another_vocabulary(few, teacher, tmp_path):
    data = load_text_data(str(few))
    student = classifier(tmp_path / "student", data, hidden_size=16, num_hidden_layers=1)
    words = [
        "--dataset",
        few,
        "--teacher",
        teacher,
        "--student",
        student,
        "--no_control",
        "--output_dir",
        tmp_path / "s",
    ]
    search(*words, "--trials", 1, "--search", "alpha", "--alpha_range", 0.2, 0.3)
    (trial,) = found(tmp_path / "s")["trials"]
    assert trial["parameters"].keys() == {"alpha"}
    assert 0.2 <= trial["parameters"]["alpha"] <= 0.3
    assert "--student" in found(tmp_path / "s")["best_command"]


def test_a_diverged_trial_does_not_end_the_search(few, teacher, tmp_path, monkeypatch):
    """The first trial diverges, so there is no best trial yet."""
    kl, calls = losses.soft_target_kl, iter(range(10**6))

    def first_is_nan(*args: Any, **options: Any) -> torch.Tensor:
        return kl(*args, **options) * (float("nan") if not next(calls) else 1)

    monkeypatch.setattr(losses, "soft_target_kl", first_is_nan)
    words = [*STUDENT, "--dataset", few, "--teacher", teacher, "--trials", 2, "--no_control", "--output_dir", tmp_path]
    search(*words)
    assert [trial["state"] for trial in found(tmp_path)["trials"]] == ["diverged", "complete"]
    assert found(tmp_path)["trials"][0]["value"] is None
    assert found(tmp_path)["best"]["number"] == 2


# ---- killed and continued searches ----


def test_a_finished_search_is_an_error(finished, few, teacher, capsys):
    with pytest.raises(SystemExit) as stopped:
        search("--dataset", few, "--teacher", teacher, "--output_dir", finished)
    assert stopped.value.code == 2 and f"{finished} contains a finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_search_continues_to_the_same_trials(few, teacher, finished, tmp_path):
    """SIGKILL during the third of four trials."""
    run = tmp_path / "run"
    words = [*EVALUATED_TWICE, *STUDENT, "--dataset", few, "--teacher", teacher, "--trials", 4, "--output_dir", run]
    command = [sys.executable, str(REPO / "NLP" / "scripts" / "search.py"), *QUICK, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (2, "RUNNING") not in states(run):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [state for _, state in states(run)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert not (run / "search.json").exists()
    search(*words, "--resume_from_checkpoint")
    assert without_seconds(run) == without_seconds(finished)[:4]
    assert [state for _, state in states(run)] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_suggestions_of_a_continued_search_depend_on_its_earlier_trials(few, teacher, finished, tmp_path):
    """The folder contains a search without its last trial, the second one that is not random."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(finished / name, tmp_path)
    for name, count in (("control", 1), ("trials", TRIALS - 1)):
        before, after = (f"sqlite:///{folder / 'checkpoints' / 'search.db'}" for folder in (finished, tmp_path))
        study = optuna.create_study(study_name=name, storage=after, direction="maximize")
        study.add_trials(optuna.load_study(study_name=name, storage=before).trials[:count])
    words = [*EVALUATED_TWICE, *STUDENT, "--dataset", few, "--teacher", teacher, "--output_dir", tmp_path]
    search(*words, "--trials", TRIALS, "--resume_from_checkpoint")
    assert without_seconds(tmp_path) == without_seconds(finished)


def states(run: Path) -> list[tuple[int, str]]:
    """(number, state) of all trials except the control."""
    path = run / "checkpoints" / "search.db"
    if not path.exists():
        return []
    query = "select number, state from trials join studies using (study_id) where study_name = 'trials' order by 1"
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute(query).fetchall()
    except sqlite3.OperationalError:  # the database is locked, or has no tables yet
        return []


def test_a_finished_search_is_only_overwritten_with_the_flag(few, teacher, finished, capsys):
    before = found(finished)
    words = [*EVALUATED_TWICE, *STUDENT, "--dataset", few, "--teacher", teacher, "--output_dir", finished]
    with pytest.raises(SystemExit) as stopped:
        search(*words, "--trials", TRIALS)
    assert stopped.value.code == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search(*words, "--trials", TRIALS + 1, "--resume_from_checkpoint")
    assert f"trials (was {TRIALS}, now {TRIALS + 1})" in capsys.readouterr().err
    assert found(finished) == before


# ---- invalid input: one line, exit code 2, no output files ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1"),
        (["--alpha_range", "0.5", "1.5"], "between 0 and 1"),
        (["--alpha_range", "0.5", "0.5"], "the lower one first"),
        (["--temperature_range", "0", "4"], "--temperature_range must be above 0"),
        (["--learning_rate_range", "1e-3"], "takes two numbers"),
        (["--learning_rate_range", "1e-5", "inf"], "--learning_rate_range must be above 0, got inf"),
        (["--search", "alfa"], "got alfa"),
        (["--search"], "got none"),
        (["--student_layers", "9"], "between 1 and the teacher's 2"),
        (["--student", "x", "--student_layers", "1"], "choose one"),
        (["--teacher", "tiny-bert"], "not a trained classifier"),
        (["--teacher", "no/such-model"], "no model no/such-model"),
        (["--max_length", "513"], "--max_length 513: the BertForSequenceClassification takes at most 512 tokens"),
    ],
)
def test_invalid_flags(few, teacher, tmp_path, capsys, words, message):
    flags = [] if "--teacher" in words else ["--teacher", teacher]
    assert message in error_of(capsys, tmp_path / "run", "--dataset", few, *flags, *words)


def test_a_teacher_of_other_labels(few, teacher, tmp_path, capsys):
    assert "4 labels" in error_of(capsys, tmp_path / "run", "--dataset", "intents", "--teacher", teacher)


def test_a_regression_has_no_temperature(tmp_path, capsys):
    rows = "\n".join(f"a text of {i} words,{i / 10}" for i in range(30))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}\n")
    teacher = classifier(tmp_path / "teacher", load_text_data(str(tmp_path)))
    words = ["--dataset", tmp_path, "--teacher", teacher, "--output_dir", tmp_path / "run"]
    assert "--search alpha learning_rate" in error_of(capsys, tmp_path / "run", *words)
    search(*words, "--search", "alpha", "--trials", 1, "--seed", 5)
    assert found(tmp_path / "run")["metric"] == "spearman"
    assert found(tmp_path / "run")["fingerprint"] == load_text_data(str(tmp_path)).fingerprint


def error_of(capsys, folder: Path, *words: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        search("--output_dir", folder, *words)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if not line.endswith("]")]
    error = "\n".join(filter(None, lines))  # without progress bars
    assert stopped.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 0, error
    assert not folder.exists()
    return error
