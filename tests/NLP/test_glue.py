"""GLUE tasks, systems and seeds on a few artificial rows: one table, and shared stages train once."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from kd.common.reporting.results import validate
from kd.nlp.data.columns import GLUE, TASKS
from kd.nlp.student_model.arguments import GLUE_TASKS
from kd.nlp.student_model.glue_report import OFFICIAL, Runs, retentions, task_rows
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script
from kd_testing.verdicts import check_verdict

BRIEF = (
    "--teacher tiny-bert --from_scratch_epochs 1 --align_epochs 1 --num_train_epochs 1 --value_epochs 1 --codebooks 8"
)
BRIEF += " --codebook_size 8 --report_to none --per_device_train_batch_size 16"
COLORS, THINGS = ("red", "blue", "green", "grey"), ("cat", "hat", "car", "tree", "lamp")


@pytest.fixture(scope="module")
def glue(narrow_bert, tmp_path_factory) -> Path:
    """RTE with classes as labels, STS-B with numbers, and MNLI with two validation splits."""
    folder = tmp_path_factory.mktemp("glue")
    pairs = [(a, b) for a in COLORS for b in THINGS]
    texts = {"sentence1": [f"the {b} is {a}" for a, b in pairs], "sentence2": [f"a {a} {b}" for a, b in pairs]}
    label = datasets.ClassLabel(names=["entailment", "not_entailment"])
    entailment = datasets.Features({name: datasets.Value("string") for name in texts} | {"label": label})
    rte = datasets.Dataset.from_dict(texts | {"label": [i % 2 for i in range(20)]}, features=entailment)
    stsb = datasets.Dataset.from_dict(texts | {"label": [i % 6 * 0.9 for i in range(20)]})
    mnli = datasets.Dataset.from_dict({"premise": texts["sentence1"], "hypothesis": texts["sentence2"],
                                       "label": [i % 3 for i in range(20)]})  # fmt: skip
    mnli = mnli.cast_column("label", datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]))
    validated = {"mnli": ("validation_matched", "validation_mismatched")}
    for task, rows in {"glue_rte": rte, "stsb": stsb, "mnli": mnli}.items():
        for split in ("train", *validated.get(task, ["validation"])):
            rows.to_parquet(folder / task / f"{split}.parquet")
    return folder


def distill(glue: Path, *words: object) -> None:
    run_script("NLP/scripts/distill_glue.py", *BRIEF.split(), "--glue_folder", glue, *words)


def results(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


@pytest.mark.slow
def test_one_table_and_shared_stages_train_once(glue, tmp_path, capsys):
    words = ["--tasks", "rte", "stsb", "--systems", "base", "keys_carried", "--output_dir", tmp_path / "glue"]
    distill(glue, *words)
    task = tmp_path / "glue" / "rte"
    assert {path.name for path in (task / "shared" / "seed0" / "stages").iterdir()} == {
        "teacher_encoder", "teacher", "control_encoder", "control", "student_encoder_cls", "student_encoder_mean",
    }  # fmt: skip
    assert not (task / "keys_carried" / "seed0" / "stages" / "teacher_encoder").exists()
    kd, carried = results(task / "base" / "seed0"), results(task / "keys_carried" / "seed0")
    assert kd["seconds"]["teacher"] > 0 and carried["seconds"]["teacher"] > 0
    table = (tmp_path / "glue" / "glue.md").read_text()
    score = results(tmp_path / "glue" / "stsb" / "base" / "seed0")["models"]["student"]["metrics"]["validation"]
    check_verdict(results(tmp_path / "glue" / "stsb" / "base" / "seed0"))
    check_verdict(kd)
    word = kd["verdict"]["control"]["word"]
    assert "KD against its control: " in table and f"{word} on rte" in table
    assert f"| {score['pearson']:.4f} |" in table and "| rte | accuracy | 1 |" in table
    assert table.count("| stsb |") == 2  # it is not a classification task
    means = results(tmp_path / "glue" / "rte" / "base")
    assert (task / "base" / "student" / "model.safetensors").exists()  # the first seed's
    assert means["seeds"] == [0] and means["models"]["student"]["metrics"] == kd["models"]["student"]["metrics"]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "glue").glob("**/seed0/**/model.safetensors")}
    capsys.readouterr()
    more = [*words[:1], "rte", "--systems", "student_only", "new_keys", *words[-2:]]
    with pytest.raises(SystemExit) as stopped:  # the shared stages have 8 codebooks
        distill(glue, *more, "--codebooks", 4)
    assert stopped.value.code == 2 and "codebooks (was 8, now 4)" in capsys.readouterr().err
    assert not (task / "student_only").exists()
    distill(glue, *more)
    assert not list(task.glob("*_*/*/stages/teacher")) and not list(task.glob("*_*/*/stages/control"))
    new, only = results(task / "new_keys" / "seed0"), results(task / "student_only" / "seed0")
    assert new["models"]["teacher"]["metrics"] == carried["models"]["teacher"]["metrics"]
    assert only["seconds"]["control"] == carried["seconds"]["control"] == new["seconds"]["control"]  # trained once
    distill(glue, *words)
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    with pytest.raises(SystemExit) as stopped:
        distill(glue, *words, "--alpha", 0.9)
    assert stopped.value.code == 2 and "alpha (was 0.5, now 0.9)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_student_does_not_depend_on_the_system_that_aligned_its_encoder(glue, tmp_path):
    """A student with a bottleneck has no pooler, but a plain student has one."""
    students = []
    for systems in (["base", "keys_carried"], ["keys_carried", "base"]):
        folder = tmp_path / systems[0]
        distill(glue, "--tasks", "rte", "--systems", *systems, "--pooling", "cls", "--no_control",
                "--output_dir", folder)  # fmt: skip
        assert (folder / "rte" / "shared" / "seed0" / "stages" / "student_encoder_cls").exists()
        students.append(load_file(folder / "rte" / "base" / "seed0" / "student" / "model.safetensors"))
    assert students[0].keys() == students[1].keys()
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


@pytest.mark.slow
def test_more_seeds_train_only_the_missing_ones(glue, tmp_path):
    words = ["--tasks", "rte", "--systems", "base", "--no_control", "--output_dir", tmp_path / "glue"]
    system = tmp_path / "glue" / "rte" / "base"
    for seeds, finished in (([1], [1]), ([0], [1, 0]), ([0, 2], [0, 1, 2])):
        before = {path: path.stat().st_mtime_ns for path in system.glob("seed*/results.json")}
        distill(glue, *words, "--seeds", *seeds)
        assert (
            results(system)["seeds"] == finished
            and "| rte | accuracy |" in (system.parents[1] / "glue.md").read_text()
        )
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    students = [load_file(system / f"seed{seed}" / "student" / "model.safetensors") for seed in (0, 1)]
    assert any(not torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_large_tasks_train_for_fewer_epochs(glue, tmp_path):
    folder = tmp_path / "glue"
    distill(glue, "--tasks", "rte", "--systems", "base", "--max_samples_seen", 10, "--no_control",
            "--output_dir", folder)  # fmt: skip
    recipe = (folder / "rte" / "base" / "seed0" / "recipe.yaml").read_text()
    assert "num_train_epochs: 0.5" in recipe and "align_epochs: 0.5" in recipe


def test_overwriting_a_task_removes_the_stages_that_its_systems_share(glue, tmp_path):
    task = tmp_path / "glue" / "rte"
    shared = task / "shared" / "seed0"
    words = ["--tasks", "rte", "--max_samples_seen", 10, "--no_control", "--output_dir", tmp_path / "glue"]
    distill(glue, *words, "--systems", "keys_carried")
    teacher = shared / "stages" / "teacher_encoder" / "model.safetensors"
    first = teacher.stat().st_mtime_ns
    (shared / "thesis.tex").write_text("mine")
    distill(glue, *words, "--systems", "base", "--overwrite_output_dir")
    assert (task / "base" / "seed0" / "results.json").exists() and (shared / "thesis.tex").exists()
    assert (
        not (task / "keys_carried" / "seed0" / "results.json").exists()
        and not (shared / "stages" / "teacher").exists()
    )
    assert teacher.stat().st_mtime_ns > first  # trained again


def test_a_system_cannot_continue_a_task_with_changed_data(glue, tmp_path, capsys):
    data, words = tmp_path / "data", ["--tasks", "rte", "--no_control", "--output_dir", tmp_path / "glue"]
    shutil.copytree(glue, data)
    distill(data, *words, "--systems", "base")
    rows = datasets.Dataset.from_parquet(str(data / "glue_rte" / "train.parquet"), keep_in_memory=True)
    rows.select(range(18)).to_parquet(data / "glue_rte" / "train.parquet")
    with pytest.raises(SystemExit) as stopped:
        distill(data, *words, "--systems", "keys_carried")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"cannot continue {tmp_path / 'glue' / 'rte'}: data and teacher tokenizer changed" in error


def test_mnli_is_evaluated_on_both_validation_splits(glue, tmp_path):
    folder = tmp_path / "glue"
    distill(glue, "--tasks", "mnli", "--systems", "base", "--max_samples_seen", 20, "--no_control",
            "--output_dir", folder)  # fmt: skip
    found = results(folder / "mnli" / "base" / "seed0")
    validate(found)
    assert found["data"]["validation"] == 40 and found["data"]["validation_mismatched"] == 20
    card = (folder / "mnli" / "base" / "seed0" / "student" / "README.md").read_text()
    assert "measured on 20 samples of the validation_matched split" in card
    assert run_readme(folder / "mnli" / "base" / "seed0" / "student")["logits"].shape == (1, 3)
    assert 'tokenizer("some text", "another text"' in card
    table = (folder / "glue.md").read_text()
    assert "| mnli | accuracy, matched | 1 |" in table and "| mnli | accuracy, mismatched | 1 |" in table


def test_rows_of_the_table():
    def run(teacher: float, student: float) -> dict:
        models = {"teacher": teacher, "control": 0.5, "student": student}
        return {"models": {role: {"metrics": {"validation": {"matthews": s}}} for role, s in models.items()}}

    runs: Runs = {"base": [run(0.8, 0.6), run(0.5, 0.5)], "keys_carried": [run(0.8, 0.7)]}
    runs |= {"new_keys": [], "student_only": []}
    assert retentions(runs["base"], "validation", "matthews") == pytest.approx([0.75, 1.0])
    row = task_rows("cola", runs, ["matthews"])[0]
    assert row == ["cola", "Matthews correlation", "2", "0.6500 ± 0.2121", "0.5000 ± 0.0000", "0.5500 ± 0.0707",
                   "0.7000", "–", "–", "0.8750 ± 0.1768"]  # fmt: skip


def test_the_primary_metric_of_each_task_comes_first():
    assert list(GLUE_TASKS) == [name for name, task in TASKS.items() if task.hub.startswith(GLUE)]
    assert {task: metrics[0] for task, metrics in OFFICIAL.items()} == {
        task: TASKS[task].metric for task in GLUE_TASKS
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "wnli"], "--tasks must be some of cola"),
        (["--systems", "dino"], "--systems must be some of base"),
        (["--tasks", "cola"], "contains neither cola nor glue_cola"),
        (["--tasks", "rte", "--max_samples_seen", "0"], "--max_samples_seen must be at least 1"),
    ],
)
def test_invalid_arguments_give_one_line(glue, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        distill(glue, *words, "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_glue_without_a_folder_needs_the_hub(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("NLP/scripts/distill_glue.py", "--tasks", "rte", "--max_steps", 3, "--output_dir", tmp_path / "run")
    assert stopped.value.code == 2 and "--dataset FOLDER" in capsys.readouterr().err
