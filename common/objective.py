"""The objective of a training: a weighted sum of named terms.

    Objective(task=(alpha, task_loss()), soft_targets=(1 - alpha, soft_targets(temperature)))   # Hinton 2015
    Objective(hidden=(1.0, FeatureTerm("encoder.layer.1", "encoder.layer.3", feature_l2)))      # feature distillation

A term maps (student outputs, teacher outputs or None, labels or None) to a scalar: `task_loss` and `logit_term` make
terms of logits, `FeatureTerm` one of features. A term with parameters is a module; the trainer optimizes, clips and
checkpoints them with the student, and they never ship. The weight of a term is a number, or a function of the progress
of the training, such as `warm_up(1.0, 0.1)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kd.common import losses
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError

Term = Callable[[Outputs, Outputs | None, Tensor | None], Tensor]
Weight = float | Callable[[float], float]  # of the progress of the training, from 0 to 1
Terms = dict[str, tuple[Weight, Term]]
FeatureLoss = Callable[..., Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, Tensor | None], Tensor]
IGNORED = -100  # the label of a position without a target: padding, or the end of a sequence


class Objective(nn.Module):
    """Weighted, named terms: `objective(student, teacher, labels)` returns {name: weighted loss}.

    Terms of weight zero are dropped, so they need not be computable. Raises UserError where all weights are zero.
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
        """The weight of a term at the present progress."""
        weight = self.weights[name]
        return weight(self.progress) if callable(weight) else weight

    def set_progress(self, progress: float) -> None:
        """Sets the share of the training that is done, 0 to 1, for weights and terms that change with it."""
        self.progress = progress
        for term in self.terms.values():
            if isinstance(term, Scheduled):
                term.progress = progress

    def watching(self, **terms: Term) -> "Objective":
        """Adds terms that are logged under their names and not trained for; returns the objective."""
        self.watched |= terms
        return self

    @torch.no_grad()
    def watch(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        """{name: value} of the terms that are only logged."""
        return {name: term(student, teacher, labels) for name, term in self.watched.items()}


class Scheduled(nn.Module):
    """A term that changes with the `progress` of the training, 0 to 1."""

    progress: float = 0.0


def warm_up(weight: float, share: float) -> Weight:
    """A weight that rises linearly from 0 over the first `share` of a training. Raises ValueError unless
    0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a warm-up is a share of the training, between 0 and 1, got {share}")
    return weight if share == 0 else lambda progress: weight * min(progress / share, 1.0)


def cosine_decay(weight: float, start: float) -> Weight:
    """A weight that falls to 0 with a cosine over the rest of a training, from the share `start` on."""

    def decayed(progress: float) -> float:
        done = max(0.0, progress - start) / max(1 - start, 1e-9)
        return weight * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return weight if weight == 0 else decayed


def task_loss(regression: bool = False, smoothing: float = 0.0) -> Term:
    """Cross-entropy with the labels (batch,) or (batch, positions) that are not IGNORED, or mean squared error for
    regression. `smoothing`: share of the uniform distribution in the targets (arXiv:1512.00567).
    """

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        logits, labels = _needed(student.logits, "student logits"), _needed(labels, "labels")
        if regression:
            return losses.regression_mse(logits, labels)
        rows = rearrange(logits.float(), "... classes -> (...) classes")
        return F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    return term


def logit_term(
    loss: Callable[..., Tensor], labels: bool = False, standardize: bool = False, ignore_unlabelled: bool = False
) -> Term:
    """A loss between the logits of student and teacher, (batch, classes) or (batch, positions, classes).

    Args:
        loss: (student logits, teacher logits) -> scalar.
        labels: The loss takes the labels (batch,) as a third argument.
        standardize: The loss takes standardized logits (arXiv:2403.01427).
        ignore_unlabelled: The loss takes the logits (tokens, classes) of those positions whose label is not IGNORED.
    """

    def term(student: Outputs, teacher: Outputs | None, targets: Tensor | None) -> Tensor:
        logits = _needed(student.logits, "student logits")
        teacher_logits = _needed(teacher.logits if teacher else None, "teacher logits")
        if ignore_unlabelled:
            keep = _needed(targets, "labels") != IGNORED
            if not keep.any():
                return logits.sum() * 0.0
            logits, teacher_logits = logits[keep], teacher_logits[keep]
        if standardize:
            logits, teacher_logits = losses.standardized(logits), losses.standardized(teacher_logits)
        return loss(logits, teacher_logits, *([_needed(targets, "labels")] if labels else []))

    return term


def soft_targets(temperature: float, regression: bool = False) -> Term:
    """The teacher's logits at a temperature (Hinton 2015), or its predictions for regression."""
    return logit_term(losses.regression_mse if regression else partial(losses.soft_target_kl, temperature=temperature))


class FeatureTerm(nn.Module):
    """A loss between features of student and teacher.

    Of two maps (batch, channels, height, width) of different size the larger is averaged down to the smaller.

    Args:
        student, teacher: Name of the feature; or several names, for a loss of several tensors of each.
        loss: (student features, teacher features, mask=mask) -> scalar. Without a mask, it is called without that
            argument.
        projector: Maps the student's feature first. Its parameters are auxiliary: they train and do not ship.
        transform: (feature, mask (batch, positions) or None) -> tensor, applied to the features of both, such as
            pooling. The loss then gets no mask of positions.
        only_where_right: The mask of the loss keeps the samples (batch,) that the teacher classifies correctly.
    """

    def __init__(
        self,
        student: str | Sequence[str],
        teacher: str | Sequence[str],
        loss: FeatureLoss,
        projector: nn.Module | None = None,
        transform: Transform | None = None,
        only_where_right: bool = False,
    ) -> None:
        super().__init__()
        self.student_names, self.teacher_names = (
            (names,) if isinstance(names, str) else tuple(names) for names in (student, teacher)
        )
        self.loss, self.projector, self.transform = loss, projector, transform
        self.only_where_right = only_where_right

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        features = [_feature(student, name) for name in self.student_names]
        teacher_features = [_feature(teacher, name) for name in self.teacher_names]
        mask = student.mask
        if self.projector is not None:
            features = [self.projector(feature) for feature in features]
        if self.transform is not None:
            features, teacher_features = (
                [self.transform(feature, mask) for feature in both] for both in (features, teacher_features)
            )
            mask = None
        if features[0].dim() == 4:
            size = min(feature.shape[-1] for feature in (*features, *teacher_features))
            features, teacher_features = (
                [average_down(feature, size) for feature in both] for both in (features, teacher_features)
            )
        if self.only_where_right:
            mask = teacher_is_right(teacher, labels)
        return self.loss(*features, *teacher_features, **({} if mask is None else {"mask": mask}))


def average_down(maps: Tensor, size: int) -> Tensor:
    """Maps (batch, channels, height, width), averaged down to `size` pixels where they are larger."""
    return F.adaptive_avg_pool2d(maps, size) if maps.shape[-1] > size else maps


def teacher_is_right(teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """Mask (batch,) of the samples that the teacher classifies correctly."""
    return _needed(teacher.logits if teacher else None, "teacher logits").argmax(1) == _needed(labels, "labels")


def _feature(outputs: Outputs | None, name: str) -> Tensor:
    features = (outputs.features if outputs else None) or {}
    if name not in features:
        raise ValueError(f"the objective needs feature {name!r}, the model outputs {sorted(features) or 'none'}")
    return features[name]


def _needed(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"the objective needs {what}, and there are none in this batch")
    return value
