"""How an agent of rl-baselines3-zoo was trained: the environment, its arguments and its wrappers.

Nothing in the files is executed: tagged YAML values in config.yml and args.yml are read as plain values, and wrappers
are chosen by their names from those of this project and of Gymnasium.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import yaml

from kd.common.reporting.results import RESULTS
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data.environment_ids import EnvironmentId, Part, parse_id, parse_wrappers
from kd.reinforcement_learning.data.specs import current_id

CONFIG, ARGS = "config.yml", "args.yml"
ID = re.compile(r"(?:(?:ppo|ppo_lstm|a2c|dqn|sac|td3|ddpg|trpo|tqc|qrdqn|ars)-)?([A-Za-z][\w-]*-v\d+)(?:_\d+)?")
# Wrappers of sb3-contrib, of rl-baselines3-zoo and of Stable-Baselines3: name here, and the names of their arguments.
WRAPPERS = {
    "TimeFeatureWrapper": ("time_feature", {"max_steps": "max_steps", "test_mode": "test_mode"}),
    "VecFrameStack": ("frame_stack", {"n_stack": "n"}),
}
# Environments that rl-baselines3-zoo registers without velocities, such as CartPoleNoVel-v1: the indices that are 0.
WITHOUT_VELOCITIES = {"CartPole": [1, 3], "MountainCar": [1], "MountainCarContinuous": [1], "Pendulum": [2]}
WITHOUT_VELOCITIES |= {"LunarLander": [2, 3, 5], "LunarLanderContinuous": [2, 3, 5]}
ATARI = ("AtariWrapper", "VecFrameStack")  # the Atari environments of this project preprocess in the same way


@dataclass(frozen=True)
class Training:
    """The environment of a training, with its arguments and wrappers. `unknown`: wrappers that this project does not
    have. `normalized`: the file that requires statistics of observations. `source`: where it was read.
    """

    environment: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[Part, ...] = ()
    unknown: tuple[str, ...] = ()
    normalized: Path | None = None
    source: str = ""


UNTRAINED = Training()


def read_training(policy: Path, folders: Iterable[Path], atari: bool = False) -> Training:
    """Reads the settings of an agent in `folders` or, without settings, the environment from the results of the run
    that trained it or from its name. For an `atari` game, the usual preprocessing is no wrapper. Raises UserError for
    damaged settings.
    """
    configs, args = ([folder / name for folder in folders if (folder / name).is_file()] for name in (CONFIG, ARGS))
    environment, kwargs, source = _named_environment(policy)
    for path in args[:1]:
        settings = read_settings(path)
        if settings.get("env"):
            environment, source = str(settings["env"]), str(path)
        found = settings.get("env_kwargs")
        kwargs = found if isinstance(found, dict) else {}
    wrappers, unknown, normalized = list[Part](), list[str](), None
    for path in configs[:1]:
        settings = read_settings(path)
        wrappers, unknown = _wrappers(settings, atari or bool(re.search(r"NoFrameskip|^ALE", str(environment))))
        normalized = path if _normalizes_observations(settings) else None
    hidden = re.fullmatch(r"(\w+)NoVel(-v\d+)", str(environment))
    if hidden and hidden[1] in WITHOUT_VELOCITIES:
        environment = hidden[1] + hidden[2]
        wrappers.insert(0, ("mask", {"indices": WITHOUT_VELOCITIES[hidden[1]]}))
    return Training(environment, kwargs, tuple(wrappers), tuple(unknown), normalized, source)


def _named_environment(policy: Path) -> tuple[str | None, dict[str, Any], str]:
    for folder in policy.parents[:4]:
        if (folder / RESULTS).is_file():
            results = read_json(folder / RESULTS)
            if isinstance(results, dict) and results.get("domain") == "reinforcement-learning":
                teacher_environment = (
                    results.get("teacher_environment") if "stages/teacher" in policy.as_posix() else None
                )
                return str(teacher_environment or results.get("task")), {}, str(folder / RESULTS)
    for name in (policy.stem, policy.parent.name):
        if found := ID.fullmatch(name):
            return re.sub(r"^ALE-", "ALE/", found[1]), {}, f"the name {name}"
    return None, {}, ""


def matching_environment(
    training: Training, chosen: str | None, kwargs: dict[str, Any] | None, wrappers: list[str] | None
) -> tuple[str | None, list[str]]:
    """The id of the environment of an agent, with arguments and wrappers, and notes about what was inferred.

    The flags --environment (`chosen`), --env_kwargs and --wrapper have precedence over the settings of the training.
    """
    base, notes = chosen or training.environment, list[str]()
    if base is None:
        return None, notes
    if chosen is None:
        notes.append(f"environment {base}, from {training.source}")
    parsed = parse_id(base)
    name = parsed.name
    if training is not UNTRAINED:  # an agent of an older version acts in its successor; new ones are trained as named
        name, note = current_id(parsed.name)
        notes += [note] if note else []
    arguments, applied = parsed.kwargs or training.kwargs, parsed.wrappers or training.wrappers
    if name.startswith("ALE/"):
        applied = parsed.wrappers
    if kwargs is not None:
        arguments = kwargs
    if wrappers:
        applied = parse_wrappers("--wrapper", wrappers)
    id = str(EnvironmentId(name, arguments, applied))
    if id != name and chosen != id:
        notes.append(f"the environment is {id}, with the arguments and wrappers of the flags or of the training")
    return id, notes


def check_wrappers(policy: Path, training: Training, environment: str) -> None:
    """Raises UserError if an agent was trained in wrappers that the environment does not have."""
    id = parse_id(environment)
    if id.wrappers:
        return
    if training.unknown:
        raise UserError(
            f"{policy} was trained in {', '.join(training.unknown)}, which is not applied automatically: pass all "
            "wrappers of its training, such as --wrapper package.module:Class"
        )
    if training.wrappers:
        wrapped = str(EnvironmentId(id.name, id.kwargs, training.wrappers))
        raise UserError(
            f"{policy} was trained in {', '.join(name for name, _ in training.wrappers)}: pass --environment "
            f"{shlex.quote(wrapped)}"
        )


def training_warnings(policy: Path, training: Training, environment: str) -> list[str]:
    """Warns if an agent was trained in another environment, or with other arguments or wrappers."""
    id, trained = parse_id(environment), training.environment
    warnings = []
    if trained and current_id(parse_id(trained).name.rpartition(":")[2])[0] != id.name.rpartition(":")[2]:
        warnings.append(
            f"{policy} was trained on {trained} ({training.source}), and its returns on {id.name} may differ"
        )
    if training.kwargs != id.kwargs and training.kwargs:
        warnings.append(
            f"{policy} was trained with the arguments {training.kwargs} of its environment ({training.source}), and "
            f"the environment has {id.kwargs or 'none'}: its returns may differ"
        )
    if training.wrappers and id.wrappers and training.wrappers != id.wrappers:
        warnings.append(
            f"{policy} was trained in {', '.join(name for name, _ in training.wrappers)}, and the environment is "
            f"{environment}: its returns may differ"
        )
    return warnings


# ---- settings ----


class _PlainLoader(yaml.SafeLoader):
    """Reads a tagged value as the plain value."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("", _plain)


def read_settings(path: Path) -> dict[Any, Any]:
    """The settings in config.yml or args.yml. Raises UserError for a damaged file."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        if isinstance(settings, list):  # the arguments of an OrderedDict; the first is a list of keys and values
            settings = dict(settings[0])
        if isinstance(settings, dict):
            return settings
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, so the settings of the agent's training are unknown: remove it")


def _normalizes_observations(settings: dict[Any, Any]) -> bool:
    """Whether `normalize`, `true` or arguments of VecNormalize, includes observations."""
    normalize = settings.get("normalize", False)
    return bool(normalize) and not re.search(r"norm_obs\W+False", str(normalize))


def _wrappers(settings: dict[Any, Any], atari: bool) -> tuple[list[Part], list[str]]:
    """The wrappers of a config.yml: those that this project has, and the names of the others."""
    named = [*_named(settings.get("env_wrapper")), *_named(settings.get("vec_env_wrapper"))]
    if settings.get("frame_stack"):
        named.append(("VecFrameStack", {"n_stack": settings["frame_stack"]}))
    wrappers, unknown = list[Part](), list[str]()
    for path, kwargs in named:
        name = path.rpartition(".")[2]
        if atari and name in ATARI:
            continue
        known, arguments = WRAPPERS.get(name, ("", {}))
        if known and kwargs.keys() <= arguments.keys():
            wrappers.append((known, {arguments[key]: value for key, value in kwargs.items()}))
        elif re.match(r"(gym|gymnasium)\.wrappers\.", path) and hasattr(gymnasium.wrappers, name):
            wrappers.append((f"gymnasium.wrappers:{name}", kwargs))
        else:
            unknown.append(path)
    return wrappers, unknown


def _named(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Wrappers and their arguments, of a name, a dict {name: arguments}, or a list of both."""
    if isinstance(value, str):
        return [(value, {})] if "." in value else []
    if isinstance(value, dict):
        return [(str(name), kwargs if isinstance(kwargs, dict) else {}) for name, kwargs in value.items()]
    return [one for item in value for one in _named(item)] if isinstance(value, list) else []
