"""A run without transformers' Trainer: its stages, and what its results say."""

from pathlib import Path
from typing import Any

import pytest

from common import report
from common.arguments import RunArguments
from common.run import Run
from common.utils.errors import UserError
from common.utils.files import read_json, write_json


class Number:
    """The smallest thing that a stage can make."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save_pretrained(self, folder: str | Path) -> None:
        write_json(Path(folder, "number.json"), self.value)

    @classmethod
    def load(cls, folder: str) -> "Number":
        return cls(read_json(Path(folder, "number.json")))


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
    report.validate(found)
    return found


@pytest.mark.parametrize(
    ("floor", "teacher", "student", "retention"),
    [(0.0, 0.8, 0.6, 0.75), (20.0, 500.0, 260.0, 0.5), (-1200.0, -150.0, -360.0, 0.8), (10.0, 9.0, 8.0, None)],
)  # fmt: skip
def test_retention_counts_from_no_skill_at_all(tmp_path, floor, teacher, student, retention):
    found = results(tmp_path, floor, teacher=teacher, student=student)
    assert found["retention"] == (None if retention is None else pytest.approx(retention))


def test_more_is_better_of_retention_and_gain_also_where_less_is_better_of_the_metric(tmp_path):
    found = results(tmp_path, 0.0, True, teacher=20.0, control=30.0, student=25.0)
    assert (found["retention"], found["gain_over_control"]) == (0.8, 5.0)


def test_other_models_follow_teacher_control_and_student(tmp_path):
    found = results(tmp_path, 0.0, student=3.0, baseline=2.0, control=1.0)
    assert list(found["models"]) == ["teacher", "control", "student", "baseline"]
    assert found["models"]["teacher"] is None and found["retention"] is None and found["gain_over_control"] == 2.0
    report.write_report(tmp_path, found, {"student": [{"steps": 5, "loss": 1.0, "eval_score": 2.0}]}, progress="steps")
    assert "baseline" in (tmp_path / "report.md").read_text()


def test_a_finished_stage_is_loaded_and_a_run_is_not_overwritten(tmp_path):
    args = RunArguments(output_dir=str(tmp_path / "run"))
    assert Run(args).stage("student", lambda: Number(7), Number.load).value == 7
    with pytest.raises(UserError, match="holds an unfinished run"):
        Run(args)
    again = RunArguments(output_dir=args.output_dir, resume_from_checkpoint=True)

    def never() -> Number:
        raise AssertionError("built again")

    assert Run(again).stage("student", never, Number.load).value == 7
    with pytest.raises(UserError, match=r"other arguments: seed \(was 0, now 1\)"):
        Run(RunArguments(output_dir=args.output_dir, resume_from_checkpoint=True, seed=1))


def test_show_metrics_prints_intervals(capsys):
    report.show_metrics("model", {"metrics": {"test": {"mean": 0.5, "interval": [0.25, 0.75], "episodes": 4}}}, None)
    shown = capsys.readouterr().out
    assert "0.500000" in shown and "[0.2500, 0.7500]" in shown
