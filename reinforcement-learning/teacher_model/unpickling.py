"""Policies that Stable-Baselines3 unpickles itself: for zips that the user trusts, since a pickle can run any code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from kd.common.utils.errors import UserError

SAVED = "give the zip that Stable-Baselines3 wrote with model.save"


def unpickled_policy(
    path: Path, algorithm: type[BaseAlgorithm], observation_space: spaces.Space, action_space: spaces.Space
) -> BasePolicy:
    """The policy in a zip of an algorithm, on the CPU. Raises UserError whatever goes wrong."""
    given = {"observation_space": observation_space, "action_space": action_space, "learning_rate": 0.0}
    given |= dict.fromkeys(("lr_schedule", "clip_range", "exploration_schedule"), no_learning)  # bytecode, maybe old
    given |= {"buffer_size": 1, "n_steps": 1, "seed": None}  # no room for data; the seed would be set in this process
    try:
        with legacy_gym():
            return algorithm.load(path, device="cpu", custom_objects=given).policy
    except Exception as error:  # what is unpickled runs, and may raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"Stable-Baselines3 cannot unpickle {path} ({type(error).__name__}: {reason}): {SAVED}"
        ) from None


def no_learning(_: float) -> float:
    """A learning rate, as a schedule."""
    return 0.0


@contextmanager
def legacy_gym() -> Iterator[None]:
    """Lets pickles find gymnasium under its old name `gym` inside the block, unless a real gym is installed."""
    if "gym" in sys.modules or find_spec("gym"):
        yield
        return
    loaded = [name for name in sys.modules if name.partition(".")[0] == "gymnasium"]
    sys.modules.update({name.replace("gymnasium", "gym", 1): sys.modules[name] for name in loaded})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "gym"]:
            del sys.modules[name]
