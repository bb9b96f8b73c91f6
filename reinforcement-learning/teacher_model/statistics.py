"""The statistics of observations in a file of VecNormalize, read without running anything that the file names.

A pickle is a program: it may call any function of any module. Here every name in it stands for an `_Inert`, which
stores its arguments and does nothing; arrays are then built from their bytes. So a file needs neither the packages it
was saved with (gym or gymnasium, numpy 1 or 2) nor trust. VecNormalize.load would run it.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from kd.common.utils.errors import UserError


@dataclass(frozen=True)
class ObservationStatistics:
    """Statistics of VecNormalize: observations become (o - mean) / sqrt(var + epsilon), clipped to +-clip."""

    mean: np.ndarray
    var: np.ndarray
    epsilon: float
    clip: float

    @property
    def std(self) -> np.ndarray:
        """The divisor of observations."""
        return np.sqrt(self.var + self.epsilon)

    def check(self, observation_space: spaces.Space, path: Path) -> None:
        """Raises UserError where the statistics, read from `path`, do not fit the observations."""
        if self.mean.shape != observation_space.shape:
            raise UserError(
                f"{path} has statistics of observations of shape {self.mean.shape}, the environment's are "
                f"{observation_space.shape}: pass the statistics that were saved with this teacher"
            )


def read_statistics(path: Path) -> ObservationStatistics | None:
    """The statistics in a file that VecNormalize.save wrote, or None where it does not normalize observations."""
    try:
        with open(path, "rb") as file:
            saved = _InertUnpickler(file).load().state
        if not saved["norm_obs"]:
            return None
        if isinstance(saved["obs_rms"], dict):
            raise UserError(f"{path} normalizes Dict observations, which are not supported: flatten them to one Box")
        moments = saved["obs_rms"].state
        mean, var = _array(moments["mean"]), _array(moments["var"])
        if mean.shape != var.shape:
            raise ValueError("mean and variance differ in shape")
        found = ObservationStatistics(mean, var, float(_array(saved["epsilon"])), float(_array(saved["clip_obs"])))
        if not (np.isfinite(mean).all() and (found.var + found.epsilon > 0).all() and np.isfinite(found.std).all()):
            raise ValueError("its moments are not finite, or its variances not positive")
        return found
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read as VecNormalize statistics ({error.strerror}): pass the file that "
            "VecNormalize.save wrote"
        ) from None
    except Exception as error:  # damaged or hostile bytes raise whatever they happen to hit
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read as VecNormalize statistics ({type(error).__name__}: {reason}): "
            "pass the file that VecNormalize.save wrote"
        ) from None


class _Inert:
    """Stands for any class or function that a pickle names, called or not: stores its arguments."""

    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> "_Inert":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores an entry of a dict, which holds no statistics."""

    def extend(self, items: Any) -> None:
        """Ignores items of a list, which holds no statistics."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        return type("_Inert", (_Inert,), {"name": f"{module}.{name}"})


def _array(value: Any) -> np.ndarray:
    """A number, or an array of floats in one of numpy's three pickle formats, as float64."""
    if isinstance(value, int | float):
        return np.array(value, np.float64)
    order: Literal["C", "F"] = "C"
    match value.name.removeprefix("numpy.").removeprefix("_").removeprefix("core."):
        case "multiarray._reconstruct":
            _, shape, dtype, fortran, raw = value.state
            order = "F" if fortran else "C"
        case "numeric._frombuffer":  # pickle protocol 5
            raw, dtype, shape, order = value.arguments
        case "multiarray.scalar":
            (dtype, raw), shape = value.arguments, ()
        case name:
            raise ValueError(f"{name} where numbers should be")
    if dtype.arguments[0] not in ("f4", "f8"):
        raise ValueError(f"numbers of type {dtype.arguments[0]}")
    flat = np.frombuffer(raw, dtype.state[1] + dtype.arguments[0])
    return flat.astype(np.float64).reshape(shape, order=order)
