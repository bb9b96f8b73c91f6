"""Where a teacher's files are: a local zip, a folder of this project or of rl_zoo3, or a repository on the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from common.hub import no_retries_when_unreachable
from common.utils.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
STATISTICS = ("vecnormalize.pkl", "vec_normalize.pkl")  # as rl_zoo3 names them locally, and on the Hub
OF_THIS_PROJECT = ("model.zip", "stages/teacher/model.zip", "student.zip", "student/student.zip")
NO_MODEL = "train_eval_metrics.zip"  # lies beside every model that rl_zoo3 pushed to the Hub
INSTEAD = "pass --teacher a local .zip that Stable-Baselines3 saved, a folder with one, or owner/name on the Hub"


@dataclass(frozen=True)
class TeacherFiles:
    """A model of Stable-Baselines3, and the VecNormalize statistics that belong to it if it has any."""

    policy: Path
    statistics: Path | None


def find_teacher(name: str, environment: str) -> TeacherFiles | None:
    """The files of the teacher that --teacher names, or None where it says `train`; downloads them from the Hub."""
    if name == "train":
        return None
    path, environment = Path(name), environment.replace("/", "-")  # rl_zoo3 writes ALE/Pong-v5 as ALE-Pong-v5
    if path.is_file():
        policy = path
    elif path.is_dir():
        policy = _policy_in(path, name, environment)
    elif HUB_ID.fullmatch(name) and path.suffix != ".zip":
        policy = _policy_in(_download(name), name, environment)
    else:
        raise UserError(f"there is no teacher at {name}: {INSTEAD}")
    return TeacherFiles(policy, _statistics_of(policy, environment))


def _policy_in(folder: Path, name: str, environment: str) -> Path:
    for usual in (*OF_THIS_PROJECT, f"{environment}.zip", "best_model.zip"):
        if (folder / usual).is_file():
            return folder / usual
    found = sorted(path for path in folder.glob("*.zip") if path.name != NO_MODEL)
    if not found:
        raise UserError(f"there is no zip in {name}: {INSTEAD}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"there are several zips in {name} ({names}): pass --teacher the path of one")
    return found[0]


def _download(name: str) -> Path:
    wanted = ["*.zip", *STATISTICS, "config.yml"]
    try:
        with no_retries_when_unreachable():
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=NO_MODEL))
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


def _statistics_of(policy: Path, environment: str) -> Path | None:
    """Beside the zip, or in the folder beside it that is named like it or like the environment."""
    places = [policy.parent, policy.with_suffix(""), policy.parent / environment]
    if policy.name == "best_model.zip":  # named like none, and the id of the environment may have changed since
        places += [config.parent for config in sorted(policy.parent.glob("*/config.yml"))]
    for place in places:
        for name in STATISTICS:
            if (place / name).is_file():
                return place / name
    for place in places:
        if (place / "config.yml").is_file() and _normalizes(place / "config.yml"):
            raise UserError(
                f"{policy} was trained on normalized observations, as {place / 'config.yml'} says, and its statistics "
                f"are missing: put the file that VecNormalize saved at {policy.parent / STATISTICS[0]}"
            )
    return None


class _PlainLoader(yaml.SafeLoader):
    """Reads what a tag would make a Python object of as the plain value that is written there."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("", _plain)


def _normalizes(config: Path) -> bool:
    """Whether rl_zoo3's settings in a config.yml normalize observations: `true`, or arguments of VecNormalize."""
    try:
        settings = yaml.load(config.read_text(encoding="utf-8"), _PlainLoader)
        if isinstance(settings, list):  # the arguments of an OrderedDict, of which the first is its pairs
            settings = dict(settings[0])
        normalize = settings.get("normalize", False)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError):
        raise UserError(
            f"{config} is damaged, and whether observations are normalized is not known: remove it"
        ) from None
    return bool(normalize) and not re.search(r"norm_obs\W+False", str(normalize))
