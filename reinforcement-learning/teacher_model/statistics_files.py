"""Which file of VecNormalize belongs to a model of Stable-Baselines3: by the names in use, or the given one."""

import re
from pathlib import Path

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.teacher_model.statistics import read_statistics
from kd.reinforcement_learning.teacher_model.zoo import CONFIG, normalizes_observations

NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")  # as rl_zoo3 names them locally, and on the Hub
NONE = "none"  # what a flag says where a model takes observations as they are
OTHER_PICKLES = re.compile(r"replay_buffer|demonstrations|study", re.IGNORECASE)  # of Stable-Baselines3 and rl_zoo3


def find_statistics(
    policy: Path, places: list[Path], given: str | None = None, flag: str = "--vecnormalize"
) -> tuple[Path | None, list[str]]:
    """The statistics of the model `policy`, or None, and warnings: the file that is `given`, or what `places` have.

    Raises UserError where a place has statistics, and no name says that they are of this model; and where the settings
    of rl_zoo3 say that there must be some.
    """
    if given == NONE:
        return None, []
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"there is no file {given}: pass {flag} the file that VecNormalize.save wrote, or {NONE}")
        return Path(given), []
    for file in [*_of_checkpoint(policy), *(place / name for place in places for name in NAMES)]:
        if file.is_file():
            return file, []
    others = [file for place in places for file in sorted(place.glob("*.pkl")) if not OTHER_PICKLES.search(file.name)]
    for file in others:
        if _normalizes(file):
            raise UserError(
                f"{file} has statistics of observations, and its name does not say that they are of {policy}: pass "
                f"{flag} {file} to use them, or {flag} {NONE}"
            )
    for place in places:
        if (place / CONFIG).is_file() and normalizes_observations(place / CONFIG):
            raise UserError(
                f"{policy} was trained on normalized observations, as {place / CONFIG} says, and its statistics "
                f"are missing: put the file that VecNormalize saved at {policy.parent / NAMES[0]}, or pass {flag}"
            )
    return None, [f"{file} is not used: it has no statistics of observations" for file in others]


def _of_checkpoint(policy: Path) -> list[Path]:
    """What CheckpointCallback of Stable-Baselines3 calls the statistics of PREFIX_N_steps.zip."""
    parts = re.fullmatch(r"(.+)_(\d+_steps)\.zip", policy.name)
    return [policy.with_name(f"{parts[1]}_vecnormalize_{parts[2]}.pkl")] if parts else []


def _normalizes(file: Path) -> bool:
    try:
        return read_statistics(file) is not None
    except UserError:
        return False
