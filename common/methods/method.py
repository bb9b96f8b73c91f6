"""`TaskSpec`, the argument of a method, `Method`, its return value, and functions that create methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd.common.objective import (
    FeatureLoss,
    FeatureTerm,
    Objective,
    TaskLoss,
    Term,
    Terms,
    Transform,
    Weight,
    is_labelled,
    soft_targets,
    task_loss,
)
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import TaskType

PER_CLASS = 50  # number of training samples that represent a class
Depth = Literal["nearest", "up", "last"]


@dataclass
class Method:
    """The objective of a student and the features that it reads. `first + second` joins two methods.

    terms: {name: (weight, term)} of the objective.
    features, teacher_features: {name: path} of the submodules of student and teacher whose outputs the terms read.
        Without teacher features, the teacher's logits suffice.
    watched: Terms that are logged and not optimized.
    """

    terms: Terms
    features: dict[str, str] = field(default_factory=dict)
    teacher_features: dict[str, str] = field(default_factory=dict)
    watched: dict[str, Term] = field(default_factory=dict)

    def __add__(self, other: "Method") -> "Method":
        repeated = self.terms.keys() & other.terms.keys()
        if repeated:
            raise ValueError(f"both methods have a term {', '.join(sorted(repeated))}")
        return Method(
            self.terms | other.terms,
            self.features | other.features,
            self.teacher_features | other.teacher_features,
            self.watched | other.watched,
        )

    @property
    def label_terms(self) -> list[str]:
        """The names of the terms that need the label of every sample."""
        return [name for name, (_, term) in self.terms.items() if getattr(term, "needs_labels", False)]

    def for_labels(self, labels: Tensor) -> "Method":
        """The method for training data with these labels (samples,), some of which may be missing; see `TaskLoss`.

        Raises UserError if a term needs the label of every sample.
        """
        if (share := is_labelled(labels).float().mean().item()) == 1:
            return self
        if self.label_terms:
            raise UserError(unlabelled_error("this method", self.label_terms))
        terms: Terms = {}
        for name, (weight, term) in self.terms.items():
            if not isinstance(term, TaskLoss):
                terms[name] = weight, term
            elif share > 0:
                terms[name] = weight, TaskLoss(term.task, term.smoothing, share)
        return replace(self, terms=terms)

    @cached_property
    def objective(self) -> Objective:
        return Objective(**self.terms).watching(**self.watched)

    @property
    def auxiliary_parameters(self) -> int:
        """Number of parameters that are trained with the student and not saved with it."""
        return sum(p.numel() for p in self.objective.parameters() if p.requires_grad)


def unlabelled_error(method: str, terms: Sequence[str]) -> str:
    """The message for a method with `terms` that need labels which the training data lack."""
    return (
        f"the loss {' and '.join(terms)} of {method} needs the label of every training sample, and some have none: "
        "pass --method kd, or --drop_unlabelled"
    )


@dataclass(frozen=True)
class Feature:
    """The output of the submodule at `path`: hidden states (batch, positions, width), or maps (batch, width, size,
    size). `positive` maps are never negative, as after a ReLU.
    """

    path: str
    width: int
    size: int = 0
    positive: bool = False


@dataclass(frozen=True)
class ModelFeatures:
    """The features of a model that methods match.

    stages: The outputs of its layers or stages, from first to last.
    head: The feature that the head pools and classifies.
    last: The last feature before pooling, as defined by the published methods.
    """

    stages: Sequence[Feature]
    head: Feature
    last: Feature


@dataclass(frozen=True)
class TaskSpec:
    """Student, teacher and data of any domain, as methods need them.

    features_of: Returns the features of a model; called only by methods that need features.
    pool: Pools the input of a head to (batch, width), as the model does.
    flatten: Flattens the last feature to (batch, any width).
    labels: (samples,) of the training data, indexed by sample id.
    teacher_samples: Computes pooled teacher features (samples, width) and labels (samples,) of training samples.
    views: Number of views of each sample in a batch: first view one of all samples, then view two, and so on.
    """

    classes: int
    student: Any
    teacher: Any
    features_of: Callable[[Any], ModelFeatures]
    pool: Transform
    flatten: Transform
    labels: Tensor
    teacher_samples: Callable[[], tuple[Tensor, Tensor]]
    views: int = 1

    @cached_property
    def student_features(self) -> ModelFeatures:
        return self.features_of(self.student)

    @cached_property
    def teacher_features(self) -> ModelFeatures:
        return self.features_of(self.teacher)

    def match_pooled(self, name: str, weight: Weight, loss: FeatureLoss) -> Method:
        """A loss between the pooled features (batch, width), which are the inputs of the heads."""
        return match(name, weight, self.student_features.head, self.teacher_features.head, loss, transform=self.pool)


def labels(weight: Weight = 1.0, task: TaskType = "classification", smoothing: float = 0.0) -> Method:
    """The labels alone, as in a control; see `task_loss`."""
    return Method({"task": (weight, task_loss(task, smoothing))})


def labels_and_soft_targets(
    alpha: float, temperature: float, task: TaskType = "classification", smoothing: float = 0.0
) -> Method:
    """alpha * labels + (1 - alpha) * soft targets (Hinton 2015, arXiv:1503.02531)."""
    soft = 1 - alpha, soft_targets(temperature, task)
    return labels(alpha, task, smoothing) + Method({"soft_targets": soft})


def match(
    name: str,
    weight: Weight,
    student: Feature,
    teacher: Feature,
    loss: FeatureLoss,
    projector: nn.Module | None = None,
    transform: Transform | None = None,
    only_where_right: bool = False,
) -> Method:
    """A method of one `FeatureTerm` between two features."""
    term = FeatureTerm(student.path, teacher.path, loss, projector, transform, only_where_right)
    return Method({name: (weight, term)}, hooked(student), hooked(teacher))


def hooked(*features: Feature) -> dict[str, str]:
    """{path: path} of features, for a Method that names each feature by its path."""
    return {feature.path: feature.path for feature in features}


def depth_map(student_layers: int, teacher_layers: int, depth: Depth = "nearest") -> list[tuple[int, int]]:
    """Matches layers or stages: (student layer, teacher layer), counted from 0.

    nearest, up: Each student layer is matched with the teacher layer at the same relative depth, rounded to the
        nearest layer or up. The last layers are matched: 3 student layers of 6 teacher layers give 1, 3, 5.
    last: The last layers are matched, then the second to last layers, and so on, until one model has no more layers.
    """
    if depth == "last":
        number = min(student_layers, teacher_layers)
        return [(student_layers - number + i, teacher_layers - number + i) for i in range(number)]
    if depth == "up":
        return [(i, -(-(i + 1) * teacher_layers // student_layers) - 1) for i in range(student_layers)]
    return [(i, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)]


def some_of_each_class(labels: Tensor, classes: int) -> Tensor:
    """The rows of the first PER_CLASS samples of each class, of labels (samples,)."""
    return torch.cat([(labels == c).nonzero().flatten()[:PER_CLASS] for c in range(classes)])
