"""Flat YAML mappings, in which every scalar stays the word that was written."""

from pathlib import Path
from typing import Any

import yaml

from kd.common.utils.errors import UserError


class WordLoader(yaml.SafeLoader):
    """Leaves every scalar the word that was written (`no`, `1e-3`), since it becomes a flag's value; null is null.
    Refuses a key that stands twice, and tags, which would make something else of a word.
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


def read_words(path: Path) -> dict[str, str | list[str] | None]:
    """A file of `key: word`, `key: [words]` and `key: null`. Raises UserError, one line, for anything else."""
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
