"""A run: its stages, its results, its progress, and sharded training."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd.common.reporting.report import write_report
from kd.common.reporting.results import validate
from kd.common.reporting.saved_models import show_metrics
from kd.common.training.arguments import RunArguments
from kd.common.training.run import Run
from kd.common.training.trainer_run import TrainerRun, log_line
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd_testing.paths import REPO
from kd_testing.tiny import Number, Rows, arguments, kd, model


def entry(score: float) -> dict[str, Any]:
    return {
        "name": "n", "parameters": 1, "megabytes": 0.1, "flops": None,
        "latency_ms": {"batch": 1, "median": 1.0, "p90": 1.0}, "metrics": {"test": {"score": score}},
    }  # fmt: skip


def results(folder: Path, floor: float, lower_is_better: bool = False, **scores: float) -> dict[str, Any]:
    run = Run(RunArguments(output_dir=str(folder)))
    data = {"train": None, "validation": None, "test": 4, "fingerprint": "f"}
    models = {role: entry(score) for role, score in scores.items()}
    found = run.results("d", "t", "m", data, models, "test", "score", floor, lower_is_better)
    validate(found)
    return found


def test_a_warning_is_printed_once_and_is_in_results_and_report(tmp_path, capsys):
    run = Run(RunArguments(output_dir=str(tmp_path)))
    for text in ("the teacher is no better than chance", None, "the teacher is no better than chance"):
        run.warn(text)
    assert capsys.readouterr().err == "warning: the teacher is no better than chance\n"
    data = {"train": None, "validation": None, "test": 4, "fingerprint": "f"}
    found = run.results("d", "t", "m", data, {"student": entry(1.0)}, "test", "score")
    write_report(tmp_path, found, {})
    assert read_json(tmp_path / "results.json")["warnings"] == ["the teacher is no better than chance"]
    assert (tmp_path / "report.md").read_text().count("**Warning:** the teacher is no better than chance") == 1


@pytest.mark.parametrize(
    ("floor", "teacher", "student", "retention"),
    [(0.0, 0.8, 0.6, 0.75), (20.0, 500.0, 260.0, 0.5), (-1200.0, -150.0, -360.0, 0.8), (10.0, 9.0, 8.0, None)],
)  # fmt: skip
def test_retention_counts_from_the_floor(tmp_path, floor, teacher, student, retention):
    found = results(tmp_path, floor, teacher=teacher, student=student)
    assert found["retention"] == (None if retention is None else pytest.approx(retention))


def test_more_retention_and_gain_is_better_also_for_metrics_where_less_is_better(tmp_path):
    found = results(tmp_path, 0.0, True, teacher=20.0, control=30.0, student=25.0)
    assert (found["retention"], found["gain_over_control"]) == (0.8, 5.0)


def test_other_models_follow_teacher_control_and_student(tmp_path):
    found = results(tmp_path, 0.0, student=3.0, baseline=2.0, control=1.0)
    assert list(found["models"]) == ["teacher", "control", "student", "baseline"]
    assert found["models"]["teacher"] is None and found["retention"] is None and found["gain_over_control"] == 2.0
    write_report(tmp_path, found, {"student": [{"steps": 5, "loss": 1.0, "eval_score": 2.0}]}, progress="steps")
    assert "baseline" in (tmp_path / "report.md").read_text()


def test_a_finished_stage_is_loaded_and_a_run_is_not_overwritten(tmp_path):
    args = RunArguments(output_dir=str(tmp_path / "run"))
    assert Run(args).stage("student", lambda: Number(7), Number.load).value == 7
    with pytest.raises(UserError, match="contains an unfinished run"):
        Run(args)
    again = RunArguments(output_dir=args.output_dir, resume_from_checkpoint=True)

    def never() -> Number:
        raise AssertionError("built again")

    assert Run(again).stage("student", never, Number.load).value == 7
    with pytest.raises(UserError, match=r"other arguments: seed \(was 0, now 1\)"):
        Run(RunArguments(output_dir=args.output_dir, resume_from_checkpoint=True, seed=1))


@dataclass
class Inputs:
    teacher: str = "resnet56"
    more: list[str] = field(default_factory=list)


@pytest.mark.parametrize("name", ["teacher", "more"])
def test_a_run_does_not_start_over_if_that_removes_its_inputs(tmp_path, name):
    run = Run(RunArguments(output_dir=str(tmp_path)), Inputs())
    run.stage("teacher", lambda: Number(7), Number.load)
    teacher = str(tmp_path / "stages" / "teacher")
    inputs = Inputs(teacher) if name == "teacher" else Inputs(more=["elsewhere", teacher])
    again = RunArguments(output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(UserError, match=f"would remove {re.escape(teacher)}, which is --{name}"):
        Run(again, inputs)
    assert run.stage("teacher", lambda: Number(8), Number.load).value == 7


def test_show_metrics_prints_intervals(capsys):
    show_metrics("model", {"metrics": {"test": {"mean": 0.5, "interval": [0.25, 0.75], "episodes": 4}}}, None)
    shown = capsys.readouterr().out
    assert "0.500000" in shown and "[0.2500, 0.7500]" in shown


@pytest.mark.parametrize(("terminal", "disabled"), [(True, False), (False, False), (True, True)])
def test_progress_is_readable_lines_and_a_bar_on_a_terminal(terminal, disabled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    args = arguments(tmp_path, disable_tqdm=disabled, logging_strategy="epoch")
    TrainerRun(args).train("student", model(), {}, teacher=model(9), objective=kd(), train_dataset=Rows(24))
    out, err = capsys.readouterr()
    assert re.search(r"^student, epoch 1: loss [\d.]+ \(task [\d.]+, soft targets [\d.]+\)$", out, re.M)
    assert re.search(r"^student, \d+ s, \d+ samples per second$", out, re.M)
    assert ("student: 100%" in err) == (terminal and not disabled) and "{" not in out


@pytest.mark.parametrize("terminal", [True, False])
def test_scripts_show_progress_bars_only_on_a_terminal(terminal, tmp_path):
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import kd.common\nfrom tqdm.auto import tqdm\nlist(tqdm(range(3), ncols=50, nrows=9, disable=False))\n"
    )
    reader, writer = os.openpty() if terminal else os.pipe()
    environment = os.environ | {"PYTHONPATH": str(REPO / "typings")}
    assert subprocess.run([sys.executable, script], env=environment, stderr=writer, timeout=60).returncode == 0
    os.write(writer, b"end")
    output = b""
    while not output.endswith(b"end"):
        output += os.read(reader, 10_000)
    assert (b"100%" in output) == terminal


def test_the_log_line_of_an_evaluation():
    logs = {"eval_accuracy": 0.49274, "eval_oos_recall": 0.5, "eval_runtime": 1.2, "epoch": 2.0, "eval_none": None}
    assert log_line(logs) == "epoch 2: evaluation accuracy 0.4927, oos recall 0.5"


TRAIN_SHARDED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kd.common
from accelerate import PartialState
from accelerate.utils import DistributedType
from kd_testing.tiny import Number, Rows, arguments, kd, model
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.devices import end_processes
folder, sharded = sys.argv[2:]
args = arguments(folder, per_device_train_batch_size=4, num_train_epochs=2, save_strategy="epoch", optim="adamw_torch",
    fsdp=sharded == "sharded", fsdp_config={"fsdp_version": 2, "min_num_params": 10} if sharded == "sharded" else None)
if sharded == "sharded":
    args.device
    PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate leaves FSDP out on CPUs
students = []
for resume in (False, True):
    args.resume_from_checkpoint = resume
    students.append(model())
    TrainerRun(args).train("student", students[-1], {}, teacher=model(9), objective=kd(), train_dataset=Rows(24))
    if PartialState().is_main_process:
        name = "pytorch_model_fsdp.bin" if sharded == "sharded" else "model.safetensors"
        damaged = Path(folder, "checkpoints/student/checkpoint-6", name)
        damaged.write_bytes(damaged.read_bytes()[:100])
    PartialState().wait_for_everyone()
if PartialState().is_main_process:
    torch.save([student.state_dict() for student in students], folder + "/students.pt")
end_processes()
"""


@pytest.mark.slow
def test_sharded_training_in_two_processes_ends_and_resumes_with_the_weights_of_one_process(tmp_path):
    """Compares FSDP over gloo with plain data parallelism."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN_SHARDED)
    for name in ("whole", "sharded"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launcher, script, REPO / "tests", tmp_path / name, name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-6000:]
    students = [
        student
        for name in ("whole", "sharded")
        for student in torch.load(tmp_path / name / "students.pt", weights_only=True)
    ]
    for student in students[1:]:
        torch.testing.assert_close(student, students[0])


class RecordedTrainer:
    """Records what W&B would be named by, in place of a training."""

    runs: list[tuple[str, str]] = []
    state = SimpleNamespace(log_history=[])

    def __init__(self, model: Any, args: Any, **others: Any) -> None:
        self.args = args

    def pop_callback(self, callback: Any) -> None:
        pass

    def train(self, resume_from_checkpoint: bool) -> None:
        self.runs.append((self.args.run_name, os.environ["WANDB_RUN_GROUP"]))

    def finish(self) -> None:
        self.runs.append(("trainer", "finished"))


def test_each_stage_is_a_run_of_wandb(tmp_path, monkeypatch):
    finished = SimpleNamespace(
        finish=lambda: RecordedTrainer.runs.append(("wandb", "finished")), __spec__=ModuleSpec("wandb", None)
    )
    monkeypatch.setitem(sys.modules, "wandb", finished)
    monkeypatch.setattr("kd.common.training.trainer_run.KDTrainer", RecordedTrainer)
    run = TrainerRun(arguments(tmp_path))
    run.args.report_to = ["wandb"]
    for stage in ("control", "student"):
        run.train(stage, model(), {}, train_dataset=[])
    assert "WANDB_RUN_GROUP" not in os.environ
    ends = [("wandb", "finished"), ("trainer", "finished")]
    names = [(f"{tmp_path}/{stage}", str(tmp_path)) for stage in ("control", "student")]
    assert RecordedTrainer.runs == [names[0], *ends, names[1], *ends]
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run.train("student", model(), {}, train_dataset=[])
    assert RecordedTrainer.runs[-3] == (f"{tmp_path}/student", "mine") and os.environ["WANDB_RUN_GROUP"] == "mine"
