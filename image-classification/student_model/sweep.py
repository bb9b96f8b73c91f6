"""Sweeps: many students of one teacher. Students with the same learning rate and seed are trained side by side.

They share the batches and one forward pass of the teacher per batch. A sweep is a run that contains a run `seedN` for
each seed; all share the teacher. Each student has a folder `seedN/students/NAME_lrX` with results.json and student/,
or with diverged.json if it diverged, which does not affect the others. Running the same command again, also with more
values, trains only the missing students. All other flags must stay the same.
"""

import copy
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import set_seed

from kd.common.cli import reject_unused
from kd.common.methods import Method, check_methods_differ, labels
from kd.common.metrics.verdict import Measurement
from kd.common.reporting.results import RECIPE, RESULTS
from kd.common.training.run_folder import REPORT_FILES, RUN_FILES
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json
from kd.common.utils.finite import non_finite_tensor
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.arguments import (
    CONTROL,
    CONTROLS,
    PLAIN,
    SIMKD,
    ImageTrainingArguments,
    PairArguments,
    SimKDArguments,
    SimKDWeights,
)
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)
from kd.image_classification.student_model.distillation import ImageRun, read_stage, validate_teacher_views
from kd.image_classification.student_model.evaluation import (
    Logits,
    evaluate,
    image_processor,
    measure,
    predict,
)
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.student_model.methods import check_dot, check_kd_flags, image_method
from kd.image_classification.student_model.simkd import simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

DIVERGED = "diverged.json"  # written instead of the results of a student that diverged; contains the epoch


@dataclass(frozen=True)
class Student:
    """One student of a sweep, for all seeds."""

    method: str
    projector: str | None
    feature_loss: str | None
    learning_rate: float

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.projector, self.feature_loss)))

    @property
    def key(self) -> str:
        """Name of its files and modules, unique among the students of one learning rate."""
        return re.sub(r"[^\w-]", "_", self.label)

    @property
    def is_control(self) -> bool:
        return self.method in CONTROLS

    @property
    def control(self) -> "Student | None":
        """The student with the same network, trained on the labels alone; None for a control."""
        if self.is_control:
            return None
        method = CONTROL if self.method == SIMKD else PLAIN
        return replace(self, method=method, projector=None, feature_loss=None)

    def folder(self, seed_folder: Path) -> Path:
        return seed_folder / "students" / f"{self.key}_lr{self.learning_rate:g}"

    def is_finished(self, seed_folder: Path) -> bool:
        return any((self.folder(seed_folder) / name).exists() for name in (RESULTS, DIVERGED))


def students_of(
    methods: list[str], projectors: list[str], feature_losses: list[str], learning_rates: list[float]
) -> list[Student]:
    """All students of a sweep, grouped by learning rate, controls first."""
    students = []
    controls_first = sorted(methods, key=lambda method: method not in CONTROLS)
    for rate, method in product(learning_rates, controls_first):
        if method == SIMKD:
            students += [Student(method, *variant, rate) for variant in product(projectors, feature_losses)]
        else:
            students.append(Student(method, None, None, rate))
    return students


class SweepRun(ImageRun):
    """A sweep, or the students of one seed in it."""

    last_file = "sweep.md"
    files = (*RUN_FILES, "sweep.md", "sweep.png", *(f"students/*/{name}" for name in (*REPORT_FILES, DIVERGED)))


Build = Callable[[Student, ImageClassifier], tuple[ImageClassifier, Method]]  # `build_student` of a sweep


def sweep(
    students: list[Student],
    pair: PairArguments,
    weights: SimKDWeights,
    data_args: DataArguments,
    training: ImageTrainingArguments,
    teacher_views: Path | None = None,
) -> Path:
    """Trains and evaluates the missing students of a sweep. Returns the folder of the sweep.

    `teacher_views`: folder of a cache of the teacher's logits for every view. It is used by groups of students whose
    methods need no features.
    """
    validate_sweep(students, training)
    seeds = training.seeds or [training.seed]
    data = data_args.load()
    if teacher_views:
        validate_teacher_views(teacher_views, data, training)
    training = shared_arguments(training)
    teacher, data, pretrained, known = pair.load_teacher(data, training)
    build = partial(build_student, architecture=pair.student, data=data, args=training, weights=weights)
    methods = {  # raises UserError if the networks do not fit
        key: build(student, teacher)[1] for key, student in {student.key: student for student in students}.items()
    }
    check_dot(training, *methods.values())
    auxiliary_parameters = {key: method.auxiliary_parameters for key, method in methods.items()}

    start = teacher if pretrained else None
    run = SweepRun("sweep", training, data, pair, weights, data_args, teacher=start)
    run.args.seeds = seeds
    if not pretrained:
        teacher = run.train_on_labels("teacher", teacher, pair.epochs_of_teacher(training))

    missing = {s: [one for one in students if not one.is_finished(run.folder / f"seed{s}")] for s in seeds}
    number = len(seeds) * len(students)
    if PartialState().is_main_process:
        print(f"{number - sum(map(len, missing.values()))} of {number} students are already finished")
    if any(missing.values()):
        teacher_results = run.evaluate_teacher(pair.teacher, teacher, known)
        for seed_run in run.each_seed():
            for _, members in groupby(missing[seed_run.args.seed], lambda student: student.learning_rate):
                group = list(members)
                stage = _find_stage(seed_run.folder, group)
                trained = train_group(seed_run, stage, group, teacher, build, teacher_views)
                write_group(seed_run, stage, trained, teacher_results, auxiliary_parameters)
    PartialState().wait_for_everyone()
    return run.folder


def validate_sweep(students: list[Student], training: ImageTrainingArguments) -> None:
    """Raises UserError for equal students, and for arguments that training side by side does not support."""
    if training.max_grad_norm:
        raise UserError("gradient clipping would couple students that train side by side: leave --max_grad_norm at 0")
    if training.load_best_model_at_end:
        raise UserError("students that train side by side keep their last epoch: leave out --load_best_model_at_end")
    methods = list(dict.fromkeys(student.method for student in students))
    if len(set(students)) < len(students):
        raise UserError("--methods has the same method twice: name it once")
    check_kd_flags(methods, training)
    check_methods_differ((spec, image_method(spec, training)) for spec in methods if spec not in (*CONTROLS, SIMKD))
    reject_unused(
        "students that train side by side are evaluated only at the end", training, "eval_strategy", "eval_steps"
    )
    reject_unused("students of a sweep have no bottleneck", training, "value_learning_rate")


def shared_arguments(training: ImageTrainingArguments) -> ImageTrainingArguments:
    """The arguments that all students share, with the seed of the teacher. An existing sweep is resumed."""
    args, kind = copy.copy(training), ImageTrainingArguments
    args.output_dir = training.output_dir or "runs/image-classification/sweep"
    args.seed, args.seeds, args.learning_rate = kind.seed, None, kind.learning_rate
    if (Path(args.output_dir) / RECIPE).exists() and not args.overwrite_output_dir:
        args.resume_from_checkpoint = True
    return args


def build_student(
    student: Student,
    teacher: ImageClassifier,
    architecture: str,
    data: ImageData,
    args: ImageTrainingArguments,
    weights: SimKDWeights,
) -> tuple[ImageClassifier, Method]:
    """An untrained student and its method. Raises UserError for a method that needs labels which the data lack."""
    train_labels = data.splits["train"].labels
    if student.method == SIMKD:
        simkd_args = SimKDArguments(**asdict(weights), projector=student.projector, feature_loss=student.feature_loss)  # type: ignore[arg-type]
        model = simkd_student(architecture, teacher, data, weights.projector_factor)
        return model, simkd(model, teacher, simkd_args, args.temperature).for_labels(train_labels)
    if student.method == CONTROL:
        model = simkd_student(architecture, teacher, data, weights.projector_factor, reuse_head=False)
    else:
        model = new_classifier(architecture, data.config)
    if student.is_control:
        return model, labels().for_labels(train_labels)
    method = image_method(student.method, args)(task_spec(model, teacher, data, args.views))
    return model, method.for_labels(train_labels)


def train_group(
    run: ImageRun,
    stage: str,
    students: list[Student],
    teacher: ImageClassifier,
    build: Build,
    teacher_views: Path | None,
) -> dict[Student, ImageClassifier]:
    """Trains students of one learning rate side by side, or loads the stage if it is finished."""

    def train() -> SideBySide:
        models: dict[str, ImageClassifier] = {}
        methods: dict[str, Method] = {}
        for student in students:
            set_seed(run.args.seed)  # the same initialization as when it is trained alone
            models[student.key], methods[student.key] = build(student, teacher)
        distilled = [methods[student.key] for student in students if not student.is_control]
        views = teacher_views if distilled and not any(method.teacher_features for method in distilled) else None
        return run.fit(
            stage,
            SideBySide(models),
            SideBySideObjective({name: method.objective for name, method in methods.items()}),
            settings={"learning_rate": students[0].learning_rate},
            validate=False,
            features=SideBySide.paths({name: method.features for name, method in methods.items()}),
            teacher=frozen(teacher, run.args.precision) if distilled else None,
            teacher_views=views and run.teacher_view_cache(teacher, views),
            teacher_features={name: path for m in methods.values() for name, path in m.teacher_features.items()},
        )

    def load(folder: str) -> SideBySide:
        return SideBySide.from_pretrained(folder, read_stage)

    trained = run.stage(stage, train, load, image_processor(run.data)).students
    return {student: cast(ImageClassifier, trained[student.key]) for student in students}


def _find_stage(folder: Path, students: list[Student]) -> str:
    """The stage with these students, if a run was killed before it wrote all of their reports, or a new stage."""
    prefix = f"lr{students[0].learning_rate:g}_"
    for stage in sorted((folder / "stages").glob(f"{prefix}*")):
        if all((stage / student.key).is_dir() for student in students):
            return stage.name
    return prefix + hashlib.sha256(" ".join(student.key for student in students).encode()).hexdigest()[:8]


def write_group(
    run: ImageRun,
    stage: str,
    trained: dict[Student, ImageClassifier],
    teacher_results: tuple[dict[str, Any], Logits],
    auxiliary_parameters: dict[str, int],
) -> None:
    """Evaluates the students of a stage and writes their folders, or diverged.json for a student that diverged."""
    history, measured = run.history[stage], dict[Student, Measurement]()
    for student, model in trained.items():  # controls first, because the others are compared with them
        folder = student.folder(run.folder)
        if non_finite_tensor(model) is not None:
            if PartialState().is_main_process:
                write_json(folder / DIVERGED, {"epoch": _epoch_of_divergence(student, history)})
            continue
        entries = {"teacher": teacher_results[0], "control": None}
        measurements = {"teacher": measure(run.data, teacher_results[1])}
        if (control := student.control) is not None and (control.folder(run.folder) / RESULTS).exists():
            entries["control"] = read_json(control.folder(run.folder) / RESULTS)["models"]["student"]
            if control not in measured:  # of another group
                saved = read_stage(str(control.folder(run.folder) / "student")).to(model.device)
                split = run.data.selection_split
                measured[control] = measure(run.data, {split: predict(saved, run.data, split)})
            measurements["control"] = measured[control]
        name = f"{model.config.architecture}, {student.label}"
        entries["student"], logits = evaluate(name, model, run.data, teacher_results[1])
        measurements["student"] = measured[student] = measure(run.data, logits)
        results = run.image_results(student.label, entries, measurements) | {
            "learning_rate": student.learning_rate,
            "labels_only": student.is_control,
            "auxiliary_parameters": auxiliary_parameters[student.key],
            "side_by_side_with": ", ".join(other.label for other in trained if other != student) or "none",
        }
        results["seconds"]["student"] = run.seconds[stage]
        run.write_results(folder, results, model, {"student": _losses_of(student, history)})


def _losses_of(student: Student, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses of a student in the log of its group, while they are finite."""
    losses = [(entry["epoch"], _loss_terms(student, entry)) for entry in history if "loss" in entry]
    return [{"epoch": epoch, "loss": sum(terms)} for epoch, terms in losses if terms]


def _epoch_of_divergence(student: Student, history: list[dict[str, Any]]) -> int:
    logged = [entry["epoch"] for entry in history if "loss" in entry and not _loss_terms(student, entry)]
    return math.ceil([*logged, history[-1]["epoch"]][0])


def _loss_terms(student: Student, entry: dict[str, Any]) -> list[float]:
    """The weighted terms of a student's loss in an entry of the log; empty after the student has diverged."""
    return [value for name, value in entry.items() if name.startswith(f"loss_{student.key}/")]
