"""One door to every text dataset: embedded, known by name, local folder or Hub name, all with the same columns."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import pyarrow as pa

from common.sources import Splits, short_name
from common.utils.errors import UserError
from nlp.data.columns import Columns, choose_columns, class_names, is_float, recognise, scheme
from nlp.data.sources import read_splits
from nlp.data.tasks import TASKS

CARVED = 10  # one row in ten, when there is no validation split
CARVING_SEED = 0  # not that of a run, or what measures its student later would do so on texts that it learned from


@dataclass(frozen=True)
class TextData:
    """Every split has the columns text, text_pair (for tasks with pairs), label (class id or float) and sample_id."""

    name: str
    splits: Splits
    label_names: list[str]  # by class id; empty for regression
    regression: bool
    primary_metric: str
    fingerprint: str  # of the contents, the same wherever they were loaded from
    notes: list[str] = field(default_factory=list)  # what a reader of a report should know

    @property
    def num_labels(self) -> int:
        return 1 if self.regression else len(self.label_names)


def load_text_data(dataset: str, text_columns: list[str] | None = None, label_column: str | None = None) -> TextData:
    """Loads `dataset` (a name in TASKS, a folder, or owner/name[:config]). A missing validation split is carved from
    train, the same each time.

    Raises UserError where there is no such dataset, column, text or label.
    """
    raw, notes = read_splits(dataset)
    columns = choose_columns(raw["train"].features, text_columns, label_column)
    _drop_unlabelled_test(raw, columns, notes)
    for split, rows in raw.items():
        _check(split, rows, columns)
    regression = is_float(raw["train"].features[columns.label])
    label_names = [] if regression else scheme(raw["train"], columns.label)
    task = recognise(columns, label_names, regression)
    if task and task.label_names:
        label_names = list(task.label_names)  # F1 is that of class 1, also where a CSV file has lost the order
    splits = _encode(raw, columns, label_names)
    if len(label_names) == 1:
        raise UserError(
            f"every label in column {columns.label!r} is {label_names[0]!r}, so there is nothing to tell apart: add "
            "rows of another class, or name another column with --label_column"
        )
    if not any(split.startswith("validation") for split in splits):
        splits = _carve(splits, regression)
        notes.append("no validation split: a stratified tenth of train was set aside, the same whatever the seed")
    return TextData(
        name=dataset if dataset in TASKS else short_name(dataset),
        splits={split: rows.add_column("sample_id", list(range(len(rows)))) for split, rows in splits.items()},
        label_names=label_names,
        regression=regression,
        primary_metric=task.metric if task else "spearman" if regression else "accuracy",
        fingerprint=_fingerprint(splits, label_names),
        notes=notes,
    )


def with_label_order(data: TextData, names: list[str]) -> TextData:
    """The same rows with label ids that are places in `names`, as a model's `id2label` has them. Names are compared
    without regard to case where that is unambiguous; `names` may hold more labels than the data.

    Raises UserError where a label of the data is not among `names`.
    """
    if data.regression:
        raise UserError(f"{data.name} has scores, not classes: its labels have no order of names")
    distinct = all(len({name.lower() for name in some}) == len(some) for some in (names, data.label_names))
    key = str.lower if distinct else str
    places = {key(name): number for number, name in enumerate(names)}
    if unknown := [name for name in data.label_names if key(name) not in places]:
        raise UserError(f"{data.name} has the label {unknown[0]!r}, which is not among {', '.join(names)}")
    ids = np.array([places[key(name)] for name in data.label_names])
    splits = {}
    for split, rows in data.splits.items():
        table = rows.with_format("arrow")[:]
        labels = pa.array(ids[table["label"].to_numpy()], pa.int64())
        splits[split] = datasets.Dataset(table.set_column(table.column_names.index("label"), "label", labels))
    return replace(data, splits=splits, label_names=list(names), fingerprint=_fingerprint(splits, list(names)))


def _drop_unlabelled_test(raw: Splits, columns: Columns, notes: list[str]) -> None:
    if "test" in raw and (
        columns.label not in raw["test"].features or set(_labels(raw["test"], columns)) <= {None, -1}
    ):
        del raw["test"]
        notes.append("the test split has no labels and is not used")


def _labels(rows: datasets.Dataset, columns: Columns) -> list:
    return rows.select_columns([columns.label])[:][columns.label]


def _check(split: str, rows: datasets.Dataset, columns: Columns) -> None:
    if not len(rows):
        raise UserError(f"the {split} split is empty: it needs at least one row")
    for name in (*columns.text, columns.label):
        if name not in rows.features:
            raise UserError(
                f"the {split} split lacks column {name!r} that train has: its columns are {rows.column_names}"
            )
    for name in columns.text:
        for row, text in enumerate(rows.select_columns([name])[:][name]):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"row {row} of {split}: no text in column {name!r}; remove the row or fill it in")


def _encode(raw: Splits, columns: Columns, label_names: list[str]) -> Splits:
    """Renames the texts and turns labels into class ids, or floats where there are no names."""
    texts = dict(zip(("text", "text_pair"), columns.text, strict=False))
    kinds = {new: datasets.Value("string") for new in texts} | {
        "label": datasets.Value("int64" if label_names else "float32")
    }
    seen = set(class_names(raw["train"], columns.label)) if label_names else set()
    splits = {}
    for split, rows in raw.items():
        values = {new: rows.select_columns([old])[:][old] for new, old in texts.items()}
        labels = _class_ids(split, rows, columns, label_names, seen) if label_names else _floats(split, rows, columns)
        splits[split] = datasets.Dataset.from_dict(values | {"label": labels}, features=datasets.Features(kinds))
    return splits


def _class_ids(
    split: str, rows: datasets.Dataset, columns: Columns, label_names: list[str], seen: set[str | None]
) -> list[int]:
    ids = {name: number for number, name in enumerate(label_names)}
    names = class_names(rows, columns.label)
    for row, name in enumerate(names):
        if name is None:
            raise UserError(f"row {row} of {split}: no label in column {columns.label!r}; every row needs one")
        if name not in seen:
            raise UserError(
                f"row {row} of {split}: label {name!r} never occurs in train; remove it or add training rows"
            )
    return [ids[name] for name in names if name is not None]


def _floats(split: str, rows: datasets.Dataset, columns: Columns) -> list[float]:
    values = _labels(rows, columns)
    for row, value in enumerate(values):
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise UserError(
                f"row {row} of {split}: {value!r} in column {columns.label!r} is no number; give a finite one"
            )
    return [float(value) for value in values]


def _carve(splits: Splits, regression: bool) -> Splits:
    """Sets aside every tenth row of train in the order of the labels: each class gives its share, none gives all."""
    train = splits["train"]
    labels = np.asarray(train["label"][:])
    order = np.lexsort((np.random.default_rng(CARVING_SEED).random(len(labels)), labels))
    if not regression:
        order = order[np.bincount(labels)[labels[order]] > 1]
    chosen = np.sort(order[CARVED // 2 :: CARVED])
    if not len(chosen):
        raise UserError("no validation split, and too few rows in train to set some aside: add a file validation.*")
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    return splits | {
        "train": train.select(rest).flatten_indices(),
        "validation": train.select(chosen).flatten_indices(),
    }


def _fingerprint(splits: Splits, label_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for split in sorted(splits):
        for column in (name for name in splits[split].column_names if name != "sample_id"):
            digest.update(json.dumps([split, column, splits[split][:][column]]).encode())
    return digest.hexdigest()
