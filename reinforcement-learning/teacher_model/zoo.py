"""The settings with which rl_zoo3 trained an agent: `config.yml` and `args.yml` in the folder of its environment.

Nothing in them is run: what a YAML tag would turn into a Python object is read as the plain value that it tags.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kd.common.utils.errors import UserError

CONFIG, ARGS = "config.yml", "args.yml"
ATARI_WRAPPER = "AtariWrapper"  # what an Atari environment has here too


class _PlainLoader(yaml.SafeLoader):
    """Reads what a tag would make a Python object of as the plain value that is written there."""


def _plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("", _plain)


def read_settings(path: Path) -> dict[Any, Any]:
    """The settings in a config.yml or args.yml. Raises UserError where it cannot be read."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        if isinstance(settings, list):  # the arguments of an OrderedDict, of which the first is its pairs
            settings = dict(settings[0])
        if isinstance(settings, dict):
            return settings
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, and with which settings the agent was trained is not known: remove it")


def normalizes_observations(config: Path) -> bool:
    """Whether the settings in a config.yml normalize observations: `true`, or arguments of VecNormalize."""
    normalize = read_settings(config).get("normalize", False)
    return bool(normalize) and not re.search(r"norm_obs\W+False", str(normalize))


def refuse_wrappers(policy: Path, places: Iterable[Path], atari: bool) -> None:
    """Raises UserError where the agent saw its environment through a wrapper that is not applied here."""
    for config in _files(places, CONFIG):
        settings = read_settings(config)
        named = re.findall(r"[A-Za-z_][\w.]*\.\w+", f"{settings.get('env_wrapper')} {settings.get('vec_env_wrapper')}")
        wrappers = [name for name in named if not (atari and name.endswith(ATARI_WRAPPER))]
        if settings.get("frame_stack") and not atari:
            wrappers.append(f"VecFrameStack of {settings['frame_stack']}")
        if wrappers:
            raise UserError(
                f"{policy} was trained behind {', '.join(wrappers)}, as {config} says, and wrappers of environments "
                "are not supported: give a teacher that was trained without"
            )


def other_training(policy: Path, places: Iterable[Path], environment: str) -> list[str]:
    """Warnings where args.yml names another environment, or arguments of it, than the agent is used with here."""
    warnings = []
    for args in _files(places, ARGS):
        settings = read_settings(args)
        trained, keywords = settings.get("env"), settings.get("env_kwargs")
        if trained and str(trained).rpartition(":")[2] != environment.rpartition(":")[2]:
            warnings.append(f"{policy} was trained on {trained} ({args}), and its returns on {environment} may differ")
        if keywords:
            warnings.append(
                f"{policy} was trained with the arguments {keywords} of its environment ({args}), which are not given "
                "to it here: its returns may differ"
            )
    return warnings


def _files(places: Iterable[Path], name: str) -> list[Path]:
    return [place / name for place in dict.fromkeys(places) if (place / name).is_file()]
