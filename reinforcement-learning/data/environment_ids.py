"""Ids of environments: an id of Gymnasium, optionally with arguments of the environment and with wrappers.

    Hopper-v4
    my_package:Mine-v0                       my_package is imported first
    Pendulum-v1{"g": 5.0}                    arguments of the environment, as JSON
    Walker2d-v4+time_feature                 wrappers, in the order in which they are applied
    CartPole-v1+frame_stack{"n": 4}+my_package:Wrapper

A student may observe less, or otherwise, than its teacher. Its environment is then the teacher's with further
wrappers, and both observe the same states in a third one, whose observations are those of both in one vector:

    Pendulum-v1                                                          the teacher's
    Pendulum-v1+select{"indices": [0, 1]}                                the student's
    Pendulum-v1+teacher_part+select{"indices": [0, 1]}+student_part      of both

This module imports neither torch nor Gymnasium, so that `--help` is fast.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Part = tuple[str, dict[str, Any]]  # name and arguments

_HERE = "kd.reinforcement_learning.data.wrappers"
WRAPPERS = {
    "time_feature": f"{_HERE}:TimeFeature",
    "frame_stack": f"{_HERE}:FrameStack",
    "mask": f"{_HERE}:Mask",
    "select": f"{_HERE}:Select",
}
TEACHER_PART, STUDENT_PART = "teacher_part", "student_part"
_PARTS = {TEACHER_PART: f"{_HERE}:TeacherPart", STUDENT_PART: f"{_HERE}:StudentPart"}
ENTRY_POINTS = WRAPPERS | _PARTS


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


def parse_wrappers(flag: str, words: Sequence[str]) -> tuple[Part, ...]:
    """Reads wrappers, the values of a flag. Raises ValueError for a word of another form."""
    for word in words:
        if len(parse_id(f"-+{word}").wrappers) != 1:
            raise ValueError(f'{flag} takes wrappers such as frame_stack{{"n": 4}} or module:Class, got {word}')
    return parse_id("+".join(["-", *words])).wrappers


def wrapped(id: str, wrappers: Sequence[Part]) -> str:
    """The id with further wrappers."""
    parsed = parse_id(id)
    return str(parsed._replace(wrappers=(*parsed.wrappers, *wrappers))) if wrappers else id


def view(teacher: str, student: str) -> str:
    """The wrappers that an id of a student's environment adds to that of its teacher's. Raises ValueError if it does
    not only add wrappers.
    """
    inner, outer = parse_id(teacher), parse_id(student)
    count = len(inner.wrappers)
    if inner[:2] != outer[:2] or inner.wrappers != outer.wrappers[:count]:
        raise ValueError(f"{student} is not {teacher} with further wrappers")
    return "+".join(map(_written, outer.wrappers[count:]))


def of_both(teacher: str, student: str) -> str:
    """The id of the environment in which a teacher and a student observe the same states, from the ids of theirs; the
    same id if both observe the same. Raises ValueError as `view`.
    """
    added = view(teacher, student)
    return f"{teacher}+{TEACHER_PART}+{added}+{STUDENT_PART}" if added else teacher


def student_environment(id: str) -> str:
    """The environment of the student in an id of `of_both`; any other id stands for itself."""
    parsed = parse_id(id)
    wrappers = tuple(part for part in parsed.wrappers if part[0] not in _PARTS)
    return id if wrappers == parsed.wrappers else str(parsed._replace(wrappers=wrappers))


def student_wrappers(words: Sequence[str], frames: int) -> tuple[Part, ...]:
    """The wrappers of --student_observation (indices or keys, then wrappers) and --frame_stack. Raises ValueError for
    malformed words.
    """
    wrappers = [word for word in words if re.search("[:{]", word) or word in WRAPPERS]
    selected = [word for word in words if word not in wrappers]
    parts = [*_selection(selected), *parse_wrappers("--student_observation", wrappers)]
    if frames > 1:
        parts.append(("frame_stack", {"n": frames, "padding": "reset"}))
    return tuple(parts)


def _selection(words: list[str]) -> list[Part]:
    """The wrapper that selects indices and ranges, or keys; none without words."""
    if not any(word[:1].isdigit() for word in words):
        return [("select", {"keys": words})] if words else []
    indices = [index for word in words for index in _indices(word)]
    if len(set(indices)) < len(indices):
        raise ValueError(f"--student_observation names an index twice: {' '.join(words)}")
    return [("select", {"indices": indices})]


def _indices(word: str) -> range:
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if found is None or int(found[1]) > int(found[2] or found[1]):
        raise ValueError(f"--student_observation takes indices and ranges such as 0 2-5, or keys, got {word}")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def base_id(id: str) -> str:
    """The id of Gymnasium in an id, without module, arguments and wrappers."""
    return parse_id(id).name.rpartition(":")[2]


def _written(part: Part) -> str:
    name, kwargs = part
    return name + (json.dumps(kwargs) if kwargs else "")
