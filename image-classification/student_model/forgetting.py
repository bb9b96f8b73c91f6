"""The report of a class-incremental run: results, and the accuracy that remains on the classes seen so far."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kd.common.reporting.plots import OTHER_STYLES, PAPER, STYLES, save_figure
from kd.common.reporting.report import print_table, write_report
from kd.common.training.run import Run
from kd.common.utils.folders import writing_folder
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.bottleneck_probe import BottleneckProbe
from kd.image_classification.student_model.evaluation import evaluate, image_processor
from kd.image_classification.student_model.incremental import HeadTraining, History, accuracy

Scores = dict[str, float]  # number of classes seen (a string: the key of a JSON object) -> accuracy


def report(
    run: Run, method: str, data: ImageData, heads: dict[str, HeadTraining], models: dict[str, BottleneckProbe]
) -> None:
    """Writes the student, results, curves and the plot of a run, and prints its table."""
    with writing_folder(run.folder / "student") as student:
        models["student"].save_pretrained(student)
        image_processor(data).save_pretrained(student)
    results = incremental_results(run, method, data, heads, models)
    plot_forgetting(run.folder / "forgetting.png", results)
    write_report(run.folder, results, {stage: run.history[stage] for stage in heads})
    print_table(results)
    for name, scores in results["accuracy"].items():
        print(f"{name}: {', '.join(f'{split} accuracy {score:.4f}' for split, score in scores.items())}")
    print(f"report: {run.folder / 'report.md'}, plot: {run.folder / 'forgetting.png'}")


def incremental_results(
    run: Run, method: str, data: ImageData, heads: dict[str, HeadTraining], models: dict[str, BottleneckProbe]
) -> dict[str, Any]:
    """results.json of trained heads: `student`, `teacher`, `control` and others, the student class by class.

    Beyond the schema: the accuracy of all heads side by side, after each task on the classes seen so far (for heads
    trained i.i.d.: on the same classes) and on all classes.
    """
    student = heads["student"]
    entries = {stage: evaluate(heads[stage].name, model, data)[0] for stage, model in models.items()}  # on images
    sizes = {name: len(images) for name, images in data.splits.items()}
    one_by_one = {stage: head for stage, head in heads.items() if head.tasks == student.tasks}
    seen = {head.name: _after_each_task(run.history[stage], "classes seen") for stage, head in one_by_one.items()}
    seen |= {
        head.name: _on_the_same_classes(models[stage], head, student)
        for stage, head in heads.items()
        if stage not in one_by_one
    }
    return run.results(
        domain="image-classification",
        task=data.name,
        method=method,
        data={name: sizes.get(name) for name in ("train", "validation", "test")} | {"fingerprint": data.fingerprint},
        models={role: entries[role] for role in ("teacher", "control", "student")},
        split=data.selection_split,
        metric="accuracy",
        selection="last pass; no split chose anything",
        data_notes="; ".join(data.notes) or "none",
        order_of_classes=", ".join(data.label_names[c] for task in student.tasks for c in task),
        split_measured_after_each_task=student.samples.report,
        accuracy={e["name"]: {split: m["accuracy"] for split, m in e["metrics"].items()} for e in entries.values()},
        accuracy_of_classes_seen={head.name: seen[head.name] for head in heads.values()},
        accuracy_of_all_classes={
            head.name: _after_each_task(run.history[stage], "all classes") for stage, head in one_by_one.items()
        },
        keys=_key_statistics(student.untrained, heads["control"].samples.inputs["train"]),
        seconds_of_stages=dict(run.seconds),
    )


def _key_statistics(model: BottleneckProbe, embeddings: Tensor) -> dict[str, float]:
    """How many images the keys were fitted to, and how well they cover their embeddings (images, width)."""
    statistics = model.bottleneck.key_statistics(embeddings.to(model.device))
    return {"fitted_to_unlabelled_images": len(embeddings), **statistics}


def _after_each_task(history: History, of: str) -> Scores:
    return {str(entry["classes_seen"]): entry[of] for entry in history if of in entry}


def _on_the_same_classes(model: BottleneckProbe, head: HeadTraining, student: HeadTraining) -> Scores:
    split = head.samples.report
    return {str(len(seen)): accuracy(model, head.samples, split, seen) for seen in accumulate(student.tasks)}


def plot_forgetting(path: Path, results: dict[str, Any]) -> None:
    """Accuracy of the classes seen so far against their number, a line per head, in the colours of curves.png."""
    styles = [*(STYLES[role] for role in ("student", "teacher", "control")), *OTHER_STYLES]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(5.2, 3.4), dpi=200, layout="constrained")
        axes = figure.subplots()
        for (name, scores), style in zip(results["accuracy_of_classes_seen"].items(), styles, strict=False):
            colour, line, marker = style
            classes = [int(number) for number in scores]
            axes.plot(classes, list(scores.values()), line, color=colour, marker=marker, ms=4, lw=1.4, label=name)
        axes.set_xlabel(f"Classes of {results['task']} seen so far")
        axes.set_ylabel(f"{results['split_measured_after_each_task'].capitalize()} accuracy of these classes")
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False)
        save_figure(figure, path)
