"""The training objective: a weighted sum of named terms.

    Objective(task=(alpha, task_loss()), soft_targets=(1 - alpha, soft_targets(temperature)))   # Hinton 2015
    Objective(hidden=(1.0, FeatureTerm("encoder.layer.1", "encoder.layer.3", feature_l2)))      # feature distillation

A term maps (student outputs, teacher outputs or None, labels or None) to a scalar. `task_loss` and `logit_term` build
terms on logits, `TokenTerm` builds one on the logits of tokens, and `FeatureTerm` one on features. A term with
parameters is a module. Its auxiliary parameters are optimized, clipped and checkpointed with those of the student, and
are not saved with the student. The weight of a term is a number, or a function of the training progress, such as
`warm_up(1.0, 0.1)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kd.common import losses
from kd.common.losses.shared import same_shape
from kd.common.outputs import Outputs, require
from kd.common.token_terms import TokenTerm, per_sequence, token_sums
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED, TaskType

Term = Callable[[Outputs, Outputs | None, Tensor | None], Tensor]
Weight = float | Callable[[float], float]  # a function of the training progress, from 0 to 1
Terms = dict[str, tuple[Weight, Term]]
FeatureLoss = Callable[..., Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, Tensor | None], Tensor]


class Objective(nn.Module):
    """Weighted, named terms: `objective(student, teacher, labels)` returns {name: weighted loss}.

    Terms of weight zero are dropped, so they need not be computable. Raises UserError if all weights are zero.
    """

    def __init__(self, **terms: tuple[Weight, Term]) -> None:
        super().__init__()
        self.watched: dict[str, Term] = {}
        self.progress = 0.0
        self.weights = {name: weight for name, (weight, _) in terms.items() if weight != 0}
        if not self.weights:
            raise UserError("the objective needs at least one term with a weight above zero: raise a weight")
        self.terms = {name: terms[name][1] for name in self.weights}
        self.modules_of_terms = nn.ModuleDict({n: t for n, t in self.terms.items() if isinstance(t, nn.Module)})

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        weights = self.current_weights()
        token_terms = {name: term for name, term in self.terms.items() if isinstance(term, TokenTerm)}
        sums = token_sums(list(token_terms.values()), student, teacher, labels) if token_terms else ()
        values = dict(zip(token_terms, sums, strict=True))
        return {
            name: weights[name] * (values[name] if name in values else term(student, teacher, labels))
            for name, term in self.terms.items()
        }

    def items(self, inputs: dict[str, Any], labels: Tensor | None) -> int:
        """Number of items in the mean of a batch: samples, tokens with a label, or sequences that have such tokens."""
        if labels is None or labels.dim() == 1 or labels.is_floating_point():
            return len(next(iter(inputs.values())))
        labelled = labels != IGNORED
        if any(isinstance(term, TokenTerm) and term.weights is per_sequence for term in self.terms.values()):
            labelled = labelled.any(dim=1)
        return int(labelled.sum())

    def current_weights(self) -> dict[str, float]:
        """{name: weight} at the current progress."""
        return {name: w(self.progress) if callable(w) else w for name, w in self.weights.items()}

    def set_progress(self, progress: float) -> None:
        """Sets the training progress, from 0 to 1, for the weights and terms that depend on it."""
        self.progress = progress
        for term in self.terms.values():
            if isinstance(term, Scheduled):
                term.progress = progress

    def watching(self, **terms: Term) -> "Objective":
        """Adds terms that are logged under their names without being optimized. Returns the objective."""
        self.watched |= terms
        return self

    @torch.no_grad()
    def watch(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Computes {name: value} of the terms that are only logged."""
        return {name: term(student, teacher, labels) for name, term in self.watched.items()}


class Scheduled(nn.Module):
    """A term that depends on the training `progress`, from 0 to 1."""

    progress: float = 0.0


def warm_up(weight: float, share: float) -> Weight:
    """A weight that rises linearly from 0 over the first `share` of the training. Raises ValueError unless
    0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the warm-up share must be between 0 and 1, got {share}")
    return weight if share == 0 else lambda progress: weight * min(progress / share, 1.0)


def cosine_decay(weight: float, start: float) -> Weight:
    """A weight that decays to 0 along a cosine, from the progress `start` to the end of the training."""

    def decayed(progress: float) -> float:
        done = max(0.0, progress - start) / max(1 - start, 1e-9)
        return weight * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return weight if weight == 0 else decayed


class TaskLoss:
    """Cross-entropy with the labels (batch,) or (batch, positions) that are not IGNORED, the mean squared error with
    scores (batch,) that are not NaN, or the binary cross-entropy with labels (batch, labels) of 0 and 1 that are not
    NaN. Zero for a batch without a label.

    Args:
        smoothing: Share of the uniform distribution in the targets (arXiv:1512.00567).
        labelled_share: Share of the training rows that have a label. The loss is then the sum over the labelled rows,
            divided by the number that a batch of this size has on average. So each label has the same weight, whatever
            the batch, and gradient accumulation changes nothing. None: the mean over the labelled rows of the batch.
    """

    needs_labels = False  # of all rows

    def __init__(
        self, task: TaskType = "classification", smoothing: float = 0.0, labelled_share: float | None = None
    ) -> None:
        self.task, self.smoothing, self.labelled_share = task, smoothing, labelled_share

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        logits, labels = require(student.logits, "student logits"), require(labels, "labels")
        labelled = is_labelled(labels)
        if self.task == "regression":
            total = losses.regression_mse(logits, _with_predictions(labels, logits)) * len(labels)
        elif self.task == "multi_label":
            total = self._sum_over_labels(logits, labels, labelled)
        else:
            rows = rearrange(logits.float(), "... classes -> (...) classes")
            options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": self.smoothing}
            total = F.cross_entropy(rows, labels.flatten(), reduction="sum", **options)
        if self.labelled_share is not None:
            return total / (labels.numel() * self.labelled_share)
        return total / labelled.sum().clamp(min=1)

    def _sum_over_labels(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        same_shape(logits, labels)
        if not labelled.any():
            return logits.sum() * 0.0
        return losses.binary_cross_entropy(logits[labelled], labels[labelled], self.smoothing) * labelled.sum()


def is_labelled(labels: Tensor) -> Tensor:
    """Mask of the class ids that are not IGNORED, or of the scores or labels that are not NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def _with_predictions(scores: Tensor, predictions: Tensor) -> Tensor:
    """Scores whose missing values are the predictions, so that they have no error and no gradient."""
    if not scores.is_floating_point() or scores.numel() != predictions.numel():
        return scores
    return torch.where(scores.isnan(), predictions.detach().reshape(scores.shape).to(scores.dtype), scores)


def task_loss(task: TaskType = "classification", smoothing: float = 0.0) -> Term:
    """The `TaskLoss` of a type of task."""
    return TaskLoss(task, smoothing)


def logit_term(
    loss: Callable[..., Tensor], labels: bool = False, standardize: bool = False, ignore_unlabelled: bool = False
) -> Term:
    """A loss between the logits of student and teacher, (batch, classes) or (batch, positions, classes).

    Args:
        loss: (student logits, teacher logits) -> scalar.
        labels: Pass the labels (batch,) to the loss as a third argument.
        standardize: Standardize the logits first (arXiv:2403.01427).
        ignore_unlabelled: Pass only the logits (tokens, classes) of positions whose label is not IGNORED.
    """

    def term(student: Outputs, teacher: Outputs | None, targets: Tensor | None) -> Tensor:
        logits = require(student.logits, "student logits")
        teacher_logits = require(teacher.logits if teacher else None, "teacher logits")
        if ignore_unlabelled:
            keep = require(targets, "labels") != IGNORED
            if not keep.any():
                return logits.sum() * 0.0
            logits, teacher_logits = logits[keep], teacher_logits[keep]
        if standardize:
            logits, teacher_logits = losses.standardized(logits), losses.standardized(teacher_logits)
        return loss(logits, teacher_logits, *([require(targets, "labels")] if labels else []))

    term.needs_labels = labels  # type: ignore[attr-defined]
    return term


def soft_targets(temperature: float, task: TaskType = "classification") -> Term:
    """Soft targets at a temperature (Hinton 2015), those of each label for multi_label, those of the labelled tokens
    for token_classification, or the teacher's predictions for regression.
    """
    if task == "regression":
        return logit_term(losses.regression_mse)
    loss = losses.binary_soft_target_kl if task == "multi_label" else losses.soft_target_kl
    return logit_term(partial(loss, temperature=temperature), ignore_unlabelled=task == "token_classification")


class FeatureTerm(nn.Module):
    """A loss between features of student and teacher.

    If two maps (batch, channels, height, width) differ in size, the larger is averaged down to the smaller.

    Args:
        student, teacher: Name of a feature, or several names for a loss that takes several tensors of each model.
        loss: (student features, teacher features, mask=mask) -> scalar; called without `mask` if there is none. The
            mask keeps the positions that the masks of both models keep.
        projector: Applied to the student's features first. Its parameters are auxiliary parameters.
        transform: (feature, mask (batch, positions) or None) -> tensor, applied to the features of both models, such
            as pooling. The loss is then called without a mask of positions.
        only_where_right: Mask out the samples (batch,) that the teacher misclassifies.
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
        self.only_where_right = self.needs_labels = only_where_right

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        outputs = student.features or {}, (teacher.features if teacher else None) or {}
        try:
            features = [outputs[0][name] for name in self.student_names]
            teacher_features = [outputs[1][name] for name in self.teacher_names]
        except KeyError as error:
            names = " and ".join(str(sorted(named) or "none") for named in outputs)
            raise UserError(f"the objective needs feature {error}; student and teacher output {names}") from None
        mask = student.mask
        if self.transform is None and teacher is not None and teacher.mask is not None:
            mask = teacher.mask if mask is None else mask * teacher.mask
        if self.projector is not None:
            features = [self.projector(feature) for feature in features]
        if self.transform is not None:
            features, teacher_features = (
                [self.transform(feature, mask) for feature in both] for both in (features, teacher_features)
            )
            mask = None
        sizes = {feature.shape[-1] for feature in (*features, *teacher_features)}
        if features[0].dim() == 4 and len(sizes) > 1:
            features, teacher_features = (
                [average_down(feature, min(sizes)) for feature in both] for both in (features, teacher_features)
            )
        if self.only_where_right:
            mask = teacher_is_right(teacher, labels)
        return self.loss(*features, *teacher_features, **({} if mask is None else {"mask": mask}))


def average_down(maps: Tensor, size: int) -> Tensor:
    """Averages maps (batch, channels, height, width) down to `size` pixels if they are larger."""
    return F.adaptive_avg_pool2d(maps, size) if maps.shape[-1] > size else maps


def teacher_is_right(teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """Mask (batch,) of the samples that the teacher classifies correctly."""
    return require(teacher.logits if teacher else None, "teacher logits").argmax(1) == require(labels, "labels")
