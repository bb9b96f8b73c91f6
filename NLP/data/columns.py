"""Known tasks by name, and the text and label columns of a dataset, inferred from all splits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import pyarrow as pa

from kd.common.data.label_names import is_number
from kd.common.data.label_sets import is_list, join_marks, mark_columns, split_names
from kd.common.data.sources import Splits
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import TaskType


@dataclass(frozen=True)
class TaskSpec:
    """A known task. `hub`: owner/name:config, empty for an embedded dataset. `metric`: the primary metric."""

    hub: str
    text_columns: tuple[str, ...]
    label_column: str
    metric: str
    label_names: tuple[str, ...] = ()  # empty: the task is not recognized by its label names
    labelled_test: bool = False  # False: the labels of the test split are hidden
    task: TaskType = "classification"


GLUE = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
PARQUET = "refs/convert/parquet"  # the revision in which the Hub stores data that a script on main would write

TASKS: dict[str, TaskSpec] = {
    "intents": TaskSpec("", ("text",), "intent", "accuracy", labelled_test=True),
    "multilabel_intents": TaskSpec("", ("text",), "intents", "f1_micro", labelled_test=True, task="multi_label"),
    "synthetic_entities": TaskSpec("", ("tokens",), "tags", "f1", labelled_test=True, task="token_classification"),
    "clinc_oos": TaskSpec("clinc/clinc_oos:plus", ("text",), "intent", "accuracy", labelled_test=True),
    "cola": TaskSpec(f"{GLUE}:cola", ("sentence",), "label", "matthews", ("unacceptable", "acceptable")),
    "sst2": TaskSpec(f"{GLUE}:sst2", ("sentence",), "label", "accuracy", ("negative", "positive")),
    "mrpc": TaskSpec(f"{GLUE}:mrpc", SENTENCES, "label", "f1", ("not_equivalent", "equivalent"), labelled_test=True),
    "qqp": TaskSpec(f"{GLUE}:qqp", ("question1", "question2"), "label", "f1", ("not_duplicate", "duplicate")),
    "mnli": TaskSpec(
        f"{GLUE}:mnli", ("premise", "hypothesis"), "label", "accuracy", ("entailment", "neutral", "contradiction")
    ),
    "qnli": TaskSpec(f"{GLUE}:qnli", ("question", "sentence"), "label", "accuracy", ENTAILMENT),
    "rte": TaskSpec(f"{GLUE}:rte", SENTENCES, "label", "accuracy", ENTAILMENT),
    "stsb": TaskSpec(f"{GLUE}:stsb", SENTENCES, "label", "spearman", task="regression"),
    "intent_pairs": TaskSpec("", ("text1", "text2"), "score", "spearman", labelled_test=True, task="regression"),
}
TASKS |= {
    "go_emotions": TaskSpec(
        "google-research-datasets/go_emotions:simplified", ("text",), "labels", "f1_micro", (), True, "multi_label"
    ),
    **{
        name: TaskSpec(hub, ("tokens",), "ner_tags", "f1", (), True, "token_classification")
        for name, hub in (("conll2003", f"eriktks/conll2003@{PARQUET}"), ("wnut_17", f"leondz/wnut_17@{PARQUET}"))
    },
}

LABEL_COLUMNS = (  # the first group with a column in the data names the label column
    ("label", "labels", "intent", "target", "class"),
    ("sentiment", "category", "topic", "emotion", "rating", "stars", "score"),
)
TEXT_COLUMNS = {name for task in TASKS.values() for name in task.text_columns}
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "ner", "labels", "label")  # columns of lists
LISTED: dict[TaskType | None, str] = {
    "multi_label": "lists of labels",
    "token_classification": "lists of tags",
}  # contents of a label column
UNNAMED = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")  # the index of pandas, or a trailing comma
INDEX = re.compile(r"(.*[ _-])?(id|idx|index|row)", re.IGNORECASE)
PAIR = re.compile(r"(.+?)[ _-]?(1|2|a|b|A|B)")
FLAGS = "name them with --text_columns and --label_column"
SEVERAL = "name several columns of 0 and 1 with --label_column, or pass --label_separator for names in one column"

# Contents of a column: texts, repeated words or numbers (classes), other numbers (scores), row numbers, or lists.
Content = Literal["texts", "classes", "numbers", "index", "lists", "other"]
LABELS = ("classes", "numbers", "lists")  # contents of a label column


@dataclass(frozen=True)
class Columns:
    """The names of one or two text columns, or of a column of words, and of the label column."""

    text: tuple[str, ...]
    label: str


def known_task(columns: Columns, label_names: list[str], task: TaskType) -> TaskSpec | None:
    """The known task with these columns and label names: CoLA and SST-2 differ only in their label names."""
    for spec in TASKS.values():
        same_labels = task == "regression" or set(spec.label_names) == set(label_names)
        if spec.text_columns == columns.text and spec.task == task and same_labels:
            return spec
    return None


def is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def text_columns(raw: Splits) -> list[str]:
    """Columns of strings in at least one split. In another split they may contain only digits, which are read as
    numbers.
    """
    names = dict.fromkeys(name for rows in raw.values() for name in rows.features)
    return [name for name in names if any(is_text(rows.features.get(name)) for rows in raw.values())]


def infer_contents(raw: Splits) -> dict[str, Content]:
    """The contents of each column, inferred from all splits."""
    names = dict.fromkeys(name for rows in raw.values() for name in rows.features)
    return {name: _content(name, [rows for rows in raw.values() if name in rows.features]) for name in names}


def _content(name: str, splits: list[datasets.Dataset]) -> Content:
    features = [rows.features[name] for rows in splits]
    if all(map(is_list, features)):
        return "lists"
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
    if filled and numbers and all(found == size for found, size in sizes) and (whole or INDEX.fullmatch(name)):
        return "index"
    if not filled or unnamed:
        return "other"
    repeated = all(2 * found <= size for found, size in sizes)
    return "classes" if repeated else "numbers" if numbers else "texts"


def choose_columns(raw: Splits, text: list[str] | None, label: str | None) -> tuple[Columns, str]:
    """Returns the columns that the flags name, or those of a known task, or those inferred from names and contents,
    together with a note on the choice. Raises UserError if several choices are plausible.
    """
    contents, strings = infer_contents(raw), text_columns(raw)
    names = list(next(iter(raw.values())).features)
    if not {*names} & {name for name, content in contents.items() if content in LABELS}:
        names = list(contents)  # the first split has no labels
    contents = {name: contents[name] for name in names}
    for name in [*(text or []), *([label] if label else [])]:
        if name not in names:
            raise UserError(f"no column {name!r}: the columns are {', '.join(names)}; {FLAGS}")
    if columns := _columns_of_words(raw, text, label):
        return columns, _note(columns, contents)
    columns = None if text or label else _columns_of_known_task(names, strings)
    if columns is None:
        label = label or _infer_label(contents, text or [])
        chosen = text or _infer_texts(contents, strings, label)
        if label is None or not chosen:
            raise _ambiguous(contents, strings, label)
        columns = Columns(tuple(chosen), label)
    for name in columns.text:
        if name not in strings or name == columns.label:
            raise UserError(
                f"column {name!r} does not contain texts, or is the label column; the columns are "
                f"{', '.join(names)}; {FLAGS}"
            )
    if len(columns.text) > 2:
        raise UserError(f"--text_columns takes one or two columns, not {', '.join(columns.text)}")
    return columns, _note(columns, contents)


def _columns_of_words(raw: Splits, text: list[str] | None, label: str | None) -> Columns | None:
    """A column of words and one of their tags, if the text column holds lists of strings: the named one, or one with
    a usual name. Raises UserError if the column of tags is ambiguous.
    """
    features = {name: feature for rows in raw.values() for name, feature in rows.features.items()}
    lists = [name for name, feature in features.items() if is_list(feature)]
    words = text[0] if text else next((name for name in WORDS if name in lists), "")
    if words not in lists or not is_text(getattr(features[words], "feature", None)):
        return None
    others = [name for name in lists if name != words]
    usual = next((name for name in TAGS if name in others), others[0] if len(others) == 1 else "")
    tags = label or usual
    if tags not in others or (text and len(text) > 1):
        raise UserError(
            f"column {words!r} holds lists of words, so one column of lists holds their tags: name it with "
            f"--label_column, one of {', '.join(others) or 'none'}"
        )
    return Columns((words,), tags)


def choose_task(
    raw: Splits, text: list[str] | None, labels: Sequence[str], task: TaskType | None, separator: str | None
) -> tuple[Splits, Columns, TaskType | None, str]:
    """The columns, and the type of task by what the label column contains: None for one label per row, whose type
    depends on its values. Labels of several columns, or with a separator between them, become a column of lists.

    Raises UserError if several choices are plausible, and if they contradict `task` or `separator`.
    """
    if task == "multi_label" and not labels and not separator and "lists" not in infer_contents(raw).values():
        labels = mark_columns(raw)
        if len(labels) < 2:
            raise UserError(f"--task multi_label: no column holds lists, and {len(labels)} hold 0 and 1; {SEVERAL}")
    label = labels[0] if labels else None
    if len(labels) > 1:
        for name in labels:
            if not any(name in rows.features for rows in raw.values()):
                raise UserError(f"no column {name!r}: the columns are {', '.join(next(iter(raw.values())).features)}")
        raw, label = join_marks(raw, labels)
    columns, note = choose_columns(raw, text, label)
    if separator:
        raw = split_names(raw, columns.label, separator)
    found: TaskType | None = None
    if any(is_list(rows.features.get(columns.label)) for rows in raw.values()):
        words = any(is_list(rows.features.get(columns.text[0])) for rows in raw.values())
        found = "token_classification" if words else "multi_label"
    if task and found != task and (found or task in LISTED):
        holds = LISTED[found] if found in LISTED else "one label per text"
        raise UserError(f"the task is {task}, but column {columns.label!r} holds {holds}: {SEVERAL}")
    return raw, columns, found or task, note


def _columns_of_known_task(names: list[str], strings: list[str]) -> Columns | None:
    """The columns of the known task with the most columns in the data."""
    known = [Columns(task.text_columns, task.label_column) for task in TASKS.values()]
    present = [columns for columns in known if columns.label in names and set(columns.text) <= set(strings)]
    return max(present, key=lambda columns: len(columns.text), default=None)


def _infer_label(contents: dict[str, Content], text: list[str]) -> str | None:
    rest = {name: content for name, content in contents.items() if name not in text}
    for group in LABEL_COLUMNS:
        if named := [name for name in rest if name.lower() in group]:
            return named[0] if len(named) == 1 else None
    candidates = [name for name, content in rest.items() if content in LABELS]
    return candidates[0] if len(candidates) == 1 else None


def _infer_texts(contents: dict[str, Content], strings: list[str], label: str | None) -> list[str]:
    """One text column, or two such as sentence1 and sentence2; empty if the choice is ambiguous."""
    others = [name for name in strings if name != label]
    texts = [name for name in others if contents.get(name) == "texts"]
    fallback = [name for name in others if contents.get(name) == "classes" or name in TEXT_COLUMNS]
    for found in (
        texts,
        fallback,
    ):  # a single text column may repeat its texts, and one with a known name may contain only digits
        if len(found) == 1 or (len(found) == 2 and _is_pair(*found)):
            return found
    return []


def _is_pair(first: str, second: str) -> bool:
    names = PAIR.fullmatch(first), PAIR.fullmatch(second)
    return names[0] is not None and names[1] is not None and names[0][1] == names[1][1]


def _ambiguous(contents: dict[str, Content], strings: list[str], label: str | None) -> UserError:
    labels = [name for name, content in contents.items() if content in LABELS]
    missing = [] if label else [f"the label column ({', '.join(labels) or 'no candidate'})"]
    texts = [name for name in strings if contents.get(name) == "texts" and name != label]
    if len(texts) != 1:
        missing.insert(0, f"the one or two text columns ({', '.join(texts) or 'no candidate'})")
    header = "" if not any(map(is_number, contents)) else "; a CSV file begins with a line of column names"
    return UserError(f"cannot infer {' and '.join(missing)} among {', '.join(map(repr, contents))}: {FLAGS}{header}")


def _note(columns: Columns, contents: dict[str, Content]) -> str:
    used = {*columns.text, columns.label}
    numbers = [repr(name) for name, content in contents.items() if content == "index" and name not in used]
    others = [repr(name) for name, content in contents.items() if content != "index" and name not in used]
    note = f"columns: {' and '.join(map(repr, columns.text))} as text, {columns.label!r} as label"
    note += f"; {', '.join(numbers)} not used (row numbers)" if numbers else ""
    return note + (f"; {', '.join(others)} not used" if others else "")
