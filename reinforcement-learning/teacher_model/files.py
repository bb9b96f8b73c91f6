"""The files of a teacher: a zip of Stable-Baselines3, its VecNormalize statistics and its settings.

A teacher is a zip, a folder of this project or of rl_zoo3, or a repository on the Hub. Nothing in the files is
executed: each class or function in the pickle of VecNormalize is replaced by an object that only stores its arguments.
"""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
from gymnasium import spaces
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from kd.common.data.sources import offline_if_unreachable
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environment_ids import base_id
from kd.reinforcement_learning.data.observations import box_space
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics
from kd.reinforcement_learning.teacher_model.recipes import EnvironmentArguments, folder_name
from kd.reinforcement_learning.teacher_model.zoo import (
    ARGS,
    CONFIG,
    UNTRAINED,
    Training,
    check_wrappers,
    matching_environment,
    read_training,
    training_warnings,
)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ZIPS_OF_A_RUN = (  # of a student or its run, then of a teacher's run or its stage
    *("model.zip", "student.zip", "student/student.zip", "{environment}/model.zip"),
    *("stages/teacher/{environment}/model.zip", "stages/teacher/model.zip"),
)
METRICS_ZIP = "train_eval_metrics.zip"  # rl_zoo3 uploads it with every model; it does not contain the model
STATISTICS_NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")  # of rl_zoo3, locally and on the Hub
NO_STATISTICS = "none"  # value of --vecnormalize
OTHER_PICKLES = re.compile(r"replay_buffer|demonstrations|study", re.IGNORECASE)  # of Stable-Baselines3 and rl_zoo3
INSTEAD = "pass --teacher a local .zip that Stable-Baselines3 saved, a folder with one, or owner/name on the Hub"

Statistics = ObservationStatistics | dict[str, ObservationStatistics]  # of a Box, or of the normalized keys of a Dict


@dataclass(frozen=True)
class TeacherFiles:
    """A zip of Stable-Baselines3 and its VecNormalize statistics, if any.

    `raw`: whether --vecnormalize is `none`. `warnings`: possible problems with the files. `training`: how the policy
    was trained.
    """

    policy: Path
    statistics: Path | None
    raw: bool = False
    warnings: tuple[str, ...] = ()
    training: Training = field(default=UNTRAINED, compare=False)


def find_teacher(
    name: str, environment: str, vecnormalize: str | None = None, flag: str = "--vecnormalize"
) -> TeacherFiles | None:
    """Finds the files of the teacher `name`, and downloads them from the Hub if necessary. Returns None for `train`.

    `vecnormalize` is the value of `flag`: the file of the statistics, or `none`.
    """
    if name == "train":
        return None
    policy, folders, training = _find_policy(name, environment)
    check_wrappers(policy, training, environment)
    statistics, warnings = _find_statistics(policy, folders, vecnormalize, flag, training.normalized)
    warnings += training_warnings(policy, training, environment)
    return TeacherFiles(policy, statistics, vecnormalize == NO_STATISTICS, tuple(warnings), training)


def environment_of(name: str, chosen: str | None, args: EnvironmentArguments) -> tuple[str | None, list[str]]:
    """The environment of the teacher `name`, and notes about what was inferred (see `matching_environment`). `chosen`:
    the value of --environment.
    """
    training = UNTRAINED if name == "train" else _find_policy(name, chosen or "")[2]
    return matching_environment(training, chosen, args.environment_arguments(), args.wrapper)


def _find_policy(name: str, environment: str) -> tuple[Path, list[Path], Training]:
    """The zip of a teacher, the folders that may contain its other files, and its training. An empty `environment`
    stands for any.
    """
    path, id = Path(name), base_id(environment)
    if path.is_file():
        policy = path
    elif path.is_dir():
        policy = _find_zip(path, name, environment)
    elif HUB_ID.fullmatch(name) and path.suffix != ".zip":
        policy = _find_zip(_download(name), name, environment)
    else:
        raise UserError(f"there is no teacher at {name}: {INSTEAD}")
    folders = _search_folders(policy, id.replace("/", "-"))  # rl_zoo3 writes ALE/Pong-v5 as ALE-Pong-v5
    return policy, folders, read_training(policy, folders, atari=id.startswith("ALE/"))


def _search_folders(policy: Path, environment: str) -> list[Path]:
    """Folders that may contain the statistics and settings of a zip: its folder, and subfolders that have the name of
    the zip or of the environment.
    """
    folders = [policy.parent, policy.with_suffix(""), policy.parent / environment]
    agents = [config.parent for config in sorted(policy.parent.glob(f"*/{CONFIG}"))]
    if policy.name == "best_model.zip" or (len(agents) == 1 and not policy.with_suffix("").is_dir()):
        folders += agents  # the agent may have been trained under another id of the environment
    return list(dict.fromkeys(folders))


def _find_zip(folder: Path, name: str, environment: str) -> Path:
    folder_names = (folder_name(environment) or "*", f"{folder_name(environment)}-*")  # the id, or it with arguments
    in_runs = list(dict.fromkeys(usual.format(environment=name) for name in folder_names for usual in ZIPS_OF_A_RUN))
    for usual in (*in_runs, f"{base_id(environment).replace('/', '-')}.zip", "best_model.zip"):
        if len(matches := sorted(folder.glob(usual))) == 1:
            return matches[0]
    found = sorted(path for path in folder.glob("*.zip") if path.name != METRICS_ZIP)
    if not found:
        raise UserError(f"there is no zip in {name}: {INSTEAD}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"there are several zips in {name} ({names}): pass --teacher the path of one")
    return found[0]


def _download(name: str) -> Path:
    allowed, ignored = ["*.zip", "*.pkl", CONFIG, ARGS], [METRICS_ZIP, "*replay_buffer*"]
    try:
        with offline_if_unreachable():
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=allowed, ignore_patterns=ignored))
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a local file or folder nor a model on the Hub that you may read: {INSTEAD}"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is neither a local file or folder nor cached, and the Hub cannot be reached: "
            "pass --teacher a local .zip that Stable-Baselines3 saved"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name} from the Hub ({' '.join(str(error).split())}): {INSTEAD}") from None


# ---- statistics of observations ----


def _find_statistics(
    policy: Path, folders: list[Path], chosen: str | None, flag: str, normalized: Path | None
) -> tuple[Path | None, list[str]]:
    """Returns the file of the `chosen` statistics, or of those in `folders`, or None; and warnings.

    `normalized`: the settings that require statistics, if any. Raises UserError if there are none then, or if the only
    statistics do not match the model by name.
    """
    if chosen == NO_STATISTICS:
        return None, []
    if chosen is not None:
        if not Path(chosen).is_file():
            raise UserError(
                f"there is no file {chosen}: pass {flag} the file that VecNormalize.save wrote, or {NO_STATISTICS}"
            )
        return Path(chosen), []
    names = [folder / name for folder in folders for name in STATISTICS_NAMES]
    if step := re.fullmatch(r"(.+)_(\d+_steps)\.zip", policy.name):  # of Stable-Baselines3's CheckpointCallback
        names.insert(0, policy.with_name(f"{step[1]}_vecnormalize_{step[2]}.pkl"))
    others = [
        file for folder in folders for file in sorted(folder.glob("*.pkl")) if not OTHER_PICKLES.search(file.name)
    ]
    if found := next((file for file in names if file.is_file()), None):
        unused = [file for file in others if file not in names and "_vecnormalize_" not in file.name]
        return found, [f"{file} is not used: the statistics of observations are {found}" for file in unused]
    for file in others:
        if _has_statistics(file):
            raise UserError(
                f"{file} has statistics of observations, but its name does not match {policy}: pass "
                f"{flag} {file} to use them, or {flag} {NO_STATISTICS}"
            )
    if normalized is not None:
        raise UserError(
            f"{policy} was trained on normalized observations, according to {normalized}, but its statistics are "
            f"missing: put the file that VecNormalize saved at {policy.parent / STATISTICS_NAMES[0]}, or pass {flag}"
        )
    return None, [f"{file} is not used: it has no statistics of observations" for file in others]


def _has_statistics(file: Path) -> bool:
    try:
        return read_statistics(file) is not None
    except UserError:
        return False


def read_statistics(path: Path) -> Statistics | None:
    """The statistics in a file that VecNormalize.save wrote, by key for Dict observations, or None if it does not
    normalize observations.

    Unlike VecNormalize.load, this calls no class or function of the pickle, and needs neither the gym nor the numpy
    version with which the file was saved.
    """
    try:
        with open(path, "rb") as file:
            return _statistics_in(_InertUnpickler(file).load().state)
    except Exception as error:  # damaged or malicious bytes raise any exception
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be read as VecNormalize statistics ({' '.join(str(reason).split())}): pass the file that "
            "VecNormalize.save wrote"
        ) from None


def _statistics_in(saved: dict[str, Any]) -> Statistics | None:
    if not saved["norm_obs"]:
        return None
    moments = saved["obs_rms"]
    if isinstance(moments, dict):  # of the normalized keys
        return {str(key): _moments(saved, part.state) for key, part in moments.items()}
    return _moments(saved, moments.state)


def _moments(saved: dict[str, Any], moments: dict[str, Any]) -> ObservationStatistics:
    mean, var = _array(moments["mean"]), _array(moments["var"])
    if mean.shape != var.shape:
        raise ValueError("mean and variance differ in shape")
    found = ObservationStatistics(mean, var, float(_array(saved["epsilon"])), float(_array(saved["clip_obs"])))
    if not (np.isfinite(mean).all() and (found.var + found.epsilon > 0).all() and np.isfinite(found.std).all()):
        raise ValueError("its moments are not finite, or its variances not positive")
    return found


def box_statistics(statistics: Statistics, space: spaces.Space, path: Path) -> ObservationStatistics:
    """Statistics, read from `path`, of the Box that `space`, the observations of an environment, becomes. Keys of a
    Dict without statistics keep their values. Raises UserError for statistics of other observations.
    """
    if isinstance(statistics, ObservationStatistics):
        _check_shape(statistics, box_space(space), path, "observations")
        return statistics
    if not isinstance(space, spaces.Dict) or statistics.keys() - space.keys():
        raise UserError(
            f"{path} has statistics of the keys {', '.join(statistics)}, but the environment has the observations "
            f"{_keys(space)}: pass the statistics that were saved with this teacher"
        )
    epsilon, clip = next(((one.epsilon, one.clip) for one in statistics.values()), (1e-8, float("inf")))
    parts = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()  # mean, variance and clip of each key
    for key, part in space.items():
        size = spaces.flatdim(part)
        if (found := statistics.get(key)) is None:
            parts.append((np.zeros(size), np.full(size, 1 - epsilon), np.full(size, float("inf"))))
        else:
            _check_shape(found, part, path, f"key {key}")
            parts.append((found.mean.flatten(), found.var.flatten(), np.full(size, clip)))
    mean, var, clips = map(np.concatenate, zip(*parts, strict=True))
    return ObservationStatistics(mean, var, epsilon, clips)


def _check_shape(statistics: ObservationStatistics, space: spaces.Space, path: Path, part: str) -> None:
    if statistics.mean.shape != space.shape:
        raise UserError(
            f"{path} has statistics of {part} of shape {statistics.mean.shape}, but the environment's have "
            f"shape {space.shape}: pass the statistics that were saved with this teacher"
        )


def _keys(space: spaces.Space) -> str:
    return ", ".join(space) if isinstance(space, spaces.Dict) else str(space)


class _Inert:
    """Replaces every class and function in a pickle. It stores its arguments and does nothing else."""

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
        """Ignores the entries of dicts, which contain no statistics."""

    def extend(self, items: Any) -> None:
        """Ignores the items of lists, which contain no statistics."""


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
