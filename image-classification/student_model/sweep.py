"""Sweeps: many students of one teacher, those of one learning rate and seed side by side.

They are trained on the same batches, from one pass of the teacher. Each ends in a folder of its own with results.json
and student/, or with lost.json where its loss or weights were not finite, which does not hold up the others; one that
is there is not trained again, so all of a folder must have been asked for with the same flags.
"""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from kd.common.cli import reject_unused
from kd.common.data.fingerprints import fingerprint_of
from kd.common.methods import Method, TaskSpec, check_methods_differ, chosen, filled, flags_of, labels
from kd.common.reporting.results import RECIPE
from kd.common.training.run_folder import REPORT_FILES, RUN_FILES, RunFolder, starts_over
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json
from kd.common.utils.finite import non_finite_tensor
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.arguments import DataArguments, ImageTrainingArguments, PairArguments
from kd.image_classification.student_model.cells import (
    CONTROL,
    CONTROLS,
    SIMKD,
    Cell,
    SweepArguments,
    cells_of,
    control_of,
    is_finished,
    lost_file,
    results_file,
)
from kd.image_classification.student_model.distillation import (
    ImageRun,
    fit,
    open_run,
    read_stage,
    train_on_labels,
    validate_teacher_views,
    views_table,
)
from kd.image_classification.student_model.evaluation import (
    chance_warning,
    evaluate,
    image_processor,
    image_results,
    write_results,
)
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.simkd import SimKDArguments, SimKDWeights, simkd, simkd_student
from kd.image_classification.student_model.sweep_report import show
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier
from kd.image_classification.teacher_model.teacher import load_teacher

SWEEP_FILES = (*RUN_FILES, "sweep.md", "sweep.png", *(f"cells/*/{name}" for name in (*REPORT_FILES, "lost.json")))


def sweep(
    axes: SweepArguments,
    pair: PairArguments,
    weights: SimKDWeights,
    data_args: DataArguments,
    training: ImageTrainingArguments,
    teacher_views: Path | None = None,
) -> None:
    """Trains what is missing of a sweep, and shows all of it. `teacher_views`: where a table of the teacher's logits
    per view is kept, which serves groups of students that need no more of it.
    """
    if training.max_grad_norm:
        raise UserError("students side by side would be coupled by clipping: --max_grad_norm must be 0")
    if training.load_best_model_at_end:
        raise UserError("students side by side end with their last epoch: leave out --load_best_model_at_end")
    methods = [for_pair(spec, pair) for spec in axes.methods]
    check_kd_flags(methods, training)
    check_methods_differ((spec, method_of(spec, training)) for spec in methods if spec not in (*CONTROLS, SIMKD))
    axes = replace(axes, methods=methods)
    reject_unused("students side by side are measured at their end", training, "eval_strategy", "eval_steps")
    reject_unused("students of a sweep have no bottleneck", training, "value_learning_rate")
    folder, data = Path(training.output_dir or "runs/image-classification/sweep"), data_args.load()
    if teacher_views:
        validate_teacher_views(teacher_views, data, training)
    cells = list(cells_of(axes))
    teacher, data, pretrained = load_teacher(pair.teacher, data, training.seed)
    auxiliary = {  # raises where the networks do not fit
        cell.key: student_of(cell, pair.student, teacher, data, training, weights)[1].auxiliary_parameters
        for cell in {cell.key: cell for cell in cells}.values()
    }
    opened = open_folder(folder, training, pair, weights, data_args)
    if opened is not None:
        opened.check_inputs(data=data.fingerprint, **({"teacher": fingerprint_of(teacher)} if pretrained else {}))
    if not pretrained:
        teacher = train_teacher(folder, teacher, data, pair, data_args, training)

    missing = [cell for cell in cells if not is_finished(folder, cell)]
    main_process = PartialState().is_main_process
    if main_process:
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are finished already")
    measured, logits = evaluate(pair.teacher, teacher, data) if missing else ({}, {})
    for _, members in groupby(missing, lambda cell: (cell.learning_rate, cell.seed)):
        group = list(members)
        args = group_arguments(training, folder, group)
        run = open_run("sweep", args, data, pair, weights, data_args)
        run.warn(chance_warning(measured, data))
        students = train_side_by_side(run, data, group, pair.student, teacher, weights, teacher_views)
        history = run.history["student"]
        for cell in group:
            student = students[cell.key]
            if non_finite_tensor(student) is not None:
                _write_lost(lost_file(folder, cell), cell, history)
                continue
            entries = {"teacher": measured, "control": _control(folder, cell)}
            entries["student"], _ = evaluate(f"{pair.student}, {cell.label}", student, data, logits)
            results = image_results(run, cell.label, data, entries) | {
                "learning_rate": cell.learning_rate,
                "labels_only": cell.method in CONTROLS,
                "parameters_trained_beside": auxiliary[cell.key],
                "side_by_side_with": ", ".join(other.label for other in group if other != cell) or "none",
            }
            place = results_file(folder, cell).parent
            write_results(place, results, data, student, {"student": losses_of(cell, history)})
    PartialState().wait_for_everyone()
    if main_process:
        show(folder, cells)


def train_teacher(
    folder: Path,
    teacher: ImageClassifier,
    data: ImageData,
    pair: PairArguments,
    data_args: DataArguments,
    training: ImageTrainingArguments,
) -> ImageClassifier:
    """The teacher that all students share, trained in a run of its own inside the sweep's folder."""
    args = copy.copy(training)
    args.output_dir = str(folder / "teacher")
    args.resume_from_checkpoint = (folder / "teacher" / RECIPE).exists()
    run = open_run("teacher", args, data, pair, data_args)
    return train_on_labels(run, data, "teacher", teacher, pair.teacher_epochs)


def open_folder(folder: Path, training: ImageTrainingArguments, *others: Any) -> RunFolder | None:
    """In the main process: the folder of a sweep, emptied where it is to be overwritten.

    Raises UserError where its cells were trained with other flags.
    """
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return None
        opened = RunFolder(folder, SWEEP_FILES)
        if starts_over(training):
            opened.remove((training, *others))
        if opened.has_begun:
            opened.check_arguments(training, *others, may_change=("learning_rate", "seed"))  # axes
        else:
            opened.save_arguments(training, *others)
        return opened


def _control(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The finished control of a cell, where the sweep has one."""
    control = control_of(cell)
    if control is None or not results_file(folder, control).exists():
        return None
    return read_json(results_file(folder, control))["models"]["student"]


def train_side_by_side(
    run: ImageRun,
    data: ImageData,
    cells: list[Cell],
    architecture: str,
    teacher: ImageClassifier,
    weights: SimKDWeights,
    teacher_views: Path | None = None,
) -> dict[str, ImageClassifier]:
    """The students of cells of one learning rate and seed, by the cells' keys."""

    def build() -> SideBySide:
        students: dict[str, ImageClassifier] = {}
        methods: dict[str, Method] = {}
        for cell in cells:
            set_seed(cell.seed)  # each starts as it would alone
            student, method = student_of(cell, architecture, teacher, data, run.args, weights)
            students[cell.key], methods[cell.key] = student, method
        distilled = [methods[cell.key] for cell in cells if cell.method not in CONTROLS]
        views = teacher_views if distilled and all(not method.teacher_features for method in distilled) else None
        return fit(
            run,
            data,
            "student",
            SideBySide(students),
            SideBySideObjective({name: method.objective for name, method in methods.items()}),
            validate=False,
            features=SideBySide.paths({name: method.features for name, method in methods.items()}),
            teacher=frozen(teacher, run.args.precision) if distilled else None,
            teacher_views=views and views_table(run, data, teacher, views),
            teacher_features={name: path for m in methods.values() for name, path in m.teacher_features.items()},
        )

    def load(folder: str) -> SideBySide:
        return SideBySide.from_pretrained(folder, read_stage)

    trained = run.stage("student", build, load, image_processor(data)).students
    return {name: student for name, student in trained.items() if isinstance(student, ImageClassifier)}


def student_of(
    cell: Cell,
    architecture: str,
    teacher: ImageClassifier,
    data: ImageData,
    args: ImageTrainingArguments,
    weights: SimKDWeights,
) -> tuple[ImageClassifier, Method]:
    """A cell's student before training, and what it is trained for."""
    if cell.method == SIMKD:
        how = SimKDArguments(**asdict(weights), projector=cell.projector, feature_loss=cell.feature_loss)  # type: ignore[arg-type]
        student = simkd_student(architecture, teacher, data, weights.projector_factor)
        return student, simkd(student, teacher, how, args.temperature)
    if cell.method == CONTROL:
        student = simkd_student(architecture, teacher, data, weights.projector_factor, reuse_head=False)
    else:
        student = new_classifier(architecture, data.config)
    if cell.method in CONTROLS:
        return student, labels()
    return student, method_of(cell.method, args)(task_spec(student, teacher, data, args.views))


def for_pair(spec: str, pair: PairArguments) -> str:
    """NAME[:setting=value]..., or what stands for no method, with the pair's settings where it leaves them open."""
    return spec if spec in (*CONTROLS, SIMKD) else filled(spec, pair.method_settings, METHODS)


def method_of(spec: str, args: ImageTrainingArguments) -> Callable[[TaskSpec], Method]:
    """The method NAME[:setting=value]...; what depends on the batch is given its size."""
    batch = args.per_device_train_batch_size * args.views
    return chosen(spec, METHODS, batch=batch, **flags_of(spec, args))


def check_kd_flags(methods: list[str], args: ImageTrainingArguments) -> None:
    """Raises UserError for an --alpha or --temperature that none of the methods takes."""
    heard = {"temperature"} if SIMKD in methods else set()  # of its --kl_weight
    for spec in methods:
        heard |= {flag for flag in flags_of(spec, args) if f":{flag}=" not in spec}
    for flag in {"alpha", "temperature"} - heard:
        if getattr(args, flag) != getattr(ImageTrainingArguments, flag):
            raise UserError(f"--{flag} is that of a plain kd: give a method its own, as in {methods[-1]}:{flag}=...")


def group_arguments(training: ImageTrainingArguments, folder: Path, cells: list[Cell]) -> ImageTrainingArguments:
    """The training arguments of a group of cells, which continues by itself where it was interrupted, also between the
    writing of one cell and the next.
    """
    args = copy.copy(training)
    args.learning_rate, args.seed = cells[0].learning_rate, cells[0].seed
    names = hashlib.sha256(" ".join(cell.name for cell in cells).encode()).hexdigest()[:8]
    groups, prefix = folder / "groups", f"lr{args.learning_rate:g}_seed{args.seed}_"
    trained = (group for group in sorted(groups.glob(f"{prefix}*")) if _has_trained(group, cells))
    group = next(trained, groups / f"{prefix}{names}")
    args.output_dir, args.resume_from_checkpoint = str(group), (group / RECIPE).exists()
    return args


def _has_trained(group: Path, cells: list[Cell]) -> bool:
    return all((group / "stages" / "student" / cell.key).is_dir() for cell in cells)


def losses_of(cell: Cell, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell's own share of the losses logged for its group, as long as it was finite."""
    shares = [(entry["epoch"], _share(cell, entry)) for entry in history if "loss" in entry]
    return [{"epoch": epoch, "loss": sum(share)} for epoch, share in shares if share]


def _write_lost(path: Path, cell: Cell, history: list[dict[str, Any]]) -> None:
    if PartialState().is_main_process:
        logged = [entry["epoch"] for entry in history if "loss" in entry and not _share(cell, entry)]
        write_json(path, {"epoch": math.ceil([*logged, history[-1]["epoch"]][0])})


def _share(cell: Cell, entry: dict[str, Any]) -> list[float]:
    prefix = f"loss_{cell.key}/"
    return [value for key, value in entry.items() if key.startswith(prefix)]
