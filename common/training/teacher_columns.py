"""Training with a teacher that is only columns of the data: its outputs, checks of the method, and metrics."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kd.common.data.sources import labelled
from kd.common.data.teacher_columns import TeacherColumns
from kd.common.metrics.tasks import TaskMetrics
from kd.common.objective import Term, Terms
from kd.common.outputs import Outputs
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError

PLAIN = "kd"  # the method that rows without an output, and classes without a probability, do not exclude


def has_output(logits: np.ndarray) -> np.ndarray:
    """Mask (rows,) of the rows of logits (rows, classes) with an output of the teacher."""
    return ~np.isnan(logits).any(axis=1)


def outputs_of_columns(logits: np.ndarray) -> TeacherOutputs:
    """The outputs of training samples whose id is their row in `logits` (samples, classes)."""
    return TeacherOutputs(torch.arange(len(logits)), torch.from_numpy(logits))


def check_method(spec: str, needs_features: bool, teacher: TeacherColumns, logits: np.ndarray) -> None:
    """Raises UserError for a method that the outputs of the training rows do not support."""
    if needs_features:
        raise UserError(
            f"--method {spec} needs features of a teacher, and --teacher_columns have none: pass --method kd"
        )
    if spec.partition(":")[0] != PLAIN and not (teacher.complete and has_output(logits).all()):
        raise UserError(
            f"--method {spec} needs a probability above 0 or a logit of every class in every row, which "
            f"{teacher.description} lack: pass --method kd"
        )


def where_outputs(terms: Terms, logits: np.ndarray) -> Terms:
    """The terms of a method for training rows of which some have no output: soft targets apply to the others."""
    share = float(has_output(logits).mean())
    if "soft_targets" not in terms or share == 1:
        return terms
    weight, term = terms["soft_targets"]
    return terms | {"soft_targets": (weight, where_present(term, share))}


def where_present(term: Term, share: float) -> Term:
    """A term for rows of which a `share` has teacher outputs, the others NaN; averaged over those that have them, as
    labels are by `TaskLoss`.
    """

    def present(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        keep = ~teacher.logits.isnan().any(dim=1)
        if not keep.any():
            return student.logits.sum() * 0.0
        loss = term(Outputs(logits=student.logits[keep]), Outputs(logits=teacher.logits[keep]), None)
        return loss * keep.sum() / (len(keep) * share)

    return present


def measure_outputs(
    run: TrainerRun,
    teacher: TeacherColumns,
    scores: TaskMetrics,
    metric: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, dict[str, float]]:
    """The teacher's metrics by split, on the rows with both a label and an output. Warns if they are no better than
    chance.

    Args:
        splits: labels and logits (rows, classes).
    """
    found = {}
    for split, (labels, logits) in splits.items():
        both = labelled(labels) & has_output(logits)
        if both.any():
            metrics = scores.metrics(logits[both], labels[both])
            found[split] = {"rows": int(both.sum()), **metrics}
            run.warn(scores.warning(teacher.description, metrics, labels[both], metric, split))
    return found
