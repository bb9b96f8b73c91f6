"""Several seeds of one command: runs in seedN, their shared stages, and the results over all seeds."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from scipy import stats

from kd.common.cli import parse
from kd.common.metrics.verdict import AT_LEAST, OVER_SEEDS, measure_mean
from kd.common.reporting.__main__ import read_runs
from kd.common.reporting.model_card import Card
from kd.common.reporting.report import headline
from kd.common.reporting.results import over_seeds, retention_interval, validate
from kd.common.training.arguments import KDTrainingArguments, RunArguments
from kd.common.training.run import Run
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd_testing.processes import in_processes
from kd_testing.tiny import Number

TEACHER = 80.0
NOISE = np.linspace(-2, 2, 50)  # of the examples, with a mean of 0


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
        scores = {role: model["metrics"]["test"]["score"] for role, model in models.items()}
        noise = {"teacher": 1, "control": -1, "student": 1}  # the gain over the control varies over examples
        measurements = {role: measure_mean(score + noise[role] * NOISE) for role, score in scores.items()}
        results = one.results("d", "t", "m", sizes, models, "test", "score", measurements=measurements)
        one.finish(results, student, Card("use"))
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
    assert Number.load(str(tmp_path / "student")).value == 3  # the first seed, although the other student is better
    cards = [(tmp_path / name / "student" / "README.md").read_text() for name in ("seed3", ".")]
    assert "one run, seed 3: the variation over seeds is not known" in cards[0]
    assert "over the seeds 3, 0:" in cards[1] and "The weights are those of seed 3." in cards[1]
    runs, problems = read_runs([tmp_path])
    assert sorted(run["seed"] for run in runs) == [0, 3] and not problems
    assert distill(tmp_path / "seed0", None, resume_from_checkpoint=True) == []  # uses the shared stages


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
        PartialState(cpu=True)  # as KDTrainingArguments creates it
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


def test_the_verdict_over_seeds_is_that_of_a_paired_t_test(tmp_path, capsys):
    distill(tmp_path, [3, 0, 4])
    verdict = read_json(tmp_path / "results.json")["verdict"]
    runs = [read_json(tmp_path / f"seed{seed}" / "results.json") for seed in (3, 0, 4)]
    gains = [run["gain_over_control"] for run in runs]
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    control, teacher = verdict["control"], verdict["teacher"]
    assert control["gain"] == pytest.approx(statistics.fmean(gains))
    assert control["interval"] == pytest.approx([expected.low, expected.high])
    assert (control["method"], control["seeds"], control["word"]) == (OVER_SEEDS, 3, "better")
    assert teacher["word"] == "worse" and teacher["margin"] == pytest.approx(0.8) and verdict["shared_teacher"]
    assert not teacher["not_worse_by_margin"] and not verdict["warnings"]
    sentence = "Verdict: better than the control (gain 22.33, 95% interval"
    assert sentence in (tmp_path / "report.md").read_text() and sentence in capsys.readouterr().out
    for run in runs:
        found = run["verdict"]["control"]
        assert found["word"] == "better (one seed)" and found["interval"][0] < found["gain"] < found["interval"][1]


def test_the_interval_of_the_retention_is_that_of_the_verdict_on_the_teacher(tmp_path):
    """Students 43, 40 and 44, teacher 80: the differences have the mean -37.667 and the deviation 2.0817. The t of two
    degrees of freedom is 4.3027, so that the half width is 4.3027 * 2.0817 / sqrt(3) = 5.1713.
    """
    distill(tmp_path, [3, 0, 4])
    results, seed = read_json(tmp_path / "results.json"), read_json(tmp_path / "seed3" / "results.json")
    low, high = 1 + (-37.6667 - 5.1713) / 80, 1 + (-37.6667 + 5.1713) / 80
    assert results["retention_interval"] == pytest.approx([low, high], abs=1e-5)
    assert f"{results['retention']:.1%} of the teacher's 80.00 (95% interval 46.5% to 59.4%)" in headline(results)
    assert seed["retention_interval"] == pytest.approx([1 - 37 / 80] * 2), "the examples vary alike in both"
    results["verdict"]["teacher"]["interval"], results["floor"] = [-9.0, 3.6], -100.0
    assert retention_interval(results) == pytest.approx([0.95, 1.02])
    results["verdict"]["shared_teacher"] = False
    assert retention_interval(results) is None


def test_the_interval_over_seeds_is_not_narrower_than_over_examples(tmp_path):
    distill(tmp_path, [3, 103])
    runs = [read_json(tmp_path / f"seed{seed}" / "results.json") for seed in (3, 103)]
    for run in runs:
        run["verdict"]["control"]["gain"] = 20.0
    low, high = over_seeds(runs)["verdict"]["control"]["interval"]
    widths = [np.diff(run["verdict"]["control"]["interval"])[0] for run in runs]
    assert high - low == pytest.approx(statistics.fmean(widths))
    assert over_seeds(runs)["verdict"]["control"]["method"] == AT_LEAST


def test_a_run_of_an_earlier_version_leaves_the_verdict_out(tmp_path):
    distill(tmp_path, [3, 0])
    runs = [read_json(tmp_path / f"seed{seed}" / "results.json") for seed in (3, 0)]
    del runs[0]["verdict"]
    for results in (runs[0], over_seeds(runs)):
        validate(results)
        assert "verdict" not in results and "Verdict" not in headline(results)


def test_the_verdict_warns_of_a_useless_teacher_and_a_constant_student(tmp_path):
    run = Run(RunArguments(output_dir=str(tmp_path), margin=7.0))
    values = {"teacher": 20 + NOISE, "control": 21 + NOISE, "student": np.full(50, 19.0)}
    measurements = {role: measure_mean(found, bool((found == 19).all())) for role, found in values.items()}
    models = {role: entry(float(found.mean())) for role, found in values.items()}
    sizes = {"train": 9, "validation": None, "test": 4, "fingerprint": "f"}
    results = run.results("d", "t", "m", sizes, models, "test", "score", measurements=measurements)
    validate(results)
    assert results["verdict"]["warnings"] == [
        "the teacher is no better than the control: check it before distilling from it",
        "the student predicts the same for all inputs of the evaluation",
    ]
    assert results["verdict"]["teacher"]["margin"] == 7
    assert "not worse than the teacher by more than 7.000." in headline(results)
    finished = over_seeds([results, results | {"seed": 1}])
    assert finished["verdict"]["warnings"] == results["verdict"]["warnings"]


def test_the_verdict_warns_of_too_few_seeds(tmp_path):
    distill(tmp_path, [10, 20, 60])
    runs = [read_json(tmp_path / f"seed{seed}" / "results.json") for seed in (10, 20, 60)]
    for run, gain in zip(runs, (0.0, 1.0, 2.0), strict=True):
        run["verdict"]["control"] |= {"gain": gain, "interval": [gain, gain]}
    (warning,) = over_seeds(runs)["verdict"]["warnings"]  # an effect of one standard deviation: 10 seeds
    assert warning.startswith("3 seeds are too few to show a gain over the control of this size: about 10 are needed")
