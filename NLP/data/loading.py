"""One door to every text dataset: embedded, known by name, local folder or Hub name, all with the same columns."""

import hashlib
import json
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.common.data.label_words import Kind
from kd.common.data.labels import read_labels, renumber
from kd.common.data.sources import Splits, short_name
from kd.common.utils.errors import UserError
from kd.nlp.data.columns import FLAGS, Columns, choose_columns, recognise
from kd.nlp.data.sources import read_splits
from kd.nlp.data.tasks import TASKS

# Texts of digits alone may have been written as whole numbers, and a column of nothing as null.
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
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


def load_text_data(
    dataset: str,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    task: Kind | None = None,
    known_labels: list[str] | None = None,
    needs_train: bool = True,
) -> TextData:
    """Loads `dataset` (a name in TASKS, a folder or file, or owner/name[:config]). Rows without a label are left out,
    a missing validation split is carved from train, the same each time; the notes report it, and what was inferred.

    `task` decides where labels could be classes as well as scores. To measure a saved classifier, `known_labels` are
    its labels, in their order, and without `needs_train` any split will do. Raises UserError where there is no such
    dataset, column, text or label.
    """
    raw, notes = read_splits(dataset, needs_train)
    columns, chosen = choose_columns(raw, text_columns, label_column)
    if dataset in TASKS:
        task = "regression" if TASKS[dataset].regression else "classification"
    try:
        labels = read_labels(raw, columns.label, task, known_labels)
    except UserError as error:
        raise UserError(f"{error} (--label_column names another column)") from None
    label_names, regression = labels.names, not labels.names
    known_task = recognise(columns, known_labels or label_names, regression)
    splits = {split: _columns(split, raw[split], columns, rows) for split, rows in labels.rows.items()}
    splits = {split: _with_labels(rows, labels.values[split]) for split, rows in splits.items()}
    data = TextData(
        name=dataset if dataset in TASKS else short_name(dataset),
        splits=splits,
        label_names=label_names,
        regression=regression,
        primary_metric=known_task.metric if known_task else "spearman" if regression else "accuracy",
        fingerprint="",
        notes=[*notes, chosen, *labels.notes],
    )
    if known_task and known_task.label_names and not known_labels:
        data = with_label_order(data, list(known_task.label_names))  # F1 is that of class 1, also for a CSV file
    if "train" in splits and not any(split.startswith("validation") for split in splits):
        data = _carve(data)
    numbered = {split: rows.add_column("sample_id", list(range(len(rows)))) for split, rows in data.splits.items()}
    data = replace(data, splits=numbered, fingerprint=_fingerprint(numbered, data.label_names))
    return with_label_order(data, known_labels) if known_labels else data


def with_label_order(data: TextData, names: list[str]) -> TextData:
    """The same rows with label ids that are places in `names`, as a model's `id2label` has them. Names are compared
    without regard to case where that is unambiguous; `names` may hold more labels than the data.

    Raises UserError where a label of the data is not among `names`.
    """
    if data.regression:
        raise UserError(f"{data.name} has scores, not classes: its labels have no order of names")
    tables = {split: rows.with_format("arrow")[:] for split, rows in data.splits.items()}
    ids = {split: table["label"].to_numpy() for split, table in tables.items()}
    ids = renumber(data.name, ids, data.label_names, names)
    places = {split: table.column_names.index("label") for split, table in tables.items()}
    splits = {
        split: datasets.Dataset(table.set_column(places[split], "label", pa.array(ids[split])))
        for split, table in tables.items()
    }
    return replace(data, splits=splits, label_names=list(names), fingerprint=_fingerprint(splits, list(names)))


def _columns(split: str, rows: datasets.Dataset, columns: Columns, kept: np.ndarray) -> dict[str, pa.Array]:
    """The texts of the rows that are kept."""
    found = {}
    for new, name in zip(("text", "text_pair"), columns.text, strict=False):
        if name not in rows.features:
            raise UserError(
                f"the {split} split lacks column {name!r} that train has: its columns are {rows.column_names}"
            )
        texts = rows.select_columns([name]).with_format("arrow")[:][name]
        if not any(fits(texts.type) for fits in TEXT_TYPES):
            raise UserError(f"column {name!r} of the {split} split holds {texts.type}, not texts: {FLAGS}")
        texts = texts.cast(pa.large_string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy()
        if (empty := kept[blank[kept]]).size:
            raise UserError(f"row {empty[0]} of {split}: no text in column {name!r}; remove the row or fill it in")
        found[new] = texts.take(pa.array(kept))
    return found


def _with_labels(texts: dict[str, pa.Array], labels: np.ndarray) -> datasets.Dataset:
    kinds = {name: datasets.Value("string") for name in texts} | {"label": datasets.Value(str(labels.dtype))}
    features = datasets.Features(kinds)
    return datasets.Dataset(pa.table({**texts, "label": labels}).cast(features.arrow_schema))


def _carve(data: TextData) -> TextData:
    """Sets aside every tenth row of train in the order of the labels: each class gives its share, none gives all."""
    train = data.splits["train"]
    labels = np.asarray(train["label"][:])
    order = np.lexsort((np.random.default_rng(CARVING_SEED).random(len(labels)), labels))
    if not data.regression:
        order = order[np.bincount(labels)[labels[order]] > 1]
    chosen = np.sort(order[CARVED // 2 :: CARVED])
    if not len(chosen):
        raise UserError("no validation split, and too few rows in train to set some aside: add a file validation.*")
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    parts = {
        "train": train.select(rest).flatten_indices(),
        "validation": train.select(chosen).flatten_indices(),
    }
    note = "no validation split: a stratified tenth of train was set aside, the same whatever the seed"
    return replace(data, splits=data.splits | parts, notes=[*data.notes, note])


def _fingerprint(splits: Splits, label_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for split in sorted(splits):
        for column in (name for name in splits[split].column_names if name != "sample_id"):
            digest.update(json.dumps([split, column, splits[split][:][column]]).encode())
    return digest.hexdigest()
