"""Reports hold the figures of the run; a comparison holds mean and standard deviation over seeds."""

import copy
import csv
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from kd.common import cli
from kd.common.reporting import __main__ as comparison
from kd.common.reporting import plots
from kd.common.reporting.__main__ import main
from kd.common.reporting.plots import Point, plot_curves
from kd.common.reporting.report import headline, print_table, write_report
from kd.common.utils.files import read_json, write_json, write_text
from kd_testing.results import results

HISTORY = {
    "teacher": [],
    "control": [{"loss": 2.0, "epoch": 1.0}, {"eval_loss": 1.5, "eval_accuracy": 0.7, "epoch": 1.0}],
    "student": [
        {"loss": 3.0, "loss_task": 1.0, "learning_rate": 1e-3, "epoch": 1.0, "step": 10},
        {"eval_loss": 1.4, "eval_accuracy": 0.75, "epoch": 1.0, "step": 10},
        {"loss": 2.0, "loss_task": 0.5, "learning_rate": 5e-4, "epoch": 2.0, "step": 20},
        {"eval_loss": 1.2, "eval_accuracy": 0.81, "epoch": 2.0, "step": 20},
        {"train_runtime": 1.0, "train_loss": 2.5, "epoch": 2.0},
    ],
}


def write_runs(folder: Path, *runs: dict[str, Any]) -> list[str]:
    for number, run in enumerate(runs):
        write_json(folder / str(number) / "results.json", run)
    return [str(folder / str(number)) for number in range(len(runs))]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: main(list(argv)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    return error


def test_write_report_writes_three_whole_files(tmp_path: Path) -> None:
    write_report(tmp_path / "run", results(), HISTORY)
    assert sorted(os.listdir(tmp_path / "run")) == ["curves.png", "report.md", "results.json"]
    assert read_json(tmp_path / "run" / "results.json") == results()
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.format == "PNG" and image.width >= 1200 and len(set(image.convert("RGB").getdata())) > 50


@pytest.mark.parametrize("kinds", [["task"], ["task", "soft_targets"], ["task", "soft_targets", "hidden"]])
def test_the_legend_of_many_stages_is_inside_the_figure(monkeypatch: pytest.MonkeyPatch, kinds: list[str]) -> None:
    figures = []
    monkeypatch.setattr("kd.common.reporting.plots.save_figure", lambda figure, path: figures.append(figure))
    log = [
        {"epoch": epoch, "loss": 1.0, "eval_accuracy": 0.5} | {f"loss_{kind}": 1.0 for kind in kinds}
        for epoch in (1.0, 2.0)
    ]
    stages = ["teacher", "control", "student", "teacher_encoder", "control_encoder", "student_encoder"]
    plot_curves("curves.png", dict.fromkeys(stages, log), results(chance=0.1))
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == len(stages) + 2  # chance and final scores
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_report_holds_the_exact_figures(tmp_path: Path) -> None:
    write_report(tmp_path, results(), HISTORY)
    text = (tmp_path / "report.md").read_text()
    assert "validation accuracy of 0.8100, 90.0% of the teacher's 0.9000" in text
    assert "reaches 0.7800: the gain over it is +0.0300" in text
    assert "The student has 1.1% of the teacher's parameters and 12% of its latency." in text
    assert "| student | tiny | 0.8100 | 1,234,567 | 4.938 | 2.47 M | 2.500 | 3.750 |" in text
    assert "| teacher | bert-base | 0.9000 | 109,482,240 | 437.9 | 218.96 M | 20.00 | 30.00 |" in text
    assert "| validation | F1 | 0.8900 | 0.7700 | 0.8000 |" in text
    assert "| test | accuracy | 0.8800 | 0.7600 | 0.7900 |" in text
    assert "Samples: train 15,000, validation 3,000, test 4,500." in text
    assert "| total | 25.50 |" in text and "| device | Some CPU |" in text
    assert "python distill.py --note 'two words'" in text


def test_a_negative_gain_over_the_control_is_reported(tmp_path: Path) -> None:
    write_report(tmp_path, results(student=0.75), {})
    assert "the gain over it is -0.0300" in (tmp_path / "report.md").read_text()


def test_report_without_control_or_history(tmp_path: Path) -> None:
    write_report(tmp_path, results(control=None), {})
    text = (tmp_path / "report.md").read_text()
    assert "| control | tiny |" not in text and "The control" not in text
    assert "| split | metric | teacher | student |" in text


def test_extra_sections_are_shown(tmp_path: Path) -> None:
    bottleneck = {"control": {"codes_used": 10}, "student": {"codes_used": 1200, "perplexity": 3.25}}
    extra = {"bottleneck": bottleneck, "cache": {"hits": 7}, "selection": "last epoch"}
    write_report(tmp_path, results() | extra, HISTORY)
    text = (tmp_path / "report.md").read_text()
    assert "## Bottleneck\n\n|  | control | student |\n| --- | ---: | ---: |\n| codes used | 10 | 1,200 |" in text
    assert "| perplexity | – | 3.250 |" in text
    assert "## Cache" in text and "| hits | 7 |" in text
    assert "| selection | last epoch |" in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("seed", "missing key results.seed"),
        ("models.control", "missing key results.models.control"),
        ("models.student.latency_ms.p90", "missing key results.models.student.latency_ms.p90"),
        ("models.teacher.metrics.validation", "missing key results.models.teacher.metrics.validation"),
        ("models.control.metrics.validation.accuracy", "missing key .*control.metrics.validation.accuracy"),
        ("seconds.total", "missing key results.seconds.total"),
        ("environment.git_commit", "missing key results.environment.git_commit"),
    ],
)
def test_a_missing_key_is_named_and_nothing_is_written(tmp_path: Path, path: str, message: str) -> None:
    broken = copy.deepcopy(results())
    *parents, last = path.split(".")
    part = broken
    for parent in parents:
        part = part[parent]
    del part[last]
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "run", broken, HISTORY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, "results.seed is '0'"),
        ({"command": "python"}, "results.command"),
        ({"models": 3}, "results.models is 3"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"retention": float("nan")}, "JSON"),
        ({"control": None, "gain_over_control": 0.1}, "gain_over_control must be null"),
    ],
)
def test_a_wrong_value_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "run", results(**changes), HISTORY)
    assert not (tmp_path / "run").exists()


def test_print_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(results())
    output = capsys.readouterr().out
    for figure in ("0.8100", "1,234,567", "4.938", "2.500", "90.0%", "+0.0300"):
        assert figure in output


def averaged(folders: list[str]) -> list[dict[str, str]]:
    """The rows of the CSV file."""
    table = Path(folders[0]).parent / "averages.csv"
    main([*folders, "--csv", str(table)])
    return list(csv.DictReader(table.read_text().splitlines()))


def test_each_learning_rate_of_a_sweep_is_a_row(tmp_path: Path) -> None:
    runs = [results(seed, 0.8) | {"learning_rate": rate} for seed in (0, 1) for rate in (0.1, 0.01)]
    rows = averaged(write_runs(tmp_path, *runs))
    assert [(row["method"], row["seeds"]) for row in rows] == [
        ("soft_targets at 0.01", "2"),
        ("soft_targets at 0.1", "2"),
    ]


def test_the_headline_names_the_floor_of_the_retention() -> None:
    assert "of 0.8100, 90.0% of the teacher's 0.9000." in headline(results())
    returns = results() | {"floor": -3.0, "retention": 0.977}
    assert "97.7% of the way from -3.000 (no skill) to the teacher's 0.9000." in headline(returns)


def test_the_headline_of_a_metric_that_is_better_when_lower() -> None:
    run = results(student=982.0, control=1100.0, retention=1226 / 982, gain_over_control=118.0, lower_is_better=True)
    run["models"]["teacher"]["metrics"]["validation"]["accuracy"] = 900.0
    run["primary_metric"]["name"] = "perplexity"
    for model in run["models"].values():
        model["metrics"]["validation"]["perplexity"] = model["metrics"]["validation"]["accuracy"]
    assert "a validation perplexity of 982.0 (lower is better); the teacher's is 900.0." in headline(run)
    assert "reaches 1,100: the gain over it is +118.0." in headline(run)
    run["models"]["teacher"]["metrics"]["validation"]["perplexity"] = 1226.0
    assert "982.0 (lower is better); the teacher's 1,226 is no better than the control's." in headline(run)


def test_the_headline_does_not_relate_the_student_to_a_useless_teacher() -> None:
    at_chance = results(warnings=["teacher tiny is no better than chance: ..."], chance=0.89)
    assert "of 0.8100; the teacher's 0.9000 is no better than chance." in headline(at_chance)
    assert "Chance level is 0.8900." in headline(at_chance)
    assert "of 0.8100; the teacher's 0.9000 is no better than the control's." in headline(results(control=0.9))


def test_the_table_fits_a_terminal_of_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    run = results()
    run["models"]["teacher"]["name"] = "runs/image-classification/teacher_resnet32x4/stages/teacher"
    print_table(run)
    table, _, _ = capsys.readouterr().out.partition("The student reaches")
    assert max(map(len, table.splitlines())) <= 100


def test_losses_are_grouped_by_kind() -> None:
    parts = {"loss": 6.0, "loss_task": 1.0, "loss_hidden_0": 2.0, "loss_hidden_1": 3.0}
    student = [parts | {"epoch": 1.0}, parts | {"epoch": 2.0}]
    control = [{"epoch": 1.0, "loss": 4.0}, {"epoch": 2.0, "loss": 3.0}]
    losses = plots._losses({"student": student, "control": control}, "epoch")
    assert losses == {
        "task": {"student": [(1.0, 1.0), (2.0, 1.0)]},
        "hidden": {"student": [(1.0, 5.0), (2.0, 5.0)]},
        "": {"control": [(1.0, 4.0), (2.0, 3.0)]},
    }


def test_comparison_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [results(0, 0.80, 0.78), results(1, 0.82, 0.78), results(2, 0.87, None), results(0, method="hint")]
    hint, soft = averaged(write_runs(tmp_path, *runs))
    assert (soft["domain"], soft["task"], soft["method"]) == ("NLP", "clinc150", "soft_targets")
    assert (soft["metric"], soft["seeds"]) == ("validation accuracy", "3")
    # 0.80, 0.82, 0.87: mean 0.83, squared deviations 0.0009 + 0.0001 + 0.0016 = 0.0026, over n - 1 = 2
    assert float(soft["student_mean"]) == pytest.approx(0.83)
    assert float(soft["student_std"]) == pytest.approx(0.0013**0.5)
    # gains 0.02 and 0.04: mean 0.03, squared deviations 2 * 0.0001, over n - 1 = 1
    assert float(soft["gain_mean"]) == pytest.approx(0.03)
    assert float(soft["gain_std"]) == pytest.approx(0.0002**0.5)
    assert float(soft["control_std"]) == 0
    assert "0.0300 ± 0.0141 (n=2)" in capsys.readouterr().out  # one of three runs has no control
    assert hint["seeds"] == "1" and (float(hint["student_mean"]), hint["student_std"]) == (0.81, "")


def test_a_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = write_runs(tmp_path, results(0), results(0, 0.5))
    (row,) = averaged(folders)
    assert (row["student_mean"], row["seeds"]) == ("0.81", "1")
    assert f"left out: {folders[1]} repeats seed 0 of NLP, clinc150, soft_targets from {folders[0]}" in (
        capsys.readouterr().out
    )


def test_students_of_two_sizes_are_two_rows(tmp_path: Path) -> None:
    small = results(1, 0.7)
    small["models"]["student"]["parameters"] = 1000
    rows = averaged(write_runs(tmp_path, results(0), small))
    assert [float(row["parameters_mean"]) for row in rows] == [1000, 1_234_567]
    assert [row["seeds"] for row in rows] == ["1", "1"]


def test_runs_are_found_below_a_folder_and_with_a_glob(tmp_path: Path) -> None:
    write_runs(tmp_path / "a" / "b", results(0), results(1))
    (tmp_path / "a" / "b" / "1" / "student").mkdir()
    (tmp_path / "a" / "notes.md").touch()
    everything = [tmp_path, *tmp_path.rglob("*")]
    for places in ([tmp_path], [tmp_path / "a" / "b" / "0", tmp_path / "a" / "b" / "1"], everything):
        folders, problems = comparison.find_runs(places)
        assert folders == [tmp_path / "a" / "b" / "0", tmp_path / "a" / "b" / "1"] and not problems


def test_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = write_runs(tmp_path, results(0, 0.80), results(1, 0.84), results(0, control=None, method="hint"))
    write_text(tmp_path / "unfinished" / "recipe.yaml", "seed: 3\n")
    write_json(tmp_path / "old" / "results.json", {"schema_version": 1})
    broken = [str(tmp_path / "unfinished"), str(tmp_path / "old"), str(tmp_path / "absent")]
    markdown, table, plot = tmp_path / "new" / "t.md", tmp_path / "t.csv", tmp_path / "t.png"
    files = ["--markdown", str(markdown), "--csv", str(table), "--plot", str(plot)]
    main([*folders, *broken, *files])
    output = capsys.readouterr().out.replace("\n", " ")
    assert "0.8200 ± 0.0283" in output and "0.8100" in output
    assert f"left out: {broken[0]} has no results.json: it is unfinished" in output
    assert f"left out: {broken[2]} does not exist" in output
    assert f"left out: {broken[1]}/results.json: missing key results.domain" in output
    assert "| clinc150, soft_targets | validation accuracy | 2 | 0.9000 ± 0.0000 |" in markdown.read_text()
    hint, soft = csv.DictReader(table.read_text().splitlines())
    assert float(soft["student_mean"]) == pytest.approx(0.82)
    assert float(soft["student_std"]) == pytest.approx(0.02 * 2**0.5)
    assert hint["student_std"] == hint["control_mean"] == "" and hint["seeds"] == "1"
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(set(image.convert("RGB").getdata())) > 50


def test_the_plot_has_a_point_for_each_model_and_size() -> None:
    runs = [results(0, 0.80), results(1, 0.84), results(0, control=None, method="hint")]
    mean, deviation = statistics.fmean([0.80, 0.84]), statistics.stdev([0.80, 0.84])
    groups = {comparison.Group.of(run): [other for other in runs if other["method"] == run["method"]] for run in runs}
    (panel,) = comparison._panels(groups).items()
    assert panel[0] == ("clinc150", "validation accuracy")
    assert panel[1] == [
        Point("teacher", "teacher", 109_482_240, 0.9, 0.0),  # once for both methods
        Point("control", "control", 1_234_567, 0.78, 0.0),
        Point("soft_targets", "student", 1_234_567, mean, deviation),
        Point("hint", "student", 1_234_567, 0.81, 0.0),
    ]


def test_labels_of_points_do_not_overlap() -> None:
    figure = Figure()
    axes = figure.subplots()
    points = [Point(f"method {i}", "student", 1000, 0.8 + i / 1e4, 0.0) for i in range(8)]
    axes.plot([point.size for point in points], [0.5, *(point.mean for point in points[1:])], "o")
    figure.draw_without_rendering()
    plots._add_labels(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]  # without the line to the point
    assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))


def test_a_folder_that_groups_finished_runs_is_not_unfinished(tmp_path: Path) -> None:
    """OUT/TASK of GLUE is such a folder. A run of several seeds without its summary is unfinished."""
    write_runs(tmp_path / "task" / "system", results(0))
    write_text(tmp_path / "task" / "recipe.yaml", "seed: 0\n")
    assert comparison.read_runs([tmp_path])[1] == []
    write_json(tmp_path / "several" / "seed0" / "results.json", results(1))
    write_text(tmp_path / "several" / "recipe.yaml", "seeds: [1, 2]\n")
    (problem,) = comparison.read_runs([tmp_path])[1]
    assert problem.startswith(f"{tmp_path}/several has no results.json")


def test_command_without_a_readable_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN" in error_of(capsys)
    (tmp_path / "results.json").write_text(json.dumps(results())[:-5])
    assert "no finished run" in error_of(capsys, str(tmp_path), str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        "[" * 100_000,
        "\udcff",
        json.dumps(results() | {"learning_rate": "fast"}),
        json.dumps(results() | {"retention": 10**400}),
        json.dumps(results() | {"primary_metric": {"split": [], "name": "accuracy"}}),
        json.dumps(results() | {"models": []}),
    ],
)
def test_a_damaged_run_among_others_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    write_runs(tmp_path, results(0), results(1))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    main([str(tmp_path)])
    output = capsys.readouterr().out
    assert "0.8100 ± 0.0000" in output
    problems = output.replace("\n", " ").partition("left out:")[2]
    assert "left out:" not in problems and f"{tmp_path}/damaged/results.json" in problems


def test_cyclic_and_broken_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, results(0))
    (tmp_path / "0" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").symlink_to("nothing")
    main([str(tmp_path), str(tmp_path / "self")])
    output = " ".join(capsys.readouterr().out.split())
    assert "0.8100" in output
    assert f"left out: cannot read {tmp_path}/self: Too many levels of symbolic links" in output
    assert f"left out: {tmp_path}/broken/results.json does not exist" in output


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_runs(tmp_path, results(0))
    (tmp_path / "secret").mkdir()
    scan = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    main([str(tmp_path)])
    assert f"left out: cannot read {tmp_path}/secret: Permission denied" in capsys.readouterr().out


def verdict_with(gain: float, low: float, high: float, word: str, seeds: int = 1, **more: Any) -> dict[str, Any]:
    interval = None if low == high else [low, high]
    return {"gain": gain, "interval": interval, "confidence": 0.95, "method": "M", "seeds": seeds, "word": word} | more


def test_the_headline_ends_with_the_verdict() -> None:
    def sentence(control: Any, teacher: Any, **more: Any) -> str:
        verdict = {"control": control, "teacher": teacher, "warnings": []} | more
        return headline(results(verdict=verdict)).partition("Verdict: ")[2]

    better = verdict_with(0.012, 0.004, 0.02, "better", 3)
    equal = verdict_with(0.0, -0.005, 0.005, "no difference shown", 3, margin=0.009, not_worse_by_margin=True)
    expected = "better than the control (gain 0.0120, 95% interval 0.0040 to 0.0200, 3 seeds, M)"
    assert sentence(better, None) == f"{expected}."
    shared = f"{expected}; not worse than the teacher that all seeds share by more than 0.0090."
    assert sentence(better, equal) == shared
    assert "the teacher of the same seed by more" in sentence(better, equal, shared_teacher=False)
    one = verdict_with(0.012, -0.004, 0.03, "no difference shown (one seed)")
    assert sentence(one, None).startswith("no difference shown to the control (gain 0.0120, 95% interval -0.0040 to")
    assert "one seed, M)." in sentence(one, None)
    worse = verdict_with(-0.1, -0.2, -0.05, "worse (one seed)", margin=0.009, not_worse_by_margin=False)
    assert "; worse than the teacher (gain -0.1000, 95% interval -0.2000 to -0.0500, one seed, M)." in (
        sentence(better, worse)
    )
    few = verdict_with(0.5, 0, 0, "no difference shown (one seed)")
    assert sentence(few, None) == ("no difference shown to the control (gain 0.5000, one seed, M).")
    assert sentence(None, None) == ""


def test_the_warnings_of_the_verdict_are_in_the_report_once(tmp_path: Path) -> None:
    verdict: dict[str, Any] = {"control": None, "teacher": None, "warnings": ["is no better than chance", "constant"]}
    write_report(tmp_path, results(warnings=["is no better than chance"], verdict=verdict), HISTORY)
    text = (tmp_path / "report.md").read_text()
    assert text.count("**Warning:** is no better than chance") == text.count("**Warning:** constant") == 1
    assert "## Verdict" not in text


def test_the_comparison_has_the_folders_and_the_verdict_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, gain in ((0, 0.03), (1, 0.031), (2, 0.029)):
        control = verdict_with(gain, gain - 0.01, gain + 0.01, "better (one seed)")
        verdict: dict[str, Any] = {"control": control, "teacher": None, "warnings": []}
        write_json(tmp_path / "run" / f"seed{seed}" / "results.json", results(seed, verdict=verdict))
    write_json(tmp_path / "old" / "results.json", results(method="hint"))
    table = tmp_path / "t.csv"
    main([str(tmp_path), "--csv", str(table)])
    output = capsys.readouterr().out.replace("\n", "")
    assert f"soft_targets ({tmp_path}/run): better (3 seeds)" in output and f"hint ({tmp_path}/old): –" in output
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["verdict"], row["folder"]) for row in rows] == [
        ("–", f"{tmp_path}/old"),
        ("better (3 seeds)", f"{tmp_path}/run"),
    ]
