"""Words and their tags, for token classification: reads the columns of lists."""

from collections import Counter
from typing import Any

import datasets
import numpy as np

from kd.common.data.label_names import count_rows, map_label_ids, shorten_list
from kd.common.data.label_sets import declared_names, is_list
from kd.common.data.labels import Labels, check_classes, class_names
from kd.common.data.sources import Splits
from kd.common.metrics.entities import OUTSIDE, begin_entities, is_iob
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.columns import Columns

Rows = list[list[Any] | None]


def read_tags(raw: Splits, columns: Columns, known: list[str] | None = None) -> Labels:
    """Reads words and tags of all splits. Values are an array of lists of tag ids per split; IGNORED (-100) as an id
    is a word without a tag. Rows without words or tags are left out. Tags in IOB1 become IOB2.

    Args:
        known: the tags of the model that is evaluated.

    Raises UserError if a row has other numbers of words and tags, and if train or validation has no tags.
    """
    words, column = columns.text[0], columns.label
    declared = [names for rows in raw.values() if (names := declared_names(rows.features.get(column)))]
    lists = {split: _tags_of_rows(split, rows, words, column) for split, rows in raw.items()}
    converted, notes = _in_iob2(lists)
    occurring = {tag for rows in converted.values() for row in rows for tag in row or () if tag is not None}
    names = class_names(declared, occurring) if declared else []
    names += sorted(occurring - {*names}, key=_place)
    counts = {split: Counter(tag for row in rows for tag in row or () if tag) for split, rows in converted.items()}
    rows = {split: np.flatnonzero([bool(row) for row in found]) for split, found in converted.items()}
    for split, used in rows.items():
        if not len(used) and split != "test":
            raise UserError(f"the {split} split has no tags in column {column!r}: add them, or remove the split")
        if len(used) < len(raw[split]):
            left_out = f"{len(raw[split]) - len(used):,} of {count_rows(len(raw[split]))} of {split}"
            notes.append(f"{left_out} have no words or no tags and are left out")
    notes += check_classes({split: count for split, count in counts.items() if count}, names, column, known)
    ids = {name: i for i, name in enumerate(names)} | {None: IGNORED}
    rows = {split: used for split, used in rows.items() if len(used)}
    values = {
        split: list_array([ids[tag] for tag in converted[split][i] or ()] for i in used)
        for split, used in rows.items()
    }
    scheme = "IOB2" if is_iob(names) else "no IOB2, so the metric is accuracy"
    summary = f"tags: {len(names)} ({shorten_list(names)}), {scheme}"
    return Labels(names, rows, values, [summary, *notes])


def map_tags(
    dataset: str, values: dict[str, np.ndarray], data_names: list[str], names: list[str]
) -> dict[str, np.ndarray]:
    """Tag ids by `names` instead of `data_names`; see `map_label_ids`."""
    flat = {split: np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) for split, rows in values.items()}
    mapped = map_label_ids(dataset, flat, data_names, names)
    ends = {split: np.cumsum([len(row) for row in rows])[:-1] for split, rows in values.items()}
    return {split: list_array(part.tolist() for part in np.split(mapped[split], ends[split])) for split in values}


def list_array(rows: Any) -> np.ndarray:
    """One list per row, which numpy must not stack."""
    listed = list(rows)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def _place(tag: str) -> tuple[bool, str, str]:
    """O first, then by type: B-LOC, I-LOC, B-PER."""
    prefix, _, kind = tag.rpartition("-")
    return tag != OUTSIDE, kind, prefix


def _tags_of_rows(split: str, rows: datasets.Dataset, words: str, column: str) -> Rows:
    """The names of the tags of each row; None for a word with the id IGNORED. Raises UserError for invalid rows."""
    if words not in rows.features or not is_list(rows.features.get(column)):
        if split == "test":
            return [None] * len(rows)
        raise UserError(f"the {split} split lacks lists of words and tags in the columns {words!r} and {column!r}")
    names, found = declared_names(rows.features[column]), list[list[Any] | None]()
    for number, (row_words, row_tags) in enumerate(zip(rows[words][:], rows[column][:], strict=True)):
        if row_tags is not None and len(row_tags) != len(row_words or ()):
            raise UserError(
                f"row {number} of {split} has {len(row_words or ())} words in {words!r} and {len(row_tags)} tags in "
                f"{column!r}: correct or remove it"
            )
        found.append(None if row_tags is None else [_name(tag, names) for tag in row_tags])
    return found


def _name(tag: Any, names: list[str]) -> str | None:
    if tag is None or tag == IGNORED:
        return None
    return names[tag] if names and not isinstance(tag, str) else str(tag).strip()


def _in_iob2(lists: dict[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """The same tags in IOB2, with a note on what was changed. Tags that describe no entities stay."""
    tags = {tag for rows in lists.values() for row in rows for tag in row or () if tag}
    if not is_iob(sorted(tags | {f"B-{tag[2:]}" for tag in tags if tag.startswith("I-")})):
        return lists, []
    fixed = {
        split: [row if row is None or None in row else begin_entities(row) for row in rows]
        for split, rows in lists.items()
    }
    changed = sum(
        old != new
        for split, rows in lists.items()
        for row, other in zip(rows, fixed[split], strict=True)
        for old, new in zip(row or (), other or (), strict=True)
    )
    note = f"{changed:,} tags I- that begin an entity were read as B- (IOB1 to IOB2)"
    return fixed, [note] if changed else []
