"""Specifications of Gymnasium's environments, with the arguments and wrappers of an id."""

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from kd.common.utils.errors import UserError
from kd.common.utils.modules import import_named, working_directory
from kd.reinforcement_learning.data.environment_ids import ENTRY_POINTS, WRAPPERS, EnvironmentId, parse_id

EPISODE_STEPS = 10_000  # maximum length of an episode, for environments without a time limit
MODULES = {"ALE/": "ale_py"}  # modules that register environments when they are imported, by prefix of the id
# Version 4 differs from versions 2 and 3 only in the bindings of MuJoCo.
MUJOCO = {"Ant", "HalfCheetah", "Hopper", "Humanoid", "Pusher", "Reacher", "Swimmer", "Walker2d", "HumanoidStandup"}
MUJOCO |= {"InvertedPendulum", "InvertedDoublePendulum"}
SUCCESSORS = {f"LunarLander{kind}-v2": f"LunarLander{kind}-v3" for kind in ("", "Continuous")}


def find_spec(id: str) -> EnvSpec:
    """The specification of an environment, with the arguments and wrappers in its id (see `environment_ids`).
    `module:id` imports the module first, as in gym.make.
    """
    parsed = parse_id(id)
    module, _, name = parsed.name.rpartition(":")
    module = module or _registering_module(name)
    try:
        if module:
            with working_directory():
                import_module(module)
    except ImportError as error:
        raise environment_error(id, error) from error
    if name not in gym.registry:
        raise UserError(f"unknown environment {id}{_did_you_mean(name)}")
    spec = gym.registry[name]
    if not (parsed.kwargs or parsed.wrappers):
        return spec
    atari = spec.namespace == "ALE"
    if parsed.wrappers and atari:
        raise UserError(
            f"{id}: Atari games are preprocessed already and take no wrappers: leave out --wrapper, "
            "--student_observation and --frame_stack"
        )
    wrappers = (*spec.additional_wrappers, *(_wrapper_spec(*wrapper) for wrapper in parsed.wrappers))
    vectorized = spec.vector_entry_point if atari else None  # other vector environments have no wrappers
    kwargs = spec.kwargs | parsed.kwargs
    return replace(spec, kwargs=kwargs, additional_wrappers=wrappers, vector_entry_point=vectorized)


def _wrapper_spec(name: str, kwargs: dict[str, Any]) -> WrapperSpec:
    entry_point = ENTRY_POINTS.get(name, name)
    module, colon, attribute = entry_point.partition(":")
    if not colon:
        raise UserError(f"unknown wrapper {name}: pass {', '.join(WRAPPERS)} or package.module:Class")
    import_named(module, f"the wrapper {name}")
    if not callable(getattr(import_module(module), attribute, None)):
        raise UserError(f"module {module} has no wrapper {attribute}: pass --wrapper package.module:Class")
    return WrapperSpec(name, entry_point, kwargs)


def current_id(id: str) -> tuple[str, str | None]:
    """The id under which Gymnasium has an environment of an older version, and a note; else `id` and None."""
    name, _, version = id.rpartition("-v")
    if name in MUJOCO and version in ("2", "3") and f"{name}-v4" in gym.registry:
        newest = f", and {name}-v5 may differ" if f"{name}-v5" in gym.registry else ""
        return f"{name}-v4", f"{id} is made as {name}-v4, which is equal{newest}"
    if id in SUCCESSORS and id not in gym.registry:
        return SUCCESSORS[id], f"{id} is made as {SUCCESSORS[id]}, its successor in Gymnasium"
    return id, None


def environment_error(id: str, error: Exception) -> UserError:
    """The error for an environment that cannot be made, with a hint if the reason is known."""
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"; try pip install {error.name.split('.')[0]}"
    elif isinstance(error, ImportError):  # Hopper-v3 is registered only to raise that it has moved
        hint = _did_you_mean(id)
    elif isinstance(error, OSError) and id.startswith("ALE/"):
        hint = "; the ROM files are part of pip install ale_py"
    reason = f"{error or type(error).__name__}{hint}"
    return UserError(" ".join(f"environment {id} cannot be made: {reason}".split()))


def _did_you_mean(name: str) -> str:
    """The most similar id; among equally similar ones the highest version."""
    matches = get_close_matches(name, [other for other in gym.registry if other != name], n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def time_limit(spec: EnvSpec) -> dict[str, Any]:
    """Arguments of gym.make that limit the episodes of an environment without a time limit."""
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
    """The imports with which an environment can be made; none for Gymnasium's environments without wrappers."""
    module = _registering_module(id)
    code = f"import {module}  # registers the environment\n" if module else ""
    return code + ("" if _is_plain(id) else "from kd.reinforcement_learning.data.specs import find_spec\n")


def environment_code(id: str) -> str:
    """The argument of gymnasium.make_vec that makes an environment, as code."""
    return f'"{id}"' if _is_plain(id) else f"find_spec({id!r})"


def _is_plain(id: str) -> bool:
    return str(EnvironmentId(parse_id(id).name)) == id


def _registering_module(id: str) -> str:
    return next((module for prefix, module in MODULES.items() if id.startswith(prefix)), "")


def fingerprint(id: str) -> str:
    """Hash of the environment's specification and Gymnasium's version."""
    spec = f"{gym.__version__} {find_spec(id)}"
    return hashlib.sha256(spec.encode()).hexdigest()[:12]


def require_module_on_command_line(id: str, source: str, cure: str = "") -> None:
    """Raises UserError if the file `source` has an environment that names a module, `module:id` or a wrapper
    `module:Class`, and the command line does not name the module, because importing it runs its code. `cure`: what to
    pass, for the message (default: --environment).
    """
    parsed = parse_id(id)
    for module in parsed.modules:
        if not any(re.search(rf"(^|[=+]){re.escape(module)}:", word) for word in sys.argv[1:]):
            plain = EnvironmentId(parsed.name.rpartition(":")[2], parsed.kwargs)
            cure = cure or f"--environment {shlex.quote(id)} if you trust it, or the registered {plain} alone"
            raise UserError(
                f"{source} names the environment {id}, and importing {module} would run its code: pass {cure}"
            )


def import_modules(modules: Sequence[str]) -> None:
    """Imports the modules of --import_module. Raises UserError for one that only a recipe names."""
    for module in modules:
        if module not in sys.argv[1:] and f"--import_module={module}" not in sys.argv[1:]:
            raise UserError(f"importing {module} runs its code: pass --import_module {module} if you trust it")
        import_named(module, "--import_module")
