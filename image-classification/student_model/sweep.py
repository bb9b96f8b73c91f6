"""A sweep: students of one teacher under every method, loss, learning rate and seed asked for.

Cells of one learning rate and seed are trained side by side, on the same batches, from one pass of the teacher. Each
cell ends in a folder of its own with results.json and student/; a cell that has one is not trained again.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from transformers import set_seed

from common.objective import Objective, task_loss
from common.results import RECIPE
from common.side_by_side import SideBySide, SideBySideObjective
from image_classification.data.loading import ImageData
from image_classification.student_model.arguments import ImageTrainingArguments
from image_classification.student_model.baselines import METHODS
from image_classification.student_model.experiment import Experiment
from image_classification.student_model.matching import Method
from image_classification.student_model.simkd import (
    FeatureLossName,
    SimKDArguments,
    SimKDWeights,
    Variant,
    simkd,
    simkd_student,
)
from image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from image_classification.teacher_model.folding import frozen

PLAIN, CONTROL, SIMKD = "none", "control", "simkd"


@dataclass
class SweepArguments:
    """The axes of a sweep."""

    methods: list[str] = field(
        default_factory=lambda: [CONTROL, SIMKD],
        metadata={"help": "none (labels only), control (labels only, with a projector), kd, fitnet, attention, simkd"},
    )
    projectors: list[str] = field(default_factory=lambda: ["single", "multi", "all-layer"])
    feature_losses: list[str] = field(
        default_factory=lambda: ["l2"], metadata={"help": "l2, kl-channel, kl-spatial, cosine"}
    )
    learning_rates: list[float] = field(default_factory=lambda: [0.001, 0.005, 0.01, 0.05, 0.1])
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        known = {
            "methods": (PLAIN, CONTROL, *METHODS, SIMKD),
            "projectors": get_args(Variant),
            "feature_losses": get_args(FeatureLossName),
        }
        for name in ("methods", "projectors", "feature_losses", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one value, and none twice, got {values}")
            wrong = [value for value in values if name in known and value not in known[name]]
            if wrong:
                raise ValueError(f"--{name} knows no {wrong[0]!r}: choose from {', '.join(known[name])}")


@dataclass(frozen=True)
class Cell:
    """One student of a sweep."""

    method: str
    projector: str | None
    feature_loss: str | None
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.projector, self.feature_loss)))

    @property
    def key(self) -> str:
        """Tells the cells of one learning rate and seed apart."""
        return self.label.replace(" ", "_")

    @property
    def name(self) -> str:
        return f"{self.key}_lr{self.learning_rate:g}_seed{self.seed}"


def cells_of(args: SweepArguments) -> Iterator[Cell]:
    """Those of one learning rate and seed one after the other, controls first."""
    first = sorted(args.methods, key=lambda method: method not in (PLAIN, CONTROL))
    for rate, seed, method in product(args.learning_rates, args.seeds, first):
        if method != SIMKD:
            yield Cell(method, None, None, rate, seed)
            continue
        for projector, loss in product(args.projectors, args.feature_losses):
            yield Cell(method, projector, loss, rate, seed)


def control_of(cell: Cell) -> Cell | None:
    """The cell that trains the same network on the labels alone."""
    if cell.method in (PLAIN, CONTROL):
        return None
    method = CONTROL if cell.method == SIMKD else PLAIN
    return replace(cell, method=method, projector=None, feature_loss=None)


def train_side_by_side(
    experiment: Experiment, cells: list[Cell], architecture: str, teacher: ImageClassifier, weights: SimKDWeights
) -> dict[str, ImageClassifier]:
    """The students of cells of one learning rate and seed, by the cells' keys."""

    def build() -> SideBySide:
        students, methods = {}, {}
        for cell in cells:
            set_seed(cell.seed)  # each begins as it would alone
            students[cell.key], methods[cell.key] = student_of(
                cell, architecture, teacher, experiment.data, experiment.args, weights
            )
        listens = any(cell.method not in (PLAIN, CONTROL) for cell in cells)
        return experiment.fit(
            "student",
            SideBySide(students),
            SideBySideObjective({name: method.objective for name, method in methods.items()}),
            watch=False,
            features=SideBySide.paths({name: method.features for name, method in methods.items()}),
            teacher=frozen(teacher, experiment.args.precision) if listens else None,
            teacher_features={name: path for m in methods.values() for name, path in m.teacher_features.items()},
        )

    def load(folder: str) -> SideBySide:
        return SideBySide.from_pretrained(folder, ImageClassifier.from_pretrained)

    trained = experiment.stage("student", build, load).students
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
        return student, simkd(student, teacher, data, how, args.temperature)
    if cell.method == CONTROL:
        student = simkd_student(architecture, teacher, data, weights.projector_factor, reuse_head=False)
    else:
        student = new_classifier(architecture, data.config)
    if cell.method in METHODS:
        return student, METHODS[cell.method](student, teacher, data, args.alpha, args.temperature)
    return student, Method(Objective(task=(1.0, task_loss())))


def group_arguments(training: ImageTrainingArguments, folder: Path, cells: list[Cell]) -> ImageTrainingArguments:
    """The training arguments of a group of cells, which continues by itself where it was interrupted."""
    args = copy.copy(training)
    args.learning_rate, args.seed = cells[0].learning_rate, cells[0].seed
    names = hashlib.sha256(" ".join(cell.name for cell in cells).encode()).hexdigest()[:8]
    group = folder / "groups" / f"lr{args.learning_rate:g}_seed{args.seed}_{names}"
    args.output_dir, args.resume_from_checkpoint = str(group), (group / RECIPE).exists()
    return args


def losses_of(cell: Cell, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell's own share of the losses logged for its group."""
    prefix = f"loss_{cell.key}/"
    return [
        {"epoch": entry["epoch"], "loss": sum(value for key, value in entry.items() if key.startswith(prefix))}
        for entry in history
        if "loss" in entry
    ]
