"""Command lines of the form `script.py [recipe.yaml ...] --flag value`, parsed into dataclasses.

A recipe is a flat YAML mapping: a list of flags put before those of the command line, so that argparse checks it too
and the command line has the last word. Whatever is wrong with the input ends as one line on stderr and exit code 2.
"""

import json
import sys
from argparse import Action, ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from common.utils.devices import end_processes
from common.utils.errors import UserError
from common.utils.files import write_text

# Deprecated names under which TrainingArguments repeats the values of activation_checkpointing*.
REPEATED = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


def fail(message: str) -> NoReturn:
    """Ends the program the way bad input does: one line on stderr, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class Parser(HfArgumentParser):
    """A parser that complains in one line, without 600 lines of usage, and takes no abbreviated flags."""

    def __init__(self, dataclass_types: Any = (), **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        for action in self._actions:
            # Lists may be empty; and report_to takes several names, which HfArgumentParser does not see.
            if action.nargs == "+" or action.dest == "report_to":
                action.nargs = "*"

    def error(self, message: str) -> NoReturn:
        fail(message)

    def flag(self, key: str) -> Action | None:
        """The action of `--key`; hyphens and underscores are the same."""
        return self._option_string_actions.get("--" + key.replace("-", "_"))

    def nearest(self, word: str) -> str:
        """`; did you mean ...?` for a misspelt key or --flag, or nothing."""
        start = 0 if word.startswith("--") else 2
        names = [name[start:] for name in self._option_string_actions if name.startswith("--")]
        matches = get_close_matches(word.replace("-", "_") if start else word, names, n=1)
        return f"; did you mean {matches[0]}?" if matches else ""


class RecipeLoader(yaml.SafeLoader):
    """Leaves every scalar the word that was written (`no`, `1e-3`), since it becomes a flag's value; null is null."""

    yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse(*dataclass_types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """One instance per dataclass type from `[recipe.yaml ...] --flag value` (default: the program's own arguments)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclass_types)
    try:
        recipe_words: list[str] = []
        while words and words[0].endswith((".yaml", ".yml")):
            recipe_words += _recipe_flags(Path(words.pop(0)), parser)
        words = recipe_words + words
        _refuse_unknown(words, parser)
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except json.JSONDecodeError as error:
        fail(f"{error.doc} is not valid JSON: {error.msg}")
    except (UserError, ValueError, TypeError, OSError, ImportError) as error:  # the last four: a __post_init__
        fail(str(error))


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a UserError or a path that cannot be written is one line and exit code 2, Ctrl-C one line
    and 130.
    """
    try:
        main()
        end_processes()
    except UserError as error:
        fail(str(error))
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume_from_checkpoint continues the run", file=sys.stderr)
        sys.exit(130)


def save_recipe(path: str | Path, *instances: Any) -> None:
    """Writes all arguments as used as a recipe: parsing it with the same dataclasses gives the same arguments.

    Left out: None, what no flag can set (objects given in code), and secrets (`*_token`).
    """
    write_text(path, yaml.safe_dump(recipe_of(*instances), sort_keys=False, allow_unicode=True))


def recipe_of(*instances: Any) -> dict[str, Any]:
    """What `save_recipe` writes, as plain YAML values."""
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
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} is a mapping, but a recipe is flat; write it as a JSON string")
        name = action.option_strings[0]
        if isinstance(value, list):
            flags += [name, *map(str, value)]
        elif value == "true" and action.nargs == "?":
            flags.append(name)
        elif value is not None:
            flags.append(f"{name}={value}")
    return flags


def _read_recipe(path: Path) -> dict[Any, Any]:
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a mapping of `flag: value` lines, not a {type(recipe).__name__}")
    return recipe


def _refuse_unknown(words: list[str], parser: Parser) -> None:
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
        return True  # TrainingArguments' own word for it, which its flag does not know
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
