"""Where a teacher's files are: a local zip, a folder of this project or of rl_zoo3, or a repository on the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from kd.common.data.sources import no_retries_when_unreachable
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.teacher_model.statistics_files import NONE, find_statistics
from kd.reinforcement_learning.teacher_model.zoo import ARGS, CONFIG, other_training, refuse_wrappers

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OF_THIS_PROJECT = ("model.zip", "stages/teacher/model.zip", "student.zip", "student/student.zip")
NO_MODEL = "train_eval_metrics.zip"  # lies beside every model that rl_zoo3 pushed to the Hub
INSTEAD = "pass --teacher a local .zip that Stable-Baselines3 saved, a folder with one, or owner/name on the Hub"


@dataclass(frozen=True)
class TeacherFiles:
    """A model of Stable-Baselines3, and the VecNormalize statistics that belong to it if it has any; `raw` where the
    user says that it has none. `warnings`: what is uncertain about them.
    """

    policy: Path
    statistics: Path | None
    raw: bool = False
    warnings: tuple[str, ...] = ()


def find_teacher(
    name: str, environment: str, vecnormalize: str | None = None, flag: str = "--vecnormalize"
) -> TeacherFiles | None:
    """The files of the teacher that --teacher names, or None where it says `train`; downloads them from the Hub.
    `vecnormalize` is what `flag` says: the file of its statistics, or `none`.
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
    refuse_wrappers(policy, places, atari=environment.startswith("ALE/"))
    statistics, warnings = find_statistics(policy, places, vecnormalize, flag)
    warnings += other_training(policy, places, environment)
    return TeacherFiles(policy, statistics, vecnormalize == NONE, tuple(warnings))


def _places(policy: Path, environment: str) -> list[Path]:
    """Where statistics and settings of a zip are: beside it, or in the folder beside it that is named like it or like
    the environment.
    """
    places = [policy.parent, policy.with_suffix(""), policy.parent / environment]
    agents = [config.parent for config in sorted(policy.parent.glob(f"*/{CONFIG}"))]
    if policy.name == "best_model.zip" or (len(agents) == 1 and not policy.with_suffix("").is_dir()):
        places += agents  # the zip is named like none, and the id of the environment may have changed since
    return list(dict.fromkeys(places))


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
    wanted, unwanted = ["*.zip", "*.pkl", CONFIG, ARGS], [NO_MODEL, "*replay_buffer*"]
    try:
        with no_retries_when_unreachable():
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
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
