"""What a student is trained for: a weighted sum of named terms.

A method is a composition, written in the open in a script:

    Objective(task=(alpha, task_loss()), soft_targets=(1 - alpha, soft_targets(temperature)))   # Hinton 2015
    Objective(layer_1=(1.0, match("layer_1", feature_l2)))                                      # feature distillation

A term maps (student outputs, teacher outputs or None, labels or None) to a scalar. A term with weights of its own,
like `Hint`, is a module: the trainer optimizes, clips and checkpoints it with the student, but it never ships. The
weight of a term is a number, or a function of how much of the training is done, such as `warm_up(1.0, 0.1)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common import losses
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError

Term = Callable[[Outputs, Outputs | None, Tensor | None], Tensor]
Weight = float | Callable[[float], float]  # or of the progress of the training, from 0 to 1
Terms = dict[str, tuple[Weight, Term]]
FeatureLoss = Callable[..., Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100  # the label of a position that counts for nothing: padding, or the end of a sequence


class Objective(nn.Module):
    """Weighted, named terms: `objective(student, teacher, labels)` gives {name: weighted loss}.

    A term of weight zero drops out, so that it need not be computable.
    """

    def __init__(self, **terms: tuple[Weight, Term]) -> None:
        super().__init__()
        self.watched: dict[str, Term] = {}
        self.progress = 0.0
        self.weights = {name: weight for name, (weight, _) in terms.items() if weight != 0}
        if not self.weights:
            raise UserError("an objective needs at least one term with a weight other than zero: raise a weight")
        self.terms = {name: terms[name][1] for name in self.weights}
        self.modules_of_terms = nn.ModuleDict({n: t for n, t in self.terms.items() if isinstance(t, nn.Module)})

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        return {name: self.weight(name) * term(student, teacher, labels) for name, term in self.terms.items()}

    def weight(self, name: str) -> float:
        """A term's weight now."""
        weight = self.weights[name]
        return weight(self.progress) if callable(weight) else weight

    def set_progress(self, progress: float) -> None:
        """Tells weights and terms that change in the course of a training how much of it is done, from 0 to 1."""
        self.progress = progress
        for term in self.terms.values():
            if isinstance(term, Scheduled):
                term.progress = progress

    def watching(self, **terms: Term) -> "Objective":
        """The same objective; what `terms` give is logged under their names and never trained for."""
        self.watched |= terms
        return self

    @torch.no_grad()
    def watch(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        """The means over the batch of what is watched."""
        return {name: term(student, teacher, labels) for name, term in self.watched.items()}


class Scheduled(nn.Module):
    """A term that changes in the course of a training, of which `progress` (0 to 1) is done."""

    progress: float = 0.0


def warm_up(weight: float, share: float) -> Weight:
    """A weight that rises linearly from 0 over the first `share` of a training. Raises ValueError unless
    0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a warm-up is a share of the training, between 0 and 1, got {share}")
    return weight if share == 0 else lambda progress: weight * min(progress / share, 1.0)


def labels_and_soft_targets(
    alpha: float, temperature: float, regression: bool = False, smoothing: float = 0.0, **others: tuple[Weight, Term]
) -> Objective:
    """alpha * labels + (1 - alpha) * soft targets (Hinton 2015, arXiv:1503.02531), and any other weighted terms."""
    return Objective(
        task=(alpha, task_loss(regression, smoothing)),
        soft_targets=(1 - alpha, soft_targets(temperature, regression)),
        **others,
    )


def task_loss(regression: bool = False, smoothing: float = 0.0) -> Term:
    """Cross-entropy with the labels (batch,) or (batch, positions), less those that are IGNORED, or mean squared error
    for regression. `smoothing` is the share of the uniform distribution in the labels' (arXiv:1512.00567).
    """

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        logits, labels = _needed(student.logits, "student logits"), _needed(labels, "labels")
        if regression:
            return losses.regression_mse(logits, labels)
        rows = logits.float().flatten(0, -2)  # (samples or tokens, classes)
        return F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    return term


def token_targets(divergence: Divergence) -> Term:
    """A divergence between the next-token distributions of student and teacher, where the label is not IGNORED.

    `divergence` takes two logits (tokens, vocabulary), student's first, as `losses.soft_target_kl` does.
    """

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        own, labels = _needed(student.logits, "student logits"), _needed(labels, "labels")
        target = _needed(teacher.logits if teacher else None, "teacher logits")
        counts = labels != IGNORED
        if not counts.any():
            return own.sum() * 0.0
        return divergence(own[counts], target[counts])  # (tokens, vocabulary)

    return term


def soft_targets(temperature: float, regression: bool = False) -> Term:
    """The teacher's logits at a temperature (Hinton 2015), or its predictions themselves for regression."""

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        own = _needed(student.logits, "student logits")
        target = _needed(teacher.logits if teacher else None, "teacher logits")
        if regression:
            return losses.regression_mse(own, target)
        return losses.soft_target_kl(own, target, temperature)

    return term


def match(name: str, loss: FeatureLoss, teacher_name: str | None = None) -> Term:
    """A feature loss between the student's feature `name` and the teacher's (of the same name unless given)."""

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        own, target = _feature(student, name), _feature(teacher, teacher_name or name)
        return loss(own, target) if student.mask is None else loss(own, target, student.mask)

    return term


class Hint(nn.Module):
    """`match` through a linear regressor, for features of different width (FitNets, arXiv:1412.6550)."""

    def __init__(
        self, name: str, loss: FeatureLoss, width: int, teacher_width: int, teacher_name: str | None = None
    ) -> None:
        super().__init__()
        self.name, self.term = name, match(name, loss, teacher_name)
        self.regressor = nn.Linear(width, teacher_width)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        mapped = self.regressor(_feature(student, self.name).float())
        return self.term(Outputs(features={self.name: mapped}, mask=student.mask), teacher, labels)


def _feature(outputs: Outputs | None, name: str) -> Tensor:
    features = (outputs.features if outputs else None) or {}
    if name not in features:
        raise ValueError(f"the objective needs feature {name!r}, the model gives {sorted(features) or 'none'}")
    return features[name]


def _needed(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"the objective needs {what}, and there are none in this batch")
    return value
