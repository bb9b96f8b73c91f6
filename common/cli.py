"""Command lines of the form `script.py [recipe.yaml ...] --flag value`, parsed into dataclasses.

A recipe is a flat YAML mapping. Its flags are inserted before those of the command line, so that argparse checks them
too and the command line overrides them. Invalid input ends with one line on stderr and exit code 2. This module does
not import torch or transformers, so that `--help` is quick.
"""

import json
import sys
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from enum import Enum
from functools import cache
from inspect import get_annotations
from pathlib import Path
from textwrap import fill, wrap
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from kd.common.utils.errors import UserError, explained, fail, parsed
from kd.common.utils.errors import run as run  # scripts import parse and run from here
from kd.common.utils.files import write_text
from kd.common.utils.ranges import Range, check_ranges, ranges_of

# Deprecated names under which TrainingArguments repeats the values of activation_checkpointing*.
REPEATED = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
BOOLEANS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)


class Formatter(HelpFormatter):
    """Formats help in 100 columns. Each flag is listed with the type of its value, its choices and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wraps the paragraphs, and breaks long command lines."""
        paragraphs = text.strip().replace("\\\n        ", "").split("\n\n")
        return "\n\n".join(_wrapped(paragraph, width) for paragraph in paragraphs)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[-1]} {self._format_args(action, '')}".rstrip()

    def _format_args(self, action: Action, default_metavar: str) -> str:
        if action.nargs in (0, "?"):  # --flag is short for --flag true
            return ""
        if not action.option_strings:
            return str(action.metavar or action.dest)
        kind = "bool" if action.type is _boolean else getattr(action.type, "__name__", "str").lower()
        word = str(action.metavar or ("" if action.choices else kind))
        return f"[{word or 'str'} ...]" if action.nargs in ("*", "+") else word

    def _get_help_string(self, action: Action) -> str:
        text, default, notes = action.help or "", action.default, list[str]()
        if action.choices:
            notes.append("|".join(map(str, action.choices)))
        if default is not None and default is not False and default not in (SUPPRESS, "", []):
            words = default if isinstance(default, list | tuple) else [default]
            shown = [f"{word:g}" if isinstance(word, float) else str(getattr(word, "value", word)) for word in words]
            notes.append(f"default: {' '.join(shown)}")
        return f"{text} ({'; '.join(notes)})" if notes and "(default" not in text else text


def _wrapped(paragraph: str, width: int) -> str:
    if not paragraph.startswith(" "):
        return fill(paragraph, width)
    options: dict[str, Any] = {"subsequent_indent": " " * 8, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(" \\\n".join(wrap(command, width - 2, **options)) for command in paragraph.splitlines())


class Parser(ArgumentParser):
    """An ArgumentParser for the fields of dataclasses, with one-line errors and without abbreviated flags.

    A flag has the name of its field, with hyphens or underscores. The parser checks the ranges that the dataclasses
    declare and those of `add_argument(..., within=...)`.
    """

    def __init__(self, dataclass_types: Iterable[type] = (), **kwargs: Any) -> None:
        self.ranges: dict[str, Range] = {}
        self.dataclass_types = list(dataclass_types)
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=Formatter, **kwargs)
        for kind in self.dataclass_types:
            self._add_fields(kind)
            self.ranges |= ranges_of(kind)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        if any(hasattr(kind, "complete") for kind in self.dataclass_types):
            text = "Also show the other flags of transformers.TrainingArguments."
            self.add_argument("--help_all", "--help-all", action="help", help=text)

    def _add_fields(self, kind: type) -> None:
        """Adds the fields of a dataclass, in a group for each class that is the first to declare some of them."""
        hints, groups = get_type_hints(kind), dict[type, list[Field[Any]]]()
        for field in fields(kind):
            if field.init:
                groups.setdefault(_owner(kind, field.name), []).append(field)
        for owner in sorted(groups, key=kind.__mro__.index):
            group = self._group(_title(owner))
            for field in groups[owner]:
                options = _options(hints[field.name], field) | {"help": _help(kind, field.name)}
                group.add_argument(f"--{field.name}", **options)
                if options.get("const") and field.default is True:
                    help = f"Turn --{field.name} off."
                    group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=help)

    def _group(self, title: str) -> Any:
        known = {group.title: group for group in self._action_groups}
        return known.get(title) or self.add_argument_group(title)

    def add_argument(self, *names: Any, within: Range | None = None, **kwargs: Any) -> Action:
        action = super().add_argument(*names, **kwargs)
        if within is not None:
            self.ranges[action.dest] = within
        return action

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = self._split_lists([self._spelled(word) for word in (sys.argv[1:] if args is None else args)])
        self._check_not_empty(words)
        found, others = super().parse_known_args(words, namespace)
        try:
            check_ranges(vars(found), self.ranges)
        except ValueError as error:
            self.error(str(error))
        return found, others

    @staticmethod
    def _spelled(word: str) -> str:
        """Replaces the hyphens in the name of a flag: `--some-flag=a-b` becomes `--some_flag=a-b`."""
        flag, equals, value = word.partition("=")
        return flag[:2] + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word

    def _split_lists(self, words: list[str]) -> list[str]:
        """Splits lists of numbers at commas: `--seeds 0,1,2` becomes `--seeds 0 1 2`."""
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
        """Reports an error for an empty word, such as an unset shell variable, unless the default is empty, and for a
        null character.
        """
        flag = "an argument"
        for word in words:
            value = word
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                if not equals:
                    continue
            action = self.flag(flag.removeprefix("--"))
            if not value.strip() and not (action is not None and action.default == ""):
                self.error(f"{flag} is empty: pass a value, or leave it out")
            if "\0" in value:
                self.error(f"{flag} contains a null character: remove it")

    def error(self, message: str) -> NoReturn:
        fail(message)

    def flag(self, key: str) -> Action | None:
        """The action of `--key`; hyphens and underscores are the same."""
        return self._option_string_actions.get("--" + key.replace("-", "_"))

    def flags_in(self, words: Iterable[str]) -> frozenset[str]:
        """The names of the arguments that the words of a command line set."""
        actions = [self.flag(word.split("=")[0].removeprefix("--")) for word in words if word.startswith("--")]
        return frozenset(action.dest for action in actions if action is not None)

    def nearest(self, word: str) -> str:
        """The suggestion `; did you mean ...?` for a misspelt key or --flag; empty if no name is similar.

        A dataclass may explain flags of other scripts: `elsewhere` = {name: explanation}.
        """
        for kind in self.dataclass_types:
            if explanation := getattr(kind, "elsewhere", {}).get(word.removeprefix("--").replace("-", "_")):
                return f": {explanation}"
        start = 0 if word.startswith("--") else 2
        names = [name[start:] for name in self._option_string_actions if name.startswith("--")]
        matches = get_close_matches(word.replace("-", "_") if start else word, names, n=1)
        return f"; did you mean {matches[0]}?" if matches else ""


def show_help(*dataclass_types: type, argv: list[str] | None = None, parser: Parser | None = None) -> None:
    """Prints the help of a script and exits, if the words (default: sys.argv) contain a help flag. Scripts call it
    before imports that take seconds.

    `--help` shows the fields of the dataclasses that have a help text, `--help-all` also the other fields of their
    methods `complete`. A script without dataclasses passes its `parser`.
    """
    words = set(sys.argv[1:] if argv is None else argv)
    show_all = words & {"--help_all", "--help-all"}
    if not show_all and not words & {"-h", "--help"}:
        return
    if parser is None:
        kinds = [_complete(kind) if show_all else kind for kind in dataclass_types]
        usage = f"{Path(sys.argv[0]).name} [recipe.yaml ...] [--flag value ...]"
        parser = Parser(kinds, usage=usage, description=sys.modules["__main__"].__doc__)
    parser.print_help()
    sys.exit(0)


def parse(*dataclass_types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """One instance per dataclass type from `[recipe.yaml ...] --flag value` (default: sys.argv).

    A type may have a method `check_unused_flags`, which calls `reject_unused` for flags that have no effect next to
    others.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_help(*dataclass_types, argv=words)
    kinds = [_complete(kind) for kind in dataclass_types]
    parser = Parser(kinds)
    try:
        recipe_words: list[str] = []
        while words and words[0].endswith((".yaml", ".yml")):
            recipe_words += _recipe_flags(Path(words.pop(0)), parser)
        explicit = parser.flags_in(words)
        words = recipe_words + words
        _check_known(words, parser)
        values = vars(parser.parse_args(words))
        instances = tuple(
            kind(**{field.name: values[field.name] for field in fields(kind) if field.init}) for kind in kinds
        )
    except json.JSONDecodeError as error:
        fail(f"{error.doc} is not valid JSON: {error.msg}")
    except (UserError, ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(explained(error) or str(error))  # a __post_init__ raises the types after ValueError
    parsed[:] = instances
    for instance in instances:
        instance.explicit_flags = explicit
        if hasattr(instance, "check_unused_flags"):
            instance.check_unused_flags()
    return instances


def reject_unused(reason: str, arguments: Any, *names: str) -> None:
    """Raises UserError if the command line sets one of the flags `names`, which have no effect because of `reason`.
    Recipes may set them, because one recipe serves several command lines.
    """
    for name in names:
        if name in vars(arguments).get("explicit_flags", ()):
            raise UserError(f"--{name} has no effect, because {reason}: leave it out")


def save_recipe(path: str | Path, *instances: Any) -> None:
    """Writes all arguments to a recipe. Parsing it with the same dataclasses gives the same arguments.

    None, objects that no flag can set, and secrets (`*_token`) are left out.
    """
    write_text(path, yaml.safe_dump(recipe_of(*instances), sort_keys=False, allow_unicode=True))


def recipe_of(*instances: Any) -> dict[str, Any]:
    """The content of a recipe that `save_recipe` writes, as plain YAML values."""
    parser = Parser(type(instance) for instance in instances)
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
    """Whether the flag accepts `value` as written in a recipe."""
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


# ---- dataclass fields as flags ----


def _complete(kind: type) -> type:
    return kind.complete() if hasattr(kind, "complete") else kind


def _owner(kind: type, name: str) -> type:
    """The class that is the first to declare a field of `kind`, if possible one of this project."""
    declaring = [base for base in kind.__mro__ if name in _annotations(base)]
    ours = [base for base in declaring if not base.__module__.startswith("transformers.")]
    return (ours or declaring)[-1]


@cache
def _annotations(kind: type) -> dict[str, Any]:
    return get_annotations(kind)


def _title(kind: type) -> str:
    """The first sentence of a class's docstring."""
    if kind.__module__.startswith("transformers."):
        return f"Other flags of transformers.{kind.__name__}"
    return (kind.__doc__ or kind.__name__).split(".")[0].strip()


def _help(kind: type, name: str) -> str:
    """The help text of a field, which a class inherits where it only changes the default. A field without one is
    hidden in types with a method `complete`.
    """
    for base in kind.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata:
            return str(field.metadata["help"]).replace("%", "%%")
    return SUPPRESS if hasattr(kind, "complete") else ""


def _options(hint: Any, field: Field[Any]) -> dict[str, Any]:
    """The arguments of `add_argument` for a field with this type."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    options = {name: value for name, value in field.metadata.items() if name != "help"}
    options |= {"required": True} if default is MISSING else {"default": default}
    kind = _plain_type(hint)
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        choices = list(get_args(kind)) or [choice.value for choice in kind]
        by_name = {str(choice): choice for choice in choices}
        return {"choices": choices, "type": lambda word: by_name.get(word, word)} | options
    if kind is bool:
        # --flag is short for --flag true, unless None is a third value.
        return {"type": _boolean} | ({} if default is None else {"nargs": "?", "const": True}) | options
    if get_origin(kind) is list:  # it may be empty
        if isinstance(default, str):  # TrainingArguments accept a single word in place of a list
            options["default"] = [default] if default else None
        return {"type": _plain_type(get_args(kind)[0]), "nargs": "*"} | options
    return {"type": kind} | options


def _plain_type(hint: Any) -> Any:
    """The type of a flag's value. Of a union, it is the first of bool, enumeration, list and str that it contains,
    otherwise its first type.
    """
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    enumerations = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    lists = [kind for kind in kinds if get_origin(kind) is list]
    return next((kind for kind in (bool, *enumerations, *lists, str) if kind in kinds), kinds[0])


def _boolean(word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise ArgumentTypeError(f"{word} is neither true nor false")
    return BOOLEANS[word.lower()]


# ---- reading recipes ----


class _WordLoader(yaml.SafeLoader):
    """Loads each scalar as the string in the file (`no`, `1e-3`), because it becomes the value of a flag; null becomes
    None. Duplicate keys, and tags that would convert a value, are errors.
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
