"""Command lines of the form `script.py [recipe.yaml ...] --flag value`, parsed into dataclasses.

A recipe is a flat YAML mapping: a list of flags put before those of the command line, so that argparse checks it too
and the command line overrides it. Bad input ends as one line on stderr and exit code 2.
"""

import json
import sys
from argparse import Action, ArgumentTypeError, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from kd.common.utils.errors import UserError, explained, fail, parsed
from kd.common.utils.errors import run as run  # scripts import parse and run from here
from kd.common.utils.files import write_text
from kd.common.utils.ranges import Range, check_ranges, ranges_of

# Deprecated names under which TrainingArguments repeats the values of activation_checkpointing*.
REPEATED = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


class Parser(HfArgumentParser):
    """A parser with errors of one line, without 600 lines of usage, and without abbreviated flags.

    It checks the ranges that the dataclasses declare and those of `add_argument(..., within=...)`.
    """

    def __init__(self, dataclass_types: Any = (), **kwargs: Any) -> None:
        self.ranges: dict[str, Range] = {}
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        for dataclass_type in self.dataclass_types:
            self.ranges |= ranges_of(dataclass_type)
        for action in self._actions:
            # Lists may be empty; and report_to takes several names, which HfArgumentParser does not detect.
            if action.nargs == "+" or action.dest == "report_to":
                action.nargs = "*"

    def add_argument(self, *names: Any, within: Range | None = None, **kwargs: Any) -> Action:
        action = super().add_argument(*names, **kwargs)
        if within is not None:
            self.ranges[action.dest] = within
        return action

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = self._split_lists(list(sys.argv[1:] if args is None else args))
        self._check_not_empty(words)
        found, others = super().parse_known_args(words, namespace)
        try:
            check_ranges(vars(found), self.ranges)
        except ValueError as error:
            self.error(str(error))
        return found, others

    def _split_lists(self, words: list[str]) -> list[str]:
        """A list of numbers may also be written with commas: `--seeds 0,1,2` is `--seeds 0 1 2`."""
        found: list[str] = []
        action = None
        for word in words:
            flag, equals, value = word.partition("=")
            if word.startswith("--"):
                action = self.flag(flag.removeprefix("--"))
            if action is None or action.nargs != "*" or action.type in (None, str) or "," not in word:
                found.append(word)
            elif not word.startswith("--"):
                found += word.split(",")
            elif equals:
                found += [flag, *value.split(",")]
        return found

    def _check_not_empty(self, words: list[str]) -> None:
        """Refuses empty words, such as an unset shell variable, unless the default is empty, and null characters."""
        flag = "an argument"
        for word in words:
            value = word
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                if not equals:
                    continue
            action = self.flag(flag.removeprefix("--"))
            if not value.strip() and not (action is not None and action.default == ""):
                self.error(f"{flag} is empty: give it a value, or leave it out")
            if "\0" in value:
                self.error(f"{flag} holds a null character")

    def error(self, message: str) -> NoReturn:
        fail(message)

    def flag(self, key: str) -> Action | None:
        """The action of `--key`; hyphens and underscores are the same."""
        return self._option_string_actions.get("--" + key.replace("-", "_"))

    def flags_in(self, words: Iterable[str]) -> frozenset[str]:
        """The arguments that words of a command line set."""
        actions = [self._option_string_actions.get(word.split("=")[0]) for word in words if word.startswith("--")]
        return frozenset(action.dest for action in actions if action is not None)

    def nearest(self, word: str) -> str:
        """`; did you mean ...?` for a misspelt key or --flag, or nothing."""
        start = 0 if word.startswith("--") else 2
        names = [name[start:] for name in self._option_string_actions if name.startswith("--")]
        matches = get_close_matches(word.replace("-", "_") if start else word, names, n=1)
        return f"; did you mean {matches[0]}?" if matches else ""


def parse(*dataclass_types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """One instance per dataclass type from `[recipe.yaml ...] --flag value` (default: sys.argv).

    A type may have a method `check_unused_flags`, which calls `reject_unused` for flags that have no effect next to
    others.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclass_types)
    try:
        recipe_words: list[str] = []
        while words and words[0].endswith((".yaml", ".yml")):
            recipe_words += _recipe_flags(Path(words.pop(0)), parser)
        explicit = parser.flags_in(words)
        words = recipe_words + words
        _check_known(words, parser)
        instances = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except json.JSONDecodeError as error:
        fail(f"{error.doc} is not valid JSON: {error.msg}")
    except (UserError, ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(explained(error) or str(error))  # all but the first two: a __post_init__
    parsed[:] = instances
    for instance in instances:
        instance.explicit_flags = explicit
        if hasattr(instance, "check_unused_flags"):
            instance.check_unused_flags()
    return instances


def reject_unused(reason: str, arguments: Any, *names: str) -> None:
    """Raises UserError where the command line has one of these flags, which have no effect for that reason. A recipe
    may have it, because one recipe serves several command lines.
    """
    for name in names:
        if name in vars(arguments).get("explicit_flags", ()):
            raise UserError(f"--{name} has no effect, because {reason}: leave it out")


def save_recipe(path: str | Path, *instances: Any) -> None:
    """Writes all arguments as used as a recipe: parsing it with the same dataclasses gives the same arguments.

    Left out: None, what no flag can set (objects), and secrets (`*_token`).
    """
    write_text(path, yaml.safe_dump(recipe_of(*instances), sort_keys=False, allow_unicode=True))


def recipe_of(*instances: Any) -> dict[str, Any]:
    """The content of a recipe that `save_recipe` writes, as plain YAML values."""
    parser = Parser([type(instance) for instance in instances])
    recipe = {}
    for instance in instances:
        for name in (field.name for field in fields(instance) if field.init and not _unsaved(field.name)):
            value = _flag_value(name, getattr(instance, name))
            if value is not None and _settable(parser.flag(name), value):
                recipe[name] = value
    return recipe


def _recipe_flags(path: Path, parser: Parser) -> list[str]:
    flags: list[str] = []
    for key, value in _read_recipe(path).items():
        action = parser.flag(str(key))
        if action is None:
            raise UserError(f"{path}: unknown key {key}{parser.nearest(str(key))}")
        name = action.option_strings[0]
        if isinstance(value, list):
            flags += [name, *value]
        elif value == "true" and action.nargs == "?":
            flags.append(name)
        elif value is not None:
            flags.append(f"{name}={value}")
    return flags


def _check_known(words: list[str], parser: Parser) -> None:
    _, unknown = parser.parse_known_args(words)
    if not unknown:
        return
    word = unknown[0].split("=")[0]
    if word.startswith("--"):
        raise UserError(f"unknown flag {word}{parser.nearest(word)}")
    raise UserError(f"unexpected argument {word!r}; recipes come first, then --flag value")


def _flag_value(name: str, value: Any) -> Any:
    """The plain YAML value that a flag turns into `value`; None if there is none."""
    if name == "include_num_input_tokens_seen" and value == "all":
        return True  # a value of TrainingArguments that its flag does not accept
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_flag_value(name, item) for item in value]
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str | bool | int | float) else None


def _settable(action: Action | None, value: Any) -> bool:
    """Whether the flag reads `value` back."""
    if action is None or (isinstance(value, list) and action.nargs is None):
        return False
    convert = action.type if callable(action.type) else str
    try:
        converted = [convert(str(item)) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, ArgumentTypeError):
        return False
    return action.choices is None or all(item in action.choices for item in converted)


def _unsaved(name: str) -> bool:
    return name in REPEATED or name.endswith("_token")


# ---- reading recipes ----


class _WordLoader(yaml.SafeLoader):
    """Keeps each scalar as the word in the file (`no`, `1e-3`), because it becomes a flag's value; null is None.
    Duplicate keys and tags, which would convert a word, are errors.
    """

    yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_recipe(path: Path) -> dict[str, str | list[str] | None]:
    """A YAML file of `key: word`, `key: [words]` and `key: null`. Raises UserError, one line, for anything else."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _WordLoader)
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"recipe {path} must be a mapping of `flag: value` lines, not a {type(found).__name__}")
    for key, value in found.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} is a mapping, but a recipe is flat; write it as a JSON string")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{path}: {key} is a list with items other than words and numbers")
    return found
