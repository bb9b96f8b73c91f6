"""Distills GLUE tasks by every system, over seeds, into one table.

    bash NLP/scripts/distill_glue.sh --teacher bert-base-uncased --tasks rte mrpc cola stsb --seeds 0 1 2
    bash NLP/scripts/distill_glue.sh --glue_folder ../shared/data --tasks rte --systems base keys_carried

A task's teacher is fine-tuned once per seed and shared by all systems, as are its bottleneck, its cached logits, the
controls and the aligned student (`OUT/TASK/shared/seedN`). Each run is `OUT/TASK/SYSTEM/seedN`, its means over seeds
`OUT/TASK/SYSTEM`. The same command again, also with more tasks, systems or seeds, trains only what is missing; a run
that was killed continues where it stopped.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import PartialState

from kd.common.cli import parse, reject_unused, run
from kd.common.reporting.results import RECIPE, RESULTS
from kd.common.training.arguments import SEEDS_HELP, KDTrainingArguments
from kd.common.training.run_folder import MARK, RunFolder, read_mark, refuse_other_arguments, starts_over
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Seed
from kd.nlp.data.loading import TextData
from kd.nlp.data.tasks import GLUE_TASKS, TASKS
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_training import (
    train_bottleneck_control,
    train_bottleneck_student,
    train_bottleneck_teacher,
)
from kd.nlp.student_model.glue_report import SYSTEMS, show
from kd.nlp.student_model.inputs import load_inputs, validate_arguments, validate_bottleneck, validate_matching
from kd.nlp.student_model.methods import check_method, check_smoothing
from kd.nlp.student_model.report import evaluate_teacher, report
from kd.nlp.student_model.training import control_epochs, load_or_train_teacher, open_run, train_control, train_student

# Arguments that differ between two systems with a bottleneck, and those between one with and one without.
OF_A_SYSTEM = {"output_dir", "bottleneck", "keys"}
OF_A_KIND = {argument.name for kind in (MatchingArguments, TextBottleneckArguments) for argument in fields(kind)}


@dataclass
class GlueArguments:
    """Which tasks, systems and seeds."""

    tasks: list[str] = field(default_factory=lambda: list(GLUE_TASKS), metadata={"help": ", ".join(GLUE_TASKS)})
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": ", ".join(SYSTEMS)})
    glue_folder: Path | None = field(
        default=None, metadata={"help": "folder that holds one folder per task, cola or glue_cola (default: the Hub)"}
    )
    samples_per_stage: Count = field(
        default=200_000,
        metadata={"help": "texts that fine-tuning and alignment see at most, each, so large tasks get fewer epochs"},
    )

    def __post_init__(self) -> None:
        for name, known in (("tasks", list(GLUE_TASKS)), ("systems", list(SYSTEMS))):
            words = getattr(self, name)
            if not words or set(words) - set(known):
                raise ValueError(f"--{name} must be some of {', '.join(known)}, got {', '.join(words) or 'none'}")

    def source(self, task: str) -> str:
        """What --dataset would be."""
        if self.glue_folder is None:
            return task
        found = [self.glue_folder / name for name in (task, f"glue_{task}") if (self.glue_folder / name).is_dir()]
        if not found:
            raise UserError(f"--glue_folder {self.glue_folder} holds neither {task} nor glue_{task}")
        return str(found[0])


@dataclass
class GlueTrainingArguments(KDTrainingArguments):
    """Training of every task and system."""

    output_dir: str | None = "runs/NLP/glue"
    seeds: list[Seed] | None = field(default_factory=lambda: [0], metadata={"help": SEEDS_HELP})


def main() -> None:
    glue, text, pair, bottleneck, matching, training = parse(
        GlueArguments, TextArguments, PairArguments, TextBottleneckArguments, MatchingArguments, GlueTrainingArguments
    )
    reject_unused("--tasks names the datasets", training, "dataset", "text_columns")
    reject_unused("--systems sets it", bottleneck, "bottleneck", "keys")
    folder = Path(training.output_dir)
    sources = {task: glue.source(task) for task in glue.tasks}  # refuses now what would fail after hours of training
    for task in glue.tasks:  # likewise
        classes = len(TASKS[task].label_names) or 1
        check_smoothing(training, task, classes)
        if "base" in glue.systems:
            check_method(matching.method, training, task, classes)
    seeds, training.seeds = training.seeds, None  # of runs, which have one each
    cells = list(product(glue.tasks, seeds))
    held = open_folders(folder, cells, training, (training, text, pair, bottleneck, matching))
    for task, seed in cells:
        text.dataset, training.seed = sources[task], seed
        data = text.load()
        shared, epochs = shared_folder(folder, task, seed), glue.samples_per_stage / len(data.splits["train"])
        for system in glue.systems:
            system_arguments = matching if system == "base" else of_system(bottleneck, system)
            distill(system, system_arguments, text, *at_most(epochs, pair, training), data, shared)
    show(folder, glue.tasks)
    del held  # until now no other process works in the folder


def open_folders(
    folder: Path, cells: Sequence[tuple[str, int]], training: KDTrainingArguments, instances: tuple[Any, ...]
) -> list[RunFolder]:
    """In the main process: the table's folder and those of shared stages, locked. To start over, cells are emptied."""
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return []
        root = RunFolder(folder, ["glue.md", f"*/*/{RESULTS}", "*/*/report.md"])
        if starts_over(training):
            for task, seed in cells:
                for mark in sorted((folder / task).glob(f"*/seed{seed}/{MARK}")):
                    RunFolder(mark.parent, read_mark(mark.parent)["files"]).remove(instances)
        return [root, *(RunFolder(shared_folder(folder, *cell)) for cell in cells)]


def shared_folder(folder: Path, task: str, seed: int) -> Path:
    """Of the stages that the systems of a task and seed share."""
    return folder / task / "shared" / f"seed{seed}"


def distill(
    system: str,
    system_arguments: MatchingArguments | TextBottleneckArguments,
    text: TextArguments,
    pair: PairArguments,
    training: KDTrainingArguments,
    data: TextData,
    shared: Path,
) -> None:
    """A run of one system on one task with one seed; its stages but the student are stored in `shared`."""
    folder = shared.parent.parent / system / shared.name
    training.output_dir, training.resume_from_checkpoint = str(folder), (folder / RECIPE).exists()
    check_same_arguments(folder, system, (training, text, pair, system_arguments))
    if (folder / RESULTS).exists():
        print(f"{folder} is finished")
        return
    ensemble = system_arguments.more_teachers if isinstance(system_arguments, MatchingArguments) else []
    inputs = load_inputs(text, pair, training, data, ensemble)
    validate_arguments(inputs, pair, training)
    if isinstance(system_arguments, MatchingArguments):
        validate_matching(inputs, pair, system_arguments, training)
    else:
        validate_bottleneck(inputs, pair, system_arguments)
    run = open_run(inputs, training, text, pair, system_arguments)
    check_same_inputs(folder)

    epochs = control_epochs(run, pair)  # also of a bottleneck's control, which shares its encoder
    control = None
    if isinstance(system_arguments, MatchingArguments):
        teacher = load_or_train_teacher(run, inputs, pair, "teacher_encoder", shared)
        measured_teacher = evaluate_teacher(run, inputs, teacher, pair.teacher, ensemble)
        if not training.no_control:
            control = train_control(run, inputs, pair, epochs, "control_encoder", shared)
        student = train_student(run, inputs, pair, system_arguments, teacher, shared)
    else:
        teacher = train_bottleneck_teacher(run, inputs, pair, system_arguments, shared)
        measured_teacher = evaluate_teacher(run, inputs, teacher, pair.teacher)
        if not training.no_control:
            control = train_bottleneck_control(run, inputs, pair, system_arguments, epochs, shared)
        student = train_bottleneck_student(run, inputs, pair, system_arguments, teacher, shared)
    method = system_arguments.method if isinstance(system_arguments, MatchingArguments) else system_arguments.system
    report(run, inputs, method, pair.student, teacher, measured_teacher, control, student)


def check_same_arguments(folder: Path, system: str, instances: tuple[Any, ...]) -> None:
    """Raises UserError where systems of this task and seed, which share stages, have other arguments than these."""
    for recipe in sorted(folder.parent.parent.glob(f"*/{folder.name}/{RECIPE}")):
        same_kind = (recipe.parent.parent.name == "base") == (system == "base")
        refuse_other_arguments(recipe.parent, instances, OF_A_SYSTEM if same_kind else OF_A_SYSTEM | OF_A_KIND)


def check_same_inputs(folder: Path) -> None:
    """Raises UserError where systems of this task and seed, which share stages, began with other data or models."""
    mine = read_mark(folder)["fingerprints"]
    for mark in sorted(folder.parent.parent.glob(f"*/{folder.name}/{MARK}")):
        theirs = read_mark(mark.parent)["fingerprints"]
        changed = [name for name in mine.keys() & theirs.keys() - {RECIPE} if mine[name] != theirs[name]]
        if changed:
            raise UserError(
                f"{folder} cannot share stages with {mark.parent}: {' and '.join(sorted(changed))} changed since that "
                "run began; restore it, or choose another --output_dir"
            )


def of_system(bottleneck: TextBottleneckArguments, system: str) -> TextBottleneckArguments:
    system_arguments = copy.copy(bottleneck)
    system_arguments.bottleneck = "student" if system == "student_only" else "both"
    system_arguments.keys = "carried" if system == "keys_carried" else "new"
    return system_arguments


def at_most(
    epochs: float, pair: PairArguments, training: KDTrainingArguments
) -> tuple[PairArguments, KDTrainingArguments]:
    """Copies in which teacher's fine-tuning, alignment and student's fine-tuning take at most `epochs` each. The
    control takes those of the latter two; values, which train on cached codes, keep theirs.
    """
    pair, training = copy.copy(pair), copy.copy(training)
    training.num_train_epochs = min(training.num_train_epochs, epochs)
    for name in ("teacher_epochs", "align_epochs", "scratch_epochs"):
        setattr(pair, name, min(getattr(pair, name), epochs))
    return pair, training


if __name__ == "__main__":
    run(main)
