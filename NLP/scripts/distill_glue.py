"""Distills GLUE tasks with several systems and seeds, and writes one table.

    bash NLP/scripts/distill_glue.sh --teacher bert-base-uncased --tasks rte mrpc --seeds 0 1 2

`OUT/TASK/SYSTEM` is a run of several seeds. `OUT/TASK/shared/seedN` has the stages that systems share.
The same command with more tasks, systems or seeds trains only the missing ones.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.common.cli import parse, reject_unused, run, show_help
from kd.common.training.arguments import KDTrainingArguments
from kd.nlp.student_model.arguments import (
    GlueArguments,
    GlueBottleneckArguments,
    GlueTrainingArguments,
    MatchingArguments,
    PairArguments,
    TextArguments,
    TextBottleneckArguments,
)

ARGUMENTS = (
    GlueArguments, TextArguments, PairArguments, GlueBottleneckArguments, MatchingArguments, GlueTrainingArguments
)  # fmt: skip
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from accelerate import PartialState

from kd.common.reporting.results import RECIPE
from kd.common.training.run_folder import RunFolder, starts_over
from kd.common.training.trainer_run import TrainerRun
from kd.nlp.data.columns import TASKS
from kd.nlp.data.loading import TextData
from kd.nlp.student_model.bottleneck_training import (
    train_bottleneck_control,
    train_bottleneck_student,
    train_bottleneck_teacher,
)
from kd.nlp.student_model.evaluation import evaluate_teacher, report
from kd.nlp.student_model.glue_report import finished_seeds, write_report
from kd.nlp.student_model.inputs import (
    Inputs,
    inputs_of_seed,
    load_inputs,
    validate_arguments,
    validate_bottleneck,
    validate_matching,
)
from kd.nlp.student_model.methods import check_method, check_smoothing
from kd.nlp.student_model.training import load_or_train_teacher, train_control, train_student
from kd.nlp.teacher_model.teacher import models_and_tokenizers


class GlueRun(TrainerRun):
    """The run of a system on a task. For each seed, all systems share the stages except the student. Systems with
    the same pooling share the aligned encoder, because alignment matches pooled hidden states.
    """

    may_change = frozenset({"seeds"})
    shared_by_seeds = "../../shared/seed{seed}"

    def stage_folder(self, name: str) -> Path:
        if name == "student" or self.shared is None:
            return self.folder / "stages" / name
        pooling = next((one.pooling for one in self.instances if isinstance(one, TextBottleneckArguments)), "cls")
        return self.shared / "stages" / (f"{name}_{pooling}" if name == "student_encoder" else name)


def main() -> None:
    glue, text, pair, bottleneck, matching, training = parse(*ARGUMENTS)
    reject_unused("--tasks names the datasets", training, "dataset", "text_columns")
    reject_unused("--systems sets it", bottleneck, "bottleneck", "keys")
    folder = Path(str(training.output_dir))
    sources = {task: glue.source(task) for task in glue.tasks}
    for task in glue.tasks:  # before the first task trains for hours
        classes = len(TASKS[task].label_names) or 1
        check_smoothing(training, task, classes)
        if "base" in glue.systems:
            check_method(matching.method, training, task, classes)
    training.seed = 0  # for the initial models of a task, independent of --seeds
    with PartialState().main_process_first():
        lock = RunFolder(folder, ["glue.md"]) if PartialState().is_main_process else None
    for task in glue.tasks:
        text.dataset = sources[task]
        data = text.load()
        limited = limit_epochs(glue.max_samples_seen / len(data.splits["train"]), pair, training)
        distill_task(folder / task, glue.systems, data, text, *limited, bottleneck, matching)
    write_report(folder, glue.tasks)
    del lock  # releases the folder for other processes


def distill_task(
    folder: Path,
    systems: list[str],
    data: TextData,
    text: TextArguments,
    pair: PairArguments,
    training: KDTrainingArguments,
    bottleneck: TextBottleneckArguments,
    matching: MatchingArguments,
) -> None:
    """Distills all systems on one task. They share stages, so later systems require the same arguments and inputs."""
    inputs = load_inputs(text, pair, training, data, matching.ensemble_teachers if "base" in systems else [])
    validate_arguments(inputs, pair, training)
    if "base" in systems:
        validate_matching(inputs, pair, matching, training)
    arguments = {system: matching if system == "base" else arguments_of(system, bottleneck) for system in systems}
    for system_arguments in arguments.values():
        if isinstance(system_arguments, TextBottleneckArguments):
            validate_bottleneck(inputs, pair, system_arguments)
    open_run(folder, inputs, training, text, pair, bottleneck, matching)
    for system, system_arguments in arguments.items():
        system_run = open_run(folder / system, inputs, training, text, pair, system_arguments)
        for seed_run in system_run.each_seed():
            seed_inputs = inputs_of_seed(inputs, text, pair, training, seed_run.args.seed)
            distill(seed_run, seed_inputs, pair, system_arguments)
        system_run.summarize()


def open_run(folder: Path, inputs: Inputs, training: KDTrainingArguments, *arguments: Any) -> GlueRun:
    """Opens a folder for a new run, or continues the run in it. Its seeds are --seeds and all finished seeds."""
    training = copy.copy(training)
    training.output_dir = str(folder)
    training.resume_from_checkpoint = (folder / RECIPE).exists() and not starts_over(training)
    if training.resume_from_checkpoint:
        training.seeds = list(dict.fromkeys([*finished_seeds(folder), *(training.seeds or [])]))
    opened = GlueRun(training, *arguments)
    opened.check_inputs(inputs.data.fingerprint, **models_and_tokenizers(inputs.models))
    return opened


def distill(
    run: GlueRun, inputs: Inputs, pair: PairArguments, system: MatchingArguments | TextBottleneckArguments
) -> None:
    """Distills a system with one seed."""
    # All controls train for as many epochs, because systems share their encoder.
    epochs = (pair.align_epochs or 0) + run.args.num_train_epochs
    control = None
    if isinstance(system, MatchingArguments):
        teacher = load_or_train_teacher(run, inputs, pair, "teacher_encoder")
        measured_teacher = evaluate_teacher(run, inputs, teacher, pair.teacher, system)
        if not run.args.no_control:
            control = train_control(run, inputs, pair, epochs, "control_encoder")
        student = train_student(run, inputs, pair, system, teacher)
    else:
        inputs = replace(inputs, ensemble=[])
        teacher = train_bottleneck_teacher(run, inputs, pair, system)
        measured_teacher = evaluate_teacher(run, inputs, teacher, pair.teacher)
        if not run.args.no_control:
            control = train_bottleneck_control(run, inputs, pair, system, epochs)
        student = train_bottleneck_student(run, inputs, pair, system, teacher)
    method = system.method if isinstance(system, MatchingArguments) else system.system
    report(run, inputs, method, pair.student, teacher, measured_teacher, control, student)


def arguments_of(system: str, bottleneck: TextBottleneckArguments) -> TextBottleneckArguments:
    """The arguments of a system with a bottleneck."""
    system_arguments = copy.copy(bottleneck)
    system_arguments.bottleneck = "student" if system == "student_only" else "both"
    system_arguments.keys = "carried" if system == "keys_carried" else "new"
    return system_arguments


def limit_epochs(
    epochs: float, pair: PairArguments, training: KDTrainingArguments
) -> tuple[PairArguments, KDTrainingArguments]:
    """Copies with at most `epochs` of fine-tuning the teacher, of alignment and of fine-tuning the student.

    The values of a bottleneck keep their epochs, because they train on cached codes.
    """
    pair, training = copy.copy(pair), copy.copy(training)
    training.num_train_epochs = min(training.num_train_epochs, epochs)
    for name in ("teacher_epochs", "align_epochs", "from_scratch_epochs"):
        setattr(pair, name, min(getattr(pair, name), epochs))
    return pair, training


if __name__ == "__main__":
    run(main)
