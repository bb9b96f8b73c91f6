"""`--teacher_logits` of the scripts for language models and translators."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from kd.nlp.student_model.prompts import PromptTask
from kd.nlp.student_model.teacher_logits import LogitStore
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2
from kd_testing.scripts import recipe_of, run_script

GPT, TRANSLATION = "NLP/scripts/distill_gpt.py", "NLP/scripts/distill_translation.py"
VOCABULARY = 270
TINY = (
    "--teacher_epochs 0 --student_layers 1 --block_size 16 --num_train_epochs 1 --report_to none --precision fp32 "
    "--save_strategy no --eval_strategy no --temperature 1 --alpha 0"
).split()
TINY_TRANSLATOR = (
    "--teacher_layers 1 --teacher_width 32 --student_width 32 --vocabulary_size 120 --max_length 12 --beams 1 "
    "--teacher_epochs 1 --num_train_epochs 1 --per_device_train_batch_size 16 --precision fp32 --report_to none "
    "--max_train_samples 48 --max_eval_samples 8"
).split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a few texts in `data`, and in `teacher` a GPT-2 whose distributions depend on its input."""
    folder = tmp_path_factory.mktemp("inputs")
    words = ["tea", "milk", "sugar", "cup", "water", "lemon", "ginger", "honey"]
    for split, number in (("train", 40), ("validation", 4)):
        texts = [" ".join(words[(i * j + j) % 8] for j in range(1, 30)) for i in range(number)]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "data" / f"{split}.parquet")
    tokenizer = byte_level_bpe([" ".join(words)] * 9, VOCABULARY, 16)
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    teacher = random_gpt2(len(tokenizer), 0, layers=2, width=32, positions=16, dropout=0.0)
    with torch.no_grad():
        teacher.transformer.wte.weight *= 20
    teacher.save_pretrained(folder / "teacher")
    return folder


def distill(inputs: Path, folder: Path, *words: object) -> dict[str, Any]:
    named = ["--dataset", inputs / "data", "--teacher", inputs / "teacher", "--output_dir", folder]
    run_script(GPT, recipe_of(*TINY), *named, "--no_control", *words)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory) -> Path:
    """A folder with the logits of the whole vocabulary, filled by a run of two seeds, in `seeds` next to it."""
    folder = tmp_path_factory.mktemp("runs")
    stored = "--teacher_logits", f"top:k={VOCABULARY}", "--teacher_logits_folder", folder / "logits"
    distill(inputs, folder / "seeds", *stored, "--seeds", "0,1")
    return folder / "logits"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def test_students_learn_the_same_from_the_folder_as_from_the_live_teacher(inputs, shared, tmp_path):
    """On labels of weight zero, with shuffled blocks. The weights are compared with how far training moved them."""
    distill(inputs, tmp_path / "live")
    live, stored, other = (
        weights(run) for run in (tmp_path / "live", *(shared.parent / "seeds" / f"seed{i}" for i in (0, 1)))
    )
    start = load_file(inputs / "teacher" / "model.safetensors")
    name = "transformer.wte.weight"
    moved = (live[name] - start[name]).norm()
    assert (live[name] - stored[name]).norm() < 0.02 * moved < 0.2 * (live[name] - other[name]).norm()


def test_another_student_reads_the_folder_without_the_teacher(inputs, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(LogitStore, "_compress", lambda *_, **__: pytest.fail("the teacher runs"))
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*") if path.is_file() and path.name != ".lock"}
    words = "--teacher_logits", f"top:k={VOCABULARY}", "--teacher_logits_folder", shared
    found = distill(inputs, tmp_path / "run", *words, "--student", "scratch", "--student_width", 32)
    assert found["method"] == f"kd, top:k={VOCABULARY}"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert found["seconds"]["teacher_outputs"] > 0


@pytest.mark.parametrize(
    ("words", "message", "is_early"),
    [
        (["--teacher_logits", "bottom:k=3"], "only top, sample", True),
        (["--teacher_logits", "sample:k=0"], "k must be between 1 and 2048", True),
        (["--teacher_logits", "sample", "--method", "js"], "--method js is not: pass --method kd", True),
        (["--teacher_logits", "top", "--method", "tv"], "forward divergence alone", True),
        (["--teacher_logits", "top", "--hidden_weight", "1"], "leave --teacher_logits out", True),
        (["--teacher_logits", "top", "--on_policy_share", "0.5"], "leave --teacher_logits out", True),
        (["--teacher_logits_folder", "x"], "--teacher_logits is not set", True),
        (["--teacher_logits", "sample", "--teacher_logits_folder", "SHARED"], "another form", True),
        (
            ["--teacher_logits", "WHOLE", "--teacher_logits_folder", "SHARED", "--temperature", "2"],
            "temperature",
            True,
        ),
        (["--teacher_logits", "WHOLE", "--teacher_logits_folder", "DATA"], "has no teacher_logits.json", True),
        (["--teacher_logits", "top:k=271"], "pass k=270", False),
        (
            ["--teacher_logits", "WHOLE", "--teacher_logits_folder", "SHARED", "--block_size", "8"],
            "training data",
            False,
        ),
        (
            ["--teacher_logits", "WHOLE", "--teacher_logits_folder", "SHARED", "--max_train_samples", "9"],
            "another training data",
            False,
        ),
        (
            ["--teacher_logits", "WHOLE", "--teacher_logits_folder", "SHARED", "--teacher_epochs", "0.2"],
            "another teacher",
            False,
        ),
    ],
)
def test_invalid_arguments_and_another_content_give_one_line(
    capsys, inputs, shared, tmp_path, words, message, is_early
):
    named = {"SHARED": shared, "DATA": inputs / "data", "WHOLE": f"top:k={VOCABULARY}"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distill(inputs, tmp_path / "run", *(named.get(word, word) for word in words))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: ") and message in error, error
    assert not (is_early and (tmp_path / "run").exists())
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("is_packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_prompts_only_completions_are_stored(tmp_path, monkeypatch, is_packed):
    monkeypatch.setattr(PromptTask, "packs", is_packed)
    words = "--dataset", "answers", "--max_train_samples", 60, "--max_eval_samples", 8, "--student", "scratch"
    teacher = "--teacher_layers 1 --teacher_width 32 --student_width 32 --teacher_epochs 1 --vocabulary_size 270"
    stored = "--teacher_logits", "top:k=2", "--no_control", "--output_dir", tmp_path / "run", "--precision", "fp32"
    run_script(
        GPT, *words, *teacher.split(), *stored, "--num_train_epochs", 1, "--block_size", 96, "--report_to", "none"
    )
    shards = list((tmp_path / "run" / "teacher_logits").glob("*/*/outputs.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])
    tokens = json.loads((tmp_path / "run" / "results.json").read_text())["corpus"]["tokens"]["train"]
    assert sum(map(len, rows["tokens"])) == tokens
    assert (len(rows) < 60) == is_packed


def test_a_translator_learns_from_samples_of_the_teacher(tmp_path):
    """Of the distributions at the teacher's translations, which are stored in the run's folder and removed with it."""
    words = "--output_dir", tmp_path / "run", "--no_control", "--teacher_logits", "sample:k=4"
    run_script(TRANSLATION, recipe_of(*TINY_TRANSLATOR), *words)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["method"] == "sequence_kd+kd, sample:k=4"
    shards = list((tmp_path / "run" / "teacher_logits").glob("*/*/outputs.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])
    assert sorted(rows["sample_id"]) == list(range(48))
    assert all(sum(sizes) == len(tokens) for sizes, tokens in zip(rows["sizes"], rows["tokens"], strict=True))
    run_script(TRANSLATION, recipe_of(*TINY_TRANSLATOR), *words[:3], "--method", "kd", "--overwrite_output_dir")
    assert not (tmp_path / "run" / "teacher_logits").exists()
