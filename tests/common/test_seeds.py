"""Several seeds of one command: runs in seedN, their shared stages, and the results over all seeds."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from kd.common.cli import parse
from kd.common.reporting.__main__ import read_runs
from kd.common.reporting.results import validate
from kd.common.training.arguments import KDTrainingArguments, RunArguments
from kd.common.training.run import Run
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd_testing.processes import in_processes
from kd_testing.tiny import Number

TEACHER = 80.0


def entry(score: float) -> dict[str, Any]:
    return {
        "name": "n", "parameters": 7, "megabytes": 0.1, "flops": None,
        "latency_ms": {"batch": 1, "median": 1.0, "p90": 1.0},
        "metrics": {"test": {"score": score, "interval": [score - 1, score + 1]}},
    }  # fmt: skip


def distill(folder: Path, seeds: list[int] | None, killed_in: int | None = None, **others: Any) -> list[str]:
    """A run with the structure of the scripts: the teacher before the loop over seeds, the student inside. Returns the
    names of the models that were built.
    """
    built: list[str] = []

    def build(name: str, value: int) -> Number:
        built.append(f"{name} {value}")
        return Number(value)

    run = Run(RunArguments(output_dir=str(folder), seeds=seeds, **others))
    run.check_inputs("data")
    teacher = run.stage("teacher", lambda: build("teacher", run.args.seed), Number.load)
    run.warn("the teacher is weak")
    for one in run.each_seed():
        if one.args.seed == killed_in:
            raise KeyboardInterrupt
        student = one.stage("student", partial(build, "student", one.args.seed), Number.load)
        assert one.stage("teacher", lambda: build("never", 0), Number.load).value == teacher.value
        models = {"teacher": entry(TEACHER), "control": entry(20.0), "student": entry(40.0 + student.value)}
        sizes = {"train": 9 + one.args.seed, "validation": None, "test": 4, "fingerprint": "f"}
        results = one.results("d", "t", "m", sizes, models, "test", "score")
        one.finish(results, student, "use", domain="d")
    run.summarize()
    return built


def test_results_are_means_and_standard_deviations_over_seeds(tmp_path):
    assert distill(tmp_path, [3, 0, 4]) == ["teacher 3", "student 3", "student 0", "student 4"]
    results = read_json(tmp_path / "results.json")
    validate(results)
    scores = [43.0, 40.0, 44.0]
    assert results["seeds"] == [3, 0, 4] and "seed" not in results
    assert results["models"]["student"]["metrics"]["test"]["score"] == pytest.approx(statistics.fmean(scores))
    assert results["models"]["student"]["metrics"]["test"]["interval"] is None  # no mean of intervals
    assert results["models"]["teacher"]["metrics"]["test"] == {"score": TEACHER, "interval": [79.0, 81.0]}
    assert results["models"]["student"]["parameters"] == 7
    assert results["gain_over_control"] == pytest.approx(statistics.fmean(scores) - 20)
    deviations = results["standard_deviations"]
    assert deviations["models"]["student"]["test"]["score"] == pytest.approx(statistics.stdev(scores))
    assert "teacher" not in deviations["models"]  # one for all seeds
    assert deviations["gain_over_control"] == pytest.approx(statistics.stdev(scores))
    assert deviations["retention"] == pytest.approx(statistics.stdev(scores) / TEACHER)
    assert results["data"]["train"] == 11, "rounded"
    assert results["warnings"] == ["the teacher is weak"]
    assert "± 2.08" in (tmp_path / "report.md").read_text()


def test_each_seed_has_a_complete_run_and_the_student_is_that_of_the_first_seed(tmp_path):
    distill(tmp_path, [3, 0])
    assert not (tmp_path / "seed3" / "stages" / "teacher").exists()
    for seed in (3, 0):
        results = read_json(tmp_path / f"seed{seed}" / "results.json")
        validate(results)
        assert results["seed"] == seed and results["warnings"] == ["the teacher is weak"]
        assert results["seconds"]["teacher"] > 0
        assert f"seed: {seed}\n" in (tmp_path / f"seed{seed}" / "recipe.yaml").read_text()
    assert Number.load(str(tmp_path / "student")).value == 3  # not the better one
    runs, problems = read_runs([tmp_path])
    assert sorted(run["seed"] for run in runs) == [0, 3] and not problems
    assert distill(tmp_path / "seed0", None, resume_from_checkpoint=True) == []  # with the stages that it shares


def test_a_killed_run_continues_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path, [3, 0, 4], killed_in=0)
    assert not (tmp_path / "results.json").exists()
    assert distill(tmp_path, [3, 0, 4], resume_from_checkpoint=True) == ["student 0", "student 4"]
    assert read_json(tmp_path / "results.json")["seeds"] == [3, 0, 4]
    with pytest.raises(UserError, match="other arguments: seeds"):
        distill(tmp_path, [3, 0], resume_from_checkpoint=True)


def test_starting_over_removes_the_runs_of_all_seeds(tmp_path):
    distill(tmp_path, [3, 0])
    (tmp_path / "seed0" / "notes.txt").write_text("mine")
    assert distill(tmp_path, [5, 6], overwrite_output_dir=True) == ["teacher 5", "student 5", "student 6"]
    assert not (tmp_path / "seed3").exists() and (tmp_path / "seed0" / "notes.txt").read_text() == "mine"


def test_several_processes_share_each_seed(tmp_path):
    def of_group() -> list[str]:
        PartialState(cpu=True)  # as KDTrainingArguments make it
        return distill(tmp_path / "run", [3, 0])

    built = in_processes(2, tmp_path / "processes", of_group)
    assert built == [["teacher 3", "student 3", "student 0"]] * 2
    assert read_json(tmp_path / "run" / "results.json")["seeds"] == [3, 0]


def test_without_seeds_there_are_no_seed_runs(tmp_path):
    assert distill(tmp_path, None, seed=2) == ["teacher 2", "student 2"]
    assert read_json(tmp_path / "results.json")["seed"] == 2 and not list(tmp_path.glob("seed*"))


@pytest.mark.parametrize("words", [["--seeds", "2,0,1"], ["--seeds", "2", "0", "1"], ["--seeds=2,0,1"]])
def test_seeds_are_written_with_commas_or_spaces(words):
    (args,) = parse(RunArguments, argv=words)
    assert args.seeds == [2, 0, 1] and args.seed == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds"], "--seeds must name at least one seed"),
        (["--seeds", "1,1"], "each named once, got 1, 1"),
        (["--seeds", "0,-1"], "--seeds must be"),
        (["--seeds", "0,1", "--seed", "3"], "--seed has no effect"),
        (["--seeds", "0,a"], "'a'"),
    ],
)
@pytest.mark.parametrize("kind", [RunArguments, KDTrainingArguments])
def test_invalid_seeds_are_an_error_of_one_line(capsys, kind, words, message):
    try:
        parse(kind, argv=words)
    except UserError as error:
        assert message in str(error)
    except SystemExit:
        assert message in capsys.readouterr().err
    else:
        raise AssertionError("no error")
