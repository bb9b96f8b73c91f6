"""Distills GLUE tasks by every system, over seeds, into one table.

    bash NLP/scripts/distill_glue.sh --teacher bert-base-uncased --tasks rte mrpc cola stsb --seeds 0 1 2
    bash NLP/scripts/distill_glue.sh --glue_folder ../shared/data --tasks rte --systems base keys_carried

A task's teacher is fine-tuned once per seed and shared by all systems, as are its bottleneck, its cached logits, the
controls and the aligned student. The same command again, also with more tasks, systems or seeds, trains only what is
missing; a run that was killed goes on where it stopped.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import PartialState

from kd.common.cli import parse, reject_unused, run
from kd.common.reporting.results import RECIPE, RESULTS
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run_folder import MARK, RunFolder, read_mark, refuse_other_arguments, starts_over
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count
from kd.nlp.data.loading import TextData
from kd.nlp.data.tasks import GLUE_TASKS, TASKS
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_distillation import BottleneckDistillation
from kd.nlp.student_model.classifier_distillation import ClassifierDistillation
from kd.nlp.student_model.glue_report import SYSTEMS, show
from kd.nlp.student_model.methods import check_method, check_smoothing

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


def main() -> None:
    glue, text, pair, bottleneck, matching, training = parse(
        GlueArguments, TextArguments, PairArguments, TextBottleneckArguments, MatchingArguments, KDTrainingArguments
    )
    reject_unused("--tasks names the datasets", training, "dataset", "text_columns")
    reject_unused("--systems sets it", bottleneck, "bottleneck", "keys")
    folder = Path(training.output_dir or "runs/NLP/glue")
    sources = {task: glue.source(task) for task in glue.tasks}  # refuses now what would fail after hours of training
    for task in glue.tasks:  # likewise
        classes = len(TASKS[task].label_names) or 1
        check_smoothing(training, task, classes)
        if "base" in glue.systems:
            check_method(matching.method, training, task, classes)
    seeds, training.seeds = training.seeds or [training.seed], None  # of cells, which have one each
    held = open_folders(folder, product(glue.tasks, seeds), training, (training, text, pair, bottleneck, matching))
    for task, seed in product(glue.tasks, seeds):
        text.dataset, training.seed = sources[task], seed
        data = text.load()
        epochs = glue.samples_per_stage / len(data.splits["train"])
        for system in glue.systems:
            own = matching if system == "base" else of_system(bottleneck, system)
            distill(own, text, *at_most(epochs, pair, training), data, folder / task / f"seed{seed}", system)
    show(folder, glue.tasks)
    del held  # until now no other process works in the folder


def open_folders(
    folder: Path, cells_of: Iterable[tuple[str, int]], training: KDTrainingArguments, instances: tuple[Any, ...]
) -> list[RunFolder]:
    """In the main process: the table's folder and those of its cells, locked, and the latter emptied to start over."""
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return []
        root = RunFolder(folder, ["glue.md"])
        cells = [RunFolder(folder / t / f"seed{s}") for t, s in cells_of]
        if starts_over(training):
            for cell in cells:
                cell.remove(instances)
        return [root, *cells]


def distill(
    own: MatchingArguments | TextBottleneckArguments,
    text: TextArguments,
    pair: PairArguments,
    training: KDTrainingArguments,
    data: TextData,
    shared: Path,
    system: str,
) -> None:
    folder = shared / system
    training.output_dir, training.resume_from_checkpoint = str(folder), (folder / RECIPE).exists()
    refuse_mixing(shared, system, (training, text, pair, own))
    if (folder / RESULTS).exists():
        print(f"{folder} is finished")
        return
    distillation: ClassifierDistillation | BottleneckDistillation
    if isinstance(own, MatchingArguments):
        distillation = ClassifierDistillation(text, pair, own, training, data, shared=shared)
    else:
        distillation = BottleneckDistillation(text, pair, own, training, data, shared=shared)
    refuse_other_inputs(shared, system)
    teacher = distillation.teacher()
    control = None if training.no_control else distillation.control()
    student = distillation.student(teacher)
    distillation.report(teacher, control, student)


def refuse_mixing(shared: Path, system: str, instances: tuple[Any, ...]) -> None:
    """Raises UserError where systems of this cell, which share stages, were run with other arguments than these."""
    for recipe in sorted(shared.glob(f"*/{RECIPE}")):
        same_kind = (recipe.parent.name == "base") == (system == "base")
        refuse_other_arguments(recipe.parent, instances, OF_A_SYSTEM if same_kind else OF_A_SYSTEM | OF_A_KIND)


def refuse_other_inputs(shared: Path, system: str) -> None:
    """Raises UserError where systems of this cell, which share stages, began with other data or models."""
    mine = read_mark(shared / system)["fingerprints"]
    for mark in sorted(shared.glob(f"*/{MARK}")):
        theirs = read_mark(mark.parent)["fingerprints"]
        changed = [name for name in mine.keys() & theirs.keys() - {RECIPE} if mine[name] != theirs[name]]
        if changed:
            raise UserError(
                f"{shared / system} cannot share stages with {mark.parent}: {' and '.join(sorted(changed))} changed "
                "since that run began; restore it, or choose another --output_dir"
            )


def of_system(bottleneck: TextBottleneckArguments, system: str) -> TextBottleneckArguments:
    own = copy.copy(bottleneck)
    own.bottleneck = "student" if system == "student_only" else "both"
    own.keys = "carried" if system == "keys_carried" else "new"
    return own


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
