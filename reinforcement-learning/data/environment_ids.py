"""Ids of environments: an id of Gymnasium, optionally with arguments of the environment and with wrappers.

    Hopper-v4
    my_package:Mine-v0                       my_package is imported first
    Pendulum-v1{"g": 5.0}                    arguments of the environment, as JSON
    Walker2d-v4+time_feature                 wrappers, in the order in which they are applied
    CartPole-v1+frame_stack{"n": 4}+my_package:Wrapper

This module imports neither torch nor Gymnasium, so that `--help` is fast.
"""

import json
import re
from typing import Any, NamedTuple

Part = tuple[str, dict[str, Any]]  # name and arguments


class EnvironmentId(NamedTuple):
    """`name`: the id of Gymnasium, with `module:` if it has one. `wrappers`: names and arguments."""

    name: str
    kwargs: dict[str, Any] = {}
    wrappers: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return "+".join(map(_written, ((self.name, self.kwargs), *self.wrappers)))

    @property
    def modules(self) -> list[str]:
        """Modules, except Gymnasium's, that are imported because the id names them."""
        names = (self.name, *(name for name, _ in self.wrappers))
        return [name.partition(":")[0] for name in names if ":" in name and not name.startswith("gymnasium.wrappers:")]


def parse_id(id: str) -> EnvironmentId:
    """Reads an id. A text of another form is the name of an environment, which is then unknown."""
    parts, place = list[Part](), 0
    while name := re.compile(r"[\w.:/-]+").match(id, place):
        kwargs: dict[str, Any] = {}
        place = name.end()
        if id[place : place + 1] == "{":
            try:
                kwargs, place = json.JSONDecoder().raw_decode(id, place)
            except json.JSONDecodeError:
                break
        parts.append((name[0], kwargs))
        if place == len(id):
            return EnvironmentId(*parts[0], tuple(parts[1:]))
        if id[place] != "+":
            break
        place += 1
    return EnvironmentId(id)


def base_id(id: str) -> str:
    """The id of Gymnasium in an id, without module, arguments and wrappers."""
    return parse_id(id).name.rpartition(":")[2]


def _written(part: Part) -> str:
    name, kwargs = part
    return name + (json.dumps(kwargs) if kwargs else "")
