"""The GLUE table: one row per task; columns for teacher, control and systems; means and deviations over seeds."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from kd.common.metrics.verdict import verdict_over_seeds
from kd.common.reporting.results import RESULTS, validate
from kd.common.reporting.tables import markdown, mean_and_deviation, print_rich, words
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text
from kd.nlp.student_model.arguments import SYSTEMS

OFFICIAL = {  # the metrics that GLUE reports; the first one is the primary metric
    "cola": ["matthews"],
    "sst2": ["accuracy"],
    "mrpc": ["f1", "accuracy"],
    "qqp": ["f1", "accuracy"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "stsb": ["spearman", "pearson"],
}
FOR_ALL = ["accuracy", "f1_macro", "matthews"]  # metrics of every classification task
Runs = dict[str, list[dict[str, Any]]]  # system -> results of all seeds


def write_report(folder: Path, tasks: list[str]) -> None:
    """Prints the table of the finished runs `folder/TASK/SYSTEM/seedN`, and writes glue.md with all metrics."""
    found = {task: read_systems(folder / task) for task in tasks}
    found = {task: runs for task, runs in found.items() if any(runs.values())}
    if not found:
        raise UserError(f"no finished run in {folder}")
    header = ["task", "metric", "seeds", "teacher", "control", *SYSTEMS.values(), "retention of KD"]
    rows = [row for task, runs in found.items() for row in task_rows(task, runs, OFFICIAL[task])]
    others = [row for task, runs in found.items() if task != "stsb" for row in task_rows(task, runs, FOR_ALL)]
    below = [_average(found), *_verdicts(found)]
    print_rich(header, rows, title="GLUE, mean ± standard deviation over seeds", below="\n".join(below))
    sections = ["# GLUE", markdown(header, rows), *below, "## The same metrics for all classification tasks"]
    write_text(folder / "glue.md", "\n\n".join([*sections, markdown(header, others)]) + "\n")


def read_systems(folder: Path) -> Runs:
    runs: Runs = {}
    for system in SYSTEMS:
        runs[system] = [
            read_json(folder / system / f"seed{seed}" / RESULTS) for seed in finished_seeds(folder / system)
        ]
        for results in runs[system]:
            validate(results)
    return runs


def finished_seeds(folder: Path) -> list[int]:
    """The seeds of the finished runs `folder/seedN`."""
    return sorted(int(path.parent.name.removeprefix("seed")) for path in folder.glob(f"seed*/{RESULTS}"))


def task_rows(task: str, runs: Runs, metrics: Iterable[str]) -> list[list[str]]:
    """One row per validation split and metric. Teacher and control are those of KD, or of the first system if KD was
    not run. The control of a system with a bottleneck has a bottleneck, too.
    """
    first = next(results for results in runs.values() if results)
    splits = [split for split in first[0]["models"]["student"]["metrics"] if split.startswith("validation")]
    rows = []
    for split in splits:
        for metric in metrics:
            values = {
                "teacher": scores(first, "teacher", split, metric),
                "control": scores(first, "control", split, metric),
            } | {system: scores(results, "student", split, metric) for system, results in runs.items()}
            kept = retentions(runs["base"], split, metric)
            cells = [mean_and_deviation(found) for found in [*values.values(), kept]]
            name = words(metric) + split.removeprefix("validation").replace("_", ", ")
            rows.append([task, name, str(len(first)), *cells])
    return rows


def scores(runs: list[dict[str, Any]], role: str, split: str, metric: str) -> list[float]:
    return [model["metrics"][split][metric] for results in runs if (model := results["models"][role])]


def retentions(runs: list[dict[str, Any]], split: str, metric: str) -> list[float]:
    """Student / teacher for each seed with a teacher above 0."""
    pairs = zip(scores(runs, "student", split, metric), scores(runs, "teacher", split, metric), strict=True)
    return [student / teacher for student, teacher in pairs if teacher > 0]


def _average(found: dict[str, Runs]) -> str:
    """A sentence with KD's mean retention of the primary metric over tasks."""
    of_tasks = {
        task: fmean(kept)
        for task, runs in found.items()
        if runs["base"]
        and (kept := retentions(runs["base"], runs["base"][0]["primary_metric"]["split"], OFFICIAL[task][0]))
    }
    if not of_tasks:
        return "KD was not run, so its retention is unknown."
    return f"KD retains {fmean(of_tasks.values()):.1%} of its teachers' scores, averaged over {', '.join(of_tasks)}."


def _verdicts(found: dict[str, Runs]) -> list[str]:
    """One sentence per system: verdicts over seeds on its gain over the control in the primary metric of each task."""
    sentences = []
    for system, name in SYSTEMS.items():
        tasks_by_word: dict[str, list[str]] = {}
        for task, runs in found.items():
            verdicts = [control for one in runs[system] if (control := (one.get("verdict") or {}).get("control"))]
            if verdicts:
                tasks_by_word.setdefault(verdict_over_seeds(verdicts)["word"], []).append(task)
        if tasks_by_word:
            parts = (f"{word} on {', '.join(tasks)}" for word, tasks in tasks_by_word.items())
            sentences.append(f"{name} against its control: {'; '.join(parts)}.")
    return sentences
