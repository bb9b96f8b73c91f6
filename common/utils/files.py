"""Files that are whole or absent: written under a temporary name next to the target, then renamed."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from kd.common.utils.errors import UserError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new, never a part. Makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    """Writes JSON atomically. NaN and infinity are no JSON: ValueError, and the file stays as it was."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_writable(path: str | Path, flag: str) -> None:
    """Raises UserError where a file or folder cannot be made at a path, the value of a flag, for want of a folder that
    may be written to. Missing folders do not count: they can be made.
    """
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {there} is no folder that may be written to")


def read_json(path: str | Path) -> Any:
    """Reads JSON; a file that is missing or corrupt is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON: {error}") from None


class WordLoader(yaml.SafeLoader):
    """Keeps every scalar as the word in the file (`no`, `1e-3`), since it becomes a flag's value; null is null.
    Refuses duplicate keys, and tags, which would convert a word.
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
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, str | list[str] | None]:
    """A YAML file of `key: word`, `key: [words]` and `key: null`. Raises UserError, one line, for anything else."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), WordLoader)
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"recipe {path} must be a mapping of `flag: value` lines, not a {type(found).__name__}")
    for key, value in found.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} is a mapping, but a recipe is flat; write it as a JSON string")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{path}: {key} is a list of something else than words and numbers")
    return found
