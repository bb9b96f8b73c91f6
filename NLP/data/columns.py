"""Which columns hold texts and labels, decided by their contents over all splits."""

import re
from dataclasses import dataclass
from typing import Literal

import datasets
import pyarrow as pa

from kd.common.data.labels import is_number
from kd.common.data.splits import Splits
from kd.common.utils.errors import UserError
from kd.nlp.data.tasks import TASKS, Task

LABEL_COLUMNS = (  # the first of these groups that has a column in the data gives the label
    ("label", "labels", "intent", "target", "class"),
    ("sentiment", "category", "topic", "emotion", "rating", "stars", "score"),
)
TEXT_COLUMNS = {name for task in TASKS.values() for name in task.text_columns}
UNNAMED = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")  # the index of pandas, or after the last comma
INDEX = re.compile(r"(.*[ _-])?(id|idx|index|row)", re.IGNORECASE)
PAIR = re.compile(r"(.+?)[ _-]?(1|2|a|b|A|B)")
FLAGS = "name them with --text_columns and --label_column"

# What a column holds: texts, words or numbers that repeat (classes), other numbers (scores), or the numbers of rows.
Content = Literal["texts", "classes", "numbers", "index", "other"]


@dataclass(frozen=True)
class Columns:
    text: tuple[str, ...]
    label: str


def is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def texts_of(raw: Splits) -> list[str]:
    """The columns of strings: in one split, since another may hold digits alone and have been written as numbers."""
    names = dict.fromkeys(name for rows in raw.values() for name in rows.features)
    return [name for name in names if any(is_text(rows.features.get(name)) for rows in raw.values())]


def contents_of(raw: Splits) -> dict[str, Content]:
    """What each column of the first split holds, decided by all of them."""
    first = next(iter(raw.values()))
    return {name: _content(name, [rows for rows in raw.values() if name in rows.features]) for name in first.features}


def _content(name: str, splits: list[datasets.Dataset]) -> Content:
    features = [rows.features[name] for rows in splits]
    if not all(isinstance(feature, datasets.Value | datasets.ClassLabel) for feature in features):
        return "other"
    unnamed = UNNAMED.fullmatch(name) is not None
    if any(isinstance(feature, datasets.ClassLabel) or feature.dtype == "bool" for feature in features):
        return "other" if unnamed else "classes"
    values = [rows.select_columns([name]).with_format("arrow")[:][name] for rows in splits]
    try:
        distinct = [part.cast(pa.string()).unique().drop_null().to_pylist() for part in values]
    except pa.ArrowException:
        return "other"
    filled = [string for part in distinct for string in part if string.strip()]
    sizes = list(zip(map(len, distinct), map(len, values), strict=True))
    numbers = all(map(is_number, filled))
    whole = numbers and all(float(string).is_integer() for string in filled)
    if filled and numbers and all(a == b for a, b in sizes) and (whole or INDEX.fullmatch(name)):
        return "index"
    if not filled or unnamed:
        return "other"
    repeating = all(2 * found <= size for found, size in sizes)
    return "classes" if repeating else "numbers" if numbers else "texts"


def choose_columns(raw: Splits, text: list[str] | None, label: str | None) -> tuple[Columns, str]:
    """The columns named by flags, else those of a known task, else those that follow from names and contents
    without doubt; and a note on what was chosen.
    """
    names = list(next(iter(raw.values())).features)
    for name in [*(text or []), *([label] if label else [])]:
        if name not in names:
            raise UserError(f"no column {name!r}: the columns are {', '.join(names)}; {FLAGS}")
    strings, contents = texts_of(raw), contents_of(raw)
    columns = None if text or label else _known_columns(names, strings)
    if columns is None:
        label = label or _guess_label(contents, text or [])
        chosen = text or _guess_texts(contents, strings, label)
        if label is None or not chosen:
            raise _cannot_tell(contents, strings, label)
        columns = Columns(tuple(chosen), label)
    for name in columns.text:
        if name not in strings or name == columns.label:
            raise UserError(
                f"column {name!r} does not hold texts (or is the label); the columns are {', '.join(names)}; {FLAGS}"
            )
    if len(columns.text) > 2:
        raise UserError(f"--text_columns takes one or two columns, not {', '.join(columns.text)}")
    return columns, _note(columns, contents)


def _known_columns(names: list[str], strings: list[str]) -> Columns | None:
    """The columns of the known task that uses most of them."""
    rows = [Columns(task.text_columns, task.label_column) for task in TASKS.values()]
    fitting = [row for row in rows if row.label in names and set(row.text) <= set(strings)]
    return max(fitting, key=lambda row: len(row.text), default=None)


def _guess_label(contents: dict[str, Content], text: list[str]) -> str | None:
    rest = {name: content for name, content in contents.items() if name not in text}
    for group in LABEL_COLUMNS:
        if named := [name for name in rest if name.lower() in group]:
            return named[0] if len(named) == 1 else None
    candidates = [name for name, content in rest.items() if content in ("classes", "numbers")]
    return candidates[0] if len(candidates) == 1 else None


def _guess_texts(contents: dict[str, Content], strings: list[str], label: str | None) -> list[str]:
    """One column of texts or a pair of them such as sentence1 and sentence2; nothing where others could be meant."""
    others = [name for name in strings if name != label]
    texts = [name for name in others if contents.get(name) == "texts"]
    alike = [name for name in others if contents.get(name) == "classes" or name in TEXT_COLUMNS]
    for found in (texts, alike):  # a lone column may hold texts that repeat, one called text digits alone
        if len(found) == 1 or (len(found) == 2 and _is_pair(*found)):
            return found
    return []


def _is_pair(first: str, second: str) -> bool:
    names = PAIR.fullmatch(first), PAIR.fullmatch(second)
    return names[0] is not None and names[1] is not None and names[0][1] == names[1][1]


def _cannot_tell(contents: dict[str, Content], strings: list[str], label: str | None) -> UserError:
    labels = [name for name, content in contents.items() if content in ("classes", "numbers")]
    asked = [] if label else [f"the label column ({', '.join(labels) or 'none looks like one'})"]
    texts = [name for name in strings if contents.get(name) == "texts" and name != label]
    if len(texts) != 1:
        asked.insert(0, f"the one or two text columns ({', '.join(texts) or 'none looks like one'})")
    header = "" if not any(map(is_number, contents)) else "; a CSV file begins with a line of column names"
    return UserError(f"cannot tell {' and '.join(asked)} among {', '.join(map(repr, contents))}: {FLAGS}{header}")


def _note(columns: Columns, contents: dict[str, Content]) -> str:
    used = {*columns.text, columns.label}
    numbers = [repr(name) for name, content in contents.items() if content == "index" and name not in used]
    others = [repr(name) for name, content in contents.items() if content != "index" and name not in used]
    note = f"columns: {' and '.join(map(repr, columns.text))} as text, {columns.label!r} as label"
    note += f"; {', '.join(numbers)} not used (row numbers)" if numbers else ""
    return note + (f"; {', '.join(others)} not used" if others else "")


def recognise(columns: Columns, label_names: list[str], regression: bool) -> Task | None:
    """The known task with these text columns and these label names: CoLA and SST-2 differ in nothing else."""
    for task in TASKS.values():
        same_labels = regression or set(task.label_names) == set(label_names)
        if task.text_columns == columns.text and task.regression == regression and same_labels:
            return task
    return None
