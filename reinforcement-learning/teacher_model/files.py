"""The files of a teacher: a zip of Stable-Baselines3, the VecNormalize statistics that belong to it, its settings.

A teacher is named by a zip, a folder of this project or of rl_zoo3, or a repository on the Hub. The settings of
rl_zoo3 (config.yml and args.yml) are read without running them: a tagged YAML value is read as the plain value.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from kd.common.data.sources import offline_if_unreachable
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.teacher_model.statistics import read_statistics

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ZIPS_OF_A_RUN = ("model.zip", "stages/teacher/model.zip", "student.zip", "student/student.zip")
METRICS_ZIP = "train_eval_metrics.zip"  # rl_zoo3 pushes it to the Hub with every model; it holds no model
STATISTICS_NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")  # of rl_zoo3, locally and on the Hub
NO_STATISTICS = "none"  # value of --vecnormalize
OTHER_PICKLES = re.compile(r"replay_buffer|demonstrations|study", re.IGNORECASE)  # of Stable-Baselines3 and rl_zoo3
CONFIG, ARGS = "config.yml", "args.yml"
ATARI_WRAPPER = "AtariWrapper"  # its preprocessing is that of the Atari environments here
INSTEAD = "pass --teacher a local .zip that Stable-Baselines3 saved, a folder with one, or owner/name on the Hub"


@dataclass(frozen=True)
class TeacherFiles:
    """A zip of Stable-Baselines3 and its VecNormalize statistics, if any.

    `raw`: the user states that the model has no statistics. `warnings`: what is uncertain about the files.
    """

    policy: Path
    statistics: Path | None
    raw: bool = False
    warnings: tuple[str, ...] = ()


def find_teacher(
    name: str, environment: str, vecnormalize: str | None = None, flag: str = "--vecnormalize"
) -> TeacherFiles | None:
    """The files of the teacher `name`, or None for `train`; downloads from the Hub. `vecnormalize` is the value of
    `flag`: the file of its statistics, or `none`.
    """
    if name == "train":
        return None
    path, folder = Path(name), environment.replace("/", "-")  # rl_zoo3 writes ALE/Pong-v5 as ALE-Pong-v5
    if path.is_file():
        policy = path
    elif path.is_dir():
        policy = _policy_in(path, name, folder)
    elif HUB_ID.fullmatch(name) and path.suffix != ".zip":
        policy = _policy_in(_download(name), name, folder)
    else:
        raise UserError(f"there is no teacher at {name}: {INSTEAD}")
    places = _places(policy, folder)
    _refuse_wrappers(policy, places, atari=environment.startswith("ALE/"))
    statistics, warnings = _find_statistics(policy, places, vecnormalize, flag)
    warnings += _other_training(policy, places, environment)
    return TeacherFiles(policy, statistics, vecnormalize == NO_STATISTICS, tuple(warnings))


def _places(policy: Path, environment: str) -> list[Path]:
    """Folders that may hold statistics and settings of a zip: its folder, and those in it that are named like the zip
    or like the environment.
    """
    places = [policy.parent, policy.with_suffix(""), policy.parent / environment]
    agents = [config.parent for config in sorted(policy.parent.glob(f"*/{CONFIG}"))]
    if policy.name == "best_model.zip" or (len(agents) == 1 and not policy.with_suffix("").is_dir()):
        places += agents  # the zip is named like none, and the id of the environment may have changed since
    return list(dict.fromkeys(places))


def _policy_in(folder: Path, name: str, environment: str) -> Path:
    for usual in (*ZIPS_OF_A_RUN, f"{environment}.zip", "best_model.zip"):
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
            f"{name} is neither a file or folder here nor a model on the Hub that you may read: {INSTEAD}"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is no file or folder here, is not cached, and the Hub cannot be reached: "
            "pass --teacher a local .zip that Stable-Baselines3 saved"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name} from the Hub ({' '.join(str(error).split())}): {INSTEAD}") from None


# ---- statistics ----


def _find_statistics(policy: Path, places: list[Path], chosen: str | None, flag: str) -> tuple[Path | None, list[str]]:
    """The `chosen` statistics of a model, or those in `places`, or None; and warnings.

    Raises UserError where a place has statistics whose name does not match the model, and where the settings of
    rl_zoo3 require statistics.
    """
    if chosen == NO_STATISTICS:
        return None, []
    if chosen is not None:
        if not Path(chosen).is_file():
            raise UserError(
                f"there is no file {chosen}: pass {flag} the file that VecNormalize.save wrote, or {NO_STATISTICS}"
            )
        return Path(chosen), []
    for file in [*_statistics_of_checkpoint(policy), *(place / name for place in places for name in STATISTICS_NAMES)]:
        if file.is_file():
            return file, []
    others = [file for place in places for file in sorted(place.glob("*.pkl")) if not OTHER_PICKLES.search(file.name)]
    for file in others:
        if _has_statistics(file):
            raise UserError(
                f"{file} has statistics of observations, and its name does not match {policy}: pass "
                f"{flag} {file} to use them, or {flag} {NO_STATISTICS}"
            )
    for config in _files(places, CONFIG):
        if _normalizes_observations(config):
            raise UserError(
                f"{policy} was trained on normalized observations, according to {config}, and its statistics "
                f"are missing: put the file that VecNormalize saved at {policy.parent / STATISTICS_NAMES[0]}, or pass "
                f"{flag}"
            )
    return None, [f"{file} is not used: it has no statistics of observations" for file in others]


def _statistics_of_checkpoint(policy: Path) -> list[Path]:
    """The name that Stable-Baselines3's CheckpointCallback gives the statistics of PREFIX_N_steps.zip."""
    parts = re.fullmatch(r"(.+)_(\d+_steps)\.zip", policy.name)
    return [policy.with_name(f"{parts[1]}_vecnormalize_{parts[2]}.pkl")] if parts else []


def _has_statistics(file: Path) -> bool:
    try:
        return read_statistics(file) is not None
    except UserError:
        return False


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
        if isinstance(settings, list):  # the arguments of an OrderedDict, of which the first is its pairs
            settings = dict(settings[0])
        if isinstance(settings, dict):
            return settings
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, and the settings of the agent's training are unknown: remove it")


def _normalizes_observations(config: Path) -> bool:
    """Whether `normalize` in a config.yml, `true` or arguments of VecNormalize, includes observations."""
    normalize = _read_settings(config).get("normalize", False)
    return bool(normalize) and not re.search(r"norm_obs\W+False", str(normalize))


def _refuse_wrappers(policy: Path, places: Iterable[Path], atari: bool) -> None:
    """Raises UserError where the agent was trained in a wrapper that is not applied here."""
    for config in _files(places, CONFIG):
        settings = _read_settings(config)
        named = re.findall(r"[A-Za-z_][\w.]*\.\w+", f"{settings.get('env_wrapper')} {settings.get('vec_env_wrapper')}")
        wrappers = [name for name in named if not (atari and name.endswith(ATARI_WRAPPER))]
        if settings.get("frame_stack") and not atari:
            wrappers.append(f"VecFrameStack of {settings['frame_stack']}")
        if wrappers:
            raise UserError(
                f"{policy} was trained behind {', '.join(wrappers)}, according to {config}, and wrappers "
                "of environments are not supported: pass a teacher that was trained without"
            )


def _other_training(policy: Path, places: Iterable[Path], environment: str) -> list[str]:
    """Warnings where args.yml names another environment, or arguments of the environment that are not used here."""
    warnings = []
    for args in _files(places, ARGS):
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


def _files(places: Iterable[Path], name: str) -> list[Path]:
    return [place / name for place in places if (place / name).is_file()]
