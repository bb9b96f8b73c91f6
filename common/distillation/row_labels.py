"""The labels of the rows of a dataset, of which some may be missing: None, NaN, or a negative class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED


def label_array(values: Sequence[Any] | np.ndarray | Tensor) -> np.ndarray | None:
    """Class ids (int64), IGNORED if negative, or floats (rows,) or (rows, labels), NaN where missing; None if all are.

    A class next to None or NaN is a float until `as_classes`. Raises UserError for anything else.
    """
    if isinstance(values, Tensor):
        values = values.numpy()
    if not isinstance(values, np.ndarray) or values.dtype == object:
        known = next((value for value in values if value is not None), None)
        missing = np.full(() if known is None else np.shape(known), np.nan)
        values = [missing if value is None else value for value in values]
    try:
        labels = np.asarray(values)
    except ValueError:  # of several lengths
        labels = np.empty((0,), dtype=object)
    several = labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind == "f"
    if len(labels) != len(values) or not (labels.ndim == 1 or several) or labels.dtype.kind not in "biuf":
        raise UserError(
            f"a label must be one number, or floats of 0 and 1 for several labels, got {values[0]!r}: convert it, or "
            "leave it out"
        )
    if labels.dtype.kind != "f":
        return _marked(labels.astype(np.int64))
    return None if np.isnan(labels).all() else labels


def as_classes(labels: np.ndarray) -> np.ndarray:
    """Floats (rows,) of which some are NaN and the others whole numbers, as class ids; anything else unchanged."""
    missing = np.isnan(labels) if labels.dtype.kind == "f" and labels.ndim == 1 else np.zeros(1, dtype=bool)
    if not missing.any() or (labels[~missing] % 1).any():
        return labels
    found = _marked(np.where(missing, IGNORED, labels).astype(np.int64))
    assert found is not None, "some label is not NaN"
    return found


def _marked(labels: np.ndarray) -> np.ndarray | None:
    """Class ids with IGNORED in place of negative ones; None if all are negative."""
    known = labels >= 0
    if set(np.unique(labels)) == {-1, 1}:
        raise UserError("the labels are -1 and 1, and -1 means that there is no label: use 0 and 1")
    return np.where(known, labels, IGNORED) if known.any() else None
