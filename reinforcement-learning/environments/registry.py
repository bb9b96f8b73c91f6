"""Environments by their ids: their registration, time limits, folder names and fingerprints."""

import hashlib
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from kd.common.utils.errors import UserError

EPISODE_STEPS = 10_000  # maximum length of an episode, for environments without a time limit
MODULES = {"ALE/": "ale_py"}  # modules that register environments when they are imported, by prefix of the id


def find_spec(id: str) -> EnvSpec:
    """The registered environment; `module:id` imports the module first, as in gym.make."""
    module, _, name = id.rpartition(":")
    module = module or _registering_module(name)
    try:
        if module:
            import_module(module)
    except ImportError as error:
        raise unusable(id, error) from error
    if name not in gym.registry:
        raise UserError(f"unknown environment {id}{_nearest(name)}")
    return gym.registry[name]


def unusable(id: str, error: Exception) -> UserError:
    """The error for an environment that cannot be made, with a hint at what would help."""
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"; try pip install {error.name.split('.')[0]}"
    elif isinstance(error, ImportError):  # Hopper-v3 and the like are registered only to raise that they have moved
        hint = _nearest(id)
    elif isinstance(error, OSError) and id.startswith("ALE/"):
        hint = "; the ROM files are part of pip install ale_py"
    reason = f"{error or type(error).__name__}{hint}"
    return UserError(" ".join(f"environment {id} cannot be made: {reason}".split()))


def _nearest(name: str) -> str:
    """`; did you mean ...?` with the most similar id, of equally similar ones the highest version."""
    matches = get_close_matches(name, [other for other in gym.registry if other != name], n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def time_limit(spec: EnvSpec) -> dict[str, Any]:
    """The argument that limits the episodes of an environment which is registered without a time limit."""
    limited = spec.max_episode_steps is not None or "max_episode_steps" in spec.kwargs or spec.namespace == "ALE"
    return {} if limited else {"max_episode_steps": EPISODE_STEPS}


def time_limit_warning(id: str) -> str | None:
    if not time_limit(find_spec(id)):
        return None
    return (
        f"environment {id} has no time limit: its episodes are cut after {EPISODE_STEPS:,} steps; register it with "
        "max_episode_steps for another limit"
    )


def registration_code(id: str) -> str:
    """The line of code that registers an environment which Gymnasium does not register itself, or nothing."""
    module = _registering_module(id)
    return f"import {module}  # registers the environment\n" if module else ""


def _registering_module(id: str) -> str:
    return next((module for prefix, module in MODULES.items() if id.startswith(prefix)), "")


def folder_name(id: str) -> str:
    return id.replace("/", "-").replace(":", "-")


def fingerprint(id: str) -> str:
    """Hash of the environment's specification and Gymnasium's version."""
    registered = id.rpartition(":")[2]  # `module:id` names the module that registers the id
    spec = f"{gym.__version__} {gym.spec(registered)}"
    return hashlib.sha256(spec.encode()).hexdigest()[:12]


def require_module_on_command_line(id: str, where: str) -> None:
    """Raises UserError where a file, `where`, names an environment as `module:id`, and the command line does not:
    importing the module runs its code.
    """
    module, _, name = id.rpartition(":")
    if module and not any(id in word for word in sys.argv[1:]):
        raise UserError(
            f"{where} names the environment {id}, and importing {module} would run its code: pass "
            f"--environment {id} if you trust it, or the registered {name} alone"
        )


def require_single_process() -> None:
    """Raises UserError in one of several processes, as of torchrun."""
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise UserError(
            f"policies are trained and evaluated in one process, not in {processes}: start the script with python "
            "instead of torchrun or accelerate launch"
        )
