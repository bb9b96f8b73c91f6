"""The files of a teacher: a zip of Stable-Baselines3, its VecNormalize statistics and its settings.

A teacher is a zip, a folder of this project or of rl_zoo3, or a repository on the Hub. Nothing in the files is
executed: tagged YAML values in the settings of rl_zoo3 (config.yml and args.yml) are read as plain values, and each
class or function in the pickle of VecNormalize is replaced by an object that only stores its arguments.
"""

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import yaml
from gymnasium import spaces
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from kd.common.data.sources import offline_if_unreachable
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.teacher_model.policies import ObservationStatistics
from kd.reinforcement_learning.teacher_model.recipes import folder_name

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ZIPS_OF_A_RUN = (  # of a student or its run, then of a teacher's run or its stage
    *("model.zip", "student.zip", "student/student.zip", "{environment}/model.zip"),
    *("stages/teacher/{environment}/model.zip", "stages/teacher/model.zip"),
)
METRICS_ZIP = "train_eval_metrics.zip"  # rl_zoo3 uploads it with every model; it does not contain the model
STATISTICS_NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")  # of rl_zoo3, locally and on the Hub
NO_STATISTICS = "none"  # value of --vecnormalize
OTHER_PICKLES = re.compile(r"replay_buffer|demonstrations|study", re.IGNORECASE)  # of Stable-Baselines3 and rl_zoo3
CONFIG, ARGS = "config.yml", "args.yml"
ATARI_WRAPPER = "AtariWrapper"  # the Atari environments of this project preprocess in the same way
INSTEAD = "pass --teacher a local .zip that Stable-Baselines3 saved, a folder with one, or owner/name on the Hub"


@dataclass(frozen=True)
class TeacherFiles:
    """A zip of Stable-Baselines3 and its VecNormalize statistics, if any.

    `raw`: whether --vecnormalize is `none`. `warnings`: possible problems with the files.
    """

    policy: Path
    statistics: Path | None
    raw: bool = False
    warnings: tuple[str, ...] = ()


def find_teacher(
    name: str, environment: str, vecnormalize: str | None = None, flag: str = "--vecnormalize"
) -> TeacherFiles | None:
    """Finds the files of the teacher `name`, and downloads them from the Hub if necessary. Returns None for `train`.

    `vecnormalize` is the value of `flag`: the file of the statistics, or `none`.
    """
    if name == "train":
        return None
    path, agent_folder = Path(name), environment.replace("/", "-")  # rl_zoo3 writes ALE/Pong-v5 as ALE-Pong-v5
    if path.is_file():
        policy = path
    elif path.is_dir():
        policy = _find_zip(path, name, agent_folder)
    elif HUB_ID.fullmatch(name) and path.suffix != ".zip":
        policy = _find_zip(_download(name), name, agent_folder)
    else:
        raise UserError(f"there is no teacher at {name}: {INSTEAD}")
    folders = _search_folders(policy, agent_folder)
    _check_wrappers(policy, folders, atari=environment.startswith("ALE/"))
    statistics, warnings = _find_statistics(policy, folders, vecnormalize, flag)
    warnings += _training_warnings(policy, folders, environment)
    return TeacherFiles(policy, statistics, vecnormalize == NO_STATISTICS, tuple(warnings))


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
    in_runs = [usual.format(environment=folder_name(environment)) for usual in ZIPS_OF_A_RUN]
    for usual in (*in_runs, f"{environment}.zip", "best_model.zip"):
        if (folder / usual).is_file():
            return folder / usual
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


def _files(folders: Iterable[Path], name: str) -> list[Path]:
    return [folder / name for folder in folders if (folder / name).is_file()]


# ---- settings of rl_zoo3 ----


class _PlainLoader(yaml.SafeLoader):
    """Reads a tagged value as the plain value."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("", _plain)


def _read_settings(path: Path) -> dict[Any, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        if isinstance(settings, list):  # the arguments of an OrderedDict; the first is a list of keys and values
            settings = dict(settings[0])
        if isinstance(settings, dict):
            return settings
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, so the settings of the agent's training are unknown: remove it")


def _normalizes_observations(config: Path) -> bool:
    """Whether `normalize` in a config.yml, `true` or arguments of VecNormalize, includes observations."""
    normalize = _read_settings(config).get("normalize", False)
    return bool(normalize) and not re.search(r"norm_obs\W+False", str(normalize))


def _check_wrappers(policy: Path, folders: Iterable[Path], atari: bool) -> None:
    """Raises UserError if the agent was trained in a wrapper that this project does not apply."""
    for config in _files(folders, CONFIG):
        settings = _read_settings(config)
        named = re.findall(r"[A-Za-z_][\w.]*\.\w+", f"{settings.get('env_wrapper')} {settings.get('vec_env_wrapper')}")
        wrappers = [name for name in named if not (atari and name.endswith(ATARI_WRAPPER))]
        if settings.get("frame_stack") and not atari:
            wrappers.append(f"VecFrameStack of {settings['frame_stack']}")
        if wrappers:
            raise UserError(
                f"{policy} was trained in {', '.join(wrappers)}, according to {config}, but wrappers "
                "of environments are not supported: pass a teacher that was trained without them"
            )


def _training_warnings(policy: Path, folders: Iterable[Path], environment: str) -> list[str]:
    """Warns if args.yml contains another environment, or arguments of the environment that are not used here."""
    warnings = []
    for args in _files(folders, ARGS):
        settings = _read_settings(args)
        trained, keywords = settings.get("env"), settings.get("env_kwargs")
        if trained and str(trained).rpartition(":")[2] != environment.rpartition(":")[2]:
            warnings.append(f"{policy} was trained on {trained} ({args}), and its returns on {environment} may differ")
        if keywords:
            warnings.append(
                f"{policy} was trained with the arguments {keywords} of its environment ({args}), which are not used "
                "here: its returns may differ"
            )
    return warnings


# ---- statistics of observations ----


def _find_statistics(
    policy: Path, folders: list[Path], chosen: str | None, flag: str
) -> tuple[Path | None, list[str]]:
    """Returns the file of the `chosen` statistics, or of those in `folders`, or None; and warnings.

    Raises UserError if the only statistics do not match the model by name, or if the settings of rl_zoo3 require
    statistics and there are none.
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
    if found := next((file for file in names if file.is_file()), None):
        return found, []
    others = [
        file for folder in folders for file in sorted(folder.glob("*.pkl")) if not OTHER_PICKLES.search(file.name)
    ]
    for file in others:
        if _has_statistics(file):
            raise UserError(
                f"{file} has statistics of observations, but its name does not match {policy}: pass "
                f"{flag} {file} to use them, or {flag} {NO_STATISTICS}"
            )
    for config in _files(folders, CONFIG):
        if _normalizes_observations(config):
            raise UserError(
                f"{policy} was trained on normalized observations, according to {config}, but its statistics "
                f"are missing: put the file that VecNormalize saved at {policy.parent / STATISTICS_NAMES[0]}, or pass "
                f"{flag}"
            )
    return None, [f"{file} is not used: it has no statistics of observations" for file in others]


def _has_statistics(file: Path) -> bool:
    try:
        return read_statistics(file) is not None
    except UserError:
        return False


def read_statistics(path: Path) -> ObservationStatistics | None:
    """The statistics in a file that VecNormalize.save wrote, or None if it does not normalize observations.

    Unlike VecNormalize.load, this calls no class or function of the pickle, and needs neither the gym nor the numpy
    version with which the file was saved.
    """
    try:
        with open(path, "rb") as file:
            return _statistics_in(_InertUnpickler(file).load().state, path)
    except UserError:
        raise
    except Exception as error:  # damaged or malicious bytes raise any exception
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be read as VecNormalize statistics ({' '.join(str(reason).split())}): pass the file that "
            "VecNormalize.save wrote"
        ) from None


def _statistics_in(saved: dict[str, Any], path: Path) -> ObservationStatistics | None:
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


def check_statistics(statistics: ObservationStatistics, observation_space: spaces.Space, path: Path) -> None:
    """Raises UserError if statistics, read from `path`, do not fit the observations of an environment."""
    if statistics.mean.shape != observation_space.shape:
        raise UserError(
            f"{path} has statistics of observations of shape {statistics.mean.shape}, but the environment's have "
            f"shape {observation_space.shape}: pass the statistics that were saved with this teacher"
        )


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
