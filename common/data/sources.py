"""The splits of a dataset by its name: embedded, a local file or folder, or a dataset of the Hugging Face Hub.

A missing validation split is made from train. Its rows do not depend on the seed of a run. Rows without a label, and
those of a split `unlabelled`, are training rows; no metric counts them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa

from kd.common.data.readers import READERS, TXT, read_rows
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError, reason_of
from kd.common.utils.tasks import IGNORED

Splits = dict[str, datasets.Dataset]

SPLIT_NAMES = {name: name for name in ("train", "validation", "validation_matched", "validation_mismatched", "test")}
SPLIT_NAMES |= {name: "validation" for name in ("valid", "dev", "val")}
UNLABELLED = "unlabelled"  # a split of training rows without labels
SPLIT_NAMES |= {name: UNLABELLED for name in ("unlabelled", "unlabeled", "unsupervised")}
SPLIT_SEED = 0  # fixed, so that no run trains on the validation rows of another run

SHARD = re.compile(r"-(\d+)-of-(\d+)$")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")  # owner/name:config@revision
SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # written by save_to_disk of a DatasetDict and a Dataset

# Datasets of a domain by name: a function that returns the splits of an embedded one, or a name on the Hub.
KnownDatasets = Mapping[str, Callable[[], Mapping[str, datasets.Dataset]] | str]


def read_splits(
    dataset: str,
    known: KnownDatasets,
    contents: str = "parquet, CSV or JSON files",
    read: Callable[[Path], Splits] | None = None,
    needs_train: bool = True,
    with_unlabelled: bool = False,
    flag: str = "--dataset",
) -> tuple[Splits, list[str]]:
    """Reads the splits of a dataset. Returns the splits, and notes on splits that are not used.

    Args:
        dataset: a name in `known`, a local folder or file, or owner/name[:config] of the Hub. A file is the split in
            its name; otherwise train, or test if `needs_train` is False.
        known: the embedded datasets of a domain, and short names for datasets of the Hub.
        contents: the supported contents of a folder, for messages.
        read: reads a folder; default: `read_folder`.
        needs_train: whether a missing train split is an error.
        with_unlabelled: whether to return a split `unlabelled`, which then may replace train.
        flag: the flag that names the dataset, for messages.
    """
    source, notes = known.get(dataset, dataset), list[str]()
    embedded = " or ".join(name for name, where in known.items() if callable(where))
    instead = f"pass {flag} FOLDER with {contents}, or {flag} {embedded}, without a download"
    if not isinstance(source, str):
        found = dict(source())
    elif dataset not in known and _exists(dataset):
        path = Path(dataset)
        if path.is_dir():
            found = read(path) if read else read_folder(path, notes)
        else:
            found = read_file(path, "train" if needs_train else "test", notes)
    elif HUB_NAME.fullmatch(source):
        found = _read_hub(dataset, source, instead)
    else:
        raise UserError(
            f"unknown dataset {shorten(dataset)!r}: pass {', '.join(known)}, a folder or file of {contents}, or a "
            "Hub name such as owner/name or owner/name:config"
        )
    splits, unused = _rename_splits(found, dataset, needs_train, with_unlabelled)
    return splits, [*notes, *unused]


def hub_dataset(dataset: str, known: KnownDatasets) -> str | None:
    """The name owner/name[:config] on the Hub of a dataset that `read_splits` reads there; None for any other."""
    source = known.get(dataset, dataset)
    if not isinstance(source, str) or (dataset not in known and _exists(dataset)):
        return None
    return source if HUB_NAME.fullmatch(source) else None


def short_name(dataset: str) -> str:
    """The name of a dataset in reports: the last part of a path, or the name itself."""
    return Path(dataset).resolve().name if _exists(dataset) else dataset


def print_notes(name: str, notes: list[str]) -> None:
    """Prints the notes on a dataset, in the first process only."""
    if process()[0] == 0:
        for note in notes:
            print(f"{name}: {note}")


def _exists(dataset: str) -> bool:
    try:
        Path(dataset).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character, so not a path
        return False
    except OSError as error:
        raise UserError(f"cannot read {shorten(dataset)} ({reason_of(error)})") from None
    return True


def shorten(name: str | Path, width: int = 100) -> str:
    """A name of at most `width` characters, for a message."""
    return str(name) if len(str(name)) <= width else f"{str(name)[:width]}..."


# ---------------------------------------------------------------- files and folders


def read_file(path: Path, default: str, notes: list[str] | None = None) -> Splits:
    """Reads a file as the split in its name, or else as `default`."""
    if path.suffix.lower() not in READERS:
        raise UserError(
            f"{path} is not a parquet, CSV, JSON or CoNLL file (.parquet, .csv, .tsv, .json, .jsonl, .conll): convert "
            "it"
        )
    name = SHARD.sub("", path.stem)
    return {name if name in SPLIT_NAMES else default: read_rows(path, notes)}


def split_in(name: str) -> str:
    """The only split among the words of a file name, such as `my-train_v2`; otherwise the name."""
    found = {word for word in re.split(r"[\W_]+", name.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 and name not in SPLIT_NAMES else name


def list_folder(folder: Path) -> list[Path]:
    """The sorted contents of a folder. Raises UserError if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read folder {folder} ({reason_of(error)})") from None


def read_folder(folder: Path, notes: list[str] | None = None) -> Splits:
    """Reads one file per split, or shards such as train-00000-of-00002.parquet. A name may contain the split, such as
    my_train.csv. Any other file becomes an empty split and is not read.
    """
    by_split: dict[str, list[Path]] = {}
    paths = [path for path in list_folder(folder) if path.suffix.lower() in READERS]
    only_txt = all(path.suffix.lower() == TXT for path in paths)
    for path in paths:
        if only_txt or path.suffix.lower() != TXT:
            by_split.setdefault(SHARD.sub("", path.stem), []).append(path)
    notes = [] if notes is None else notes
    for name in [name for name in by_split if name not in SPLIT_NAMES]:
        split = split_in(name)
        if split in SPLIT_NAMES and split not in by_split:
            by_split[split] = by_split.pop(name)
            notes.append(f"{by_split[split][0].name} is read as the {SPLIT_NAMES[split]} split")
    if not by_split or (SPLIT_NAMES.keys().isdisjoint(by_split) and any((folder / n).exists() for n in SAVED_TO_DISK)):
        raise UserError(_no_files_message(folder))
    unread = datasets.Dataset.from_dict({})
    return {
        name: _read_shards(folder, name, paths, notes) if name in SPLIT_NAMES else unread
        for name, paths in by_split.items()
    }


def _no_files_message(folder: Path) -> str:
    inside = list_folder(folder)
    if any((folder / name).exists() for name in SAVED_TO_DISK):
        return f"{folder} was written by save_to_disk: write its splits with to_parquet instead, as train.parquet"
    for path in inside:
        if path.is_dir() and any(file.suffix.lower() in READERS for file in list_folder(path)):
            return f"no parquet, CSV or JSON file in folder {folder}, but in {path}: pass that folder"
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    return (
        f"no parquet, CSV or JSON file in folder {folder}, which holds {names}: put train.parquet (or .csv, .tsv, "
        ".jsonl) there"
    )


def _read_shards(folder: Path, name: str, paths: list[Path], notes: list[str]) -> datasets.Dataset:
    shards = [SHARD.search(path.stem) for path in paths]
    if len(paths) > 1 and (len({path.suffix for path in paths}) > 1 or not all(shards)):
        raise UserError(f"several files for split {name} in {folder} ({', '.join(p.name for p in paths)}): keep one")
    numbers = sorted((int(shard[1]), int(shard[2])) for shard in shards if shard)
    if numbers and numbers != [(i, numbers[0][1]) for i in range(numbers[0][1])]:
        raise UserError(
            f"{folder} has {len(paths)} of the {numbers[0][1]} files of split {name}: add the missing files"
        )
    parts = [read_rows(path, notes) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise UserError(f"the columns of {path} and {paths[0].name} differ: use the same columns in both")
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the files of split {name} in {folder} differ in their columns ({reason_of(error)})"
        ) from None


# ---------------------------------------------------------------- the Hub


def _read_hub(dataset: str, source: str, instead: str) -> Splits:
    """All splits of `source`, owner/name[:config], from the Hub or its cache. Messages call it `dataset`."""
    source, _, revision = source.partition("@")
    name, _, config = source.partition(":")
    try:
        with offline_if_unreachable():
            return dict(datasets.load_dataset(name, config or None, **({"revision": revision} if revision else {})))
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{dataset} is neither a local folder nor a dataset on the Hub that you may read: {instead}"
        ) from None
    except ConnectionError:
        raise UserError(
            f"{dataset} is not a local folder, is not cached, and the Hub cannot be reached: {instead}"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load {dataset} from the Hub ({reason_of(error)}): check owner/name:config, or {instead}"
        ) from None


@contextmanager
def offline_if_unreachable(name: str = "") -> Iterator[None]:
    """Sends one request to the Hub, and switches its clients to offline mode if the request fails. Otherwise they
    would retry for a minute before using the cache. Sends no request if `name` is a local folder.
    """
    if name and Path(name).is_dir():
        yield
        return
    constants: Any = huggingface_hub.constants
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # depends on the HTTP client: offline mode, DNS, refused connection, timeout, proxy
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


# ---------------------------------------------------------------- split names, and the validation split


def _rename_splits(found: Splits, dataset: str, needs_train: bool, with_unlabelled: bool) -> tuple[Splits, list[str]]:
    """Renames dev, valid and val to validation, and drops splits of any other name with a note."""
    unused = [name for name in found if SPLIT_NAMES.get(name) in ((None,) if with_unlabelled else (None, UNLABELLED))]
    found = {name: rows for name, rows in found.items() if name not in unused} or found
    splits: Splits = {}
    for name, rows in found.items():
        usual = SPLIT_NAMES.get(name)
        if usual in splits:
            raise UserError(f"{dataset} has two {usual} splits ({', '.join(found)}): keep one")
        if usual:
            splits[usual] = rows
    if needs_train and "train" not in splits and UNLABELLED not in splits:
        raise UserError(f"{dataset} has no train split, only {', '.join(found)}: name one of its files train.*")
    if not splits:
        raise UserError(f"{dataset} has no known split, only {', '.join(found)}: name one of its files test.*")
    ordered = {name: splits[name] for name in dict.fromkeys(SPLIT_NAMES.values()) if name in splits}
    if empty := [name for name, rows in ordered.items() if not len(rows)]:
        raise UserError(f"the {empty[0]} split is empty: it needs at least one row")
    return ordered, [f"split {name} is not used" for name in unused]


def join_unlabelled(splits: Splits, label: str, notes: list[str]) -> Splits:
    """Moves the rows of the split `unlabelled` to the end of train, without their values in the column `label`."""
    if UNLABELLED not in splits:
        return splits
    extra = splits[UNLABELLED]
    others = {name: rows for name, rows in splits.items() if name != UNLABELLED}
    if label in extra.features:
        if extra.with_format("arrow")[:][label].null_count < len(extra):
            notes.append(f"column {label!r} of split unlabelled is not used")
        extra = extra.remove_columns(label)
    if "train" not in splits:
        return {"train": extra, **others}
    train = splits["train"]
    table, features = extra.with_format("arrow")[:], train.features
    shared = [name for name in features if name in extra.features]
    if not shared:
        raise UserError(
            f"split unlabelled has none of the columns of train, {', '.join(features)}: rename its columns"
        )
    schema = features.arrow_schema
    try:
        columns = [
            table[name].cast(schema.field(name).type)
            if name in shared
            else pa.nulls(len(extra), schema.field(name).type)
            for name in features
        ]
    except pa.ArrowException as error:
        raise UserError(
            f"the columns of split unlabelled differ in their types from those of train ({reason_of(error)}): use the "
            "same types"
        ) from None
    added = datasets.Dataset(pa.table(columns, schema=schema))
    return {**others, "train": datasets.concatenate_datasets([train, added])}


def labelled(values: np.ndarray) -> np.ndarray:
    """Mask (rows,) of class ids that are not IGNORED, or of scores or labels (rows, labels) that are not NaN."""
    found = ~np.isnan(values) if values.dtype.kind == "f" else values != IGNORED
    return found.reshape(len(values), -1).all(axis=1)


def with_validation(splits: Splits, labels: np.ndarray, notes: list[str], share: float = 0.1) -> Splits:
    """Moves rows of train to a new validation split, unless one exists. `labels` (rows,): see `choose_validation`."""
    if "train" not in splits or any(name.startswith("validation") for name in splits):
        return splits
    chosen = choose_validation(labels, notes, share)
    parts = {"train": ~chosen, "validation": chosen}
    return splits | {
        name: splits["train"].select(np.flatnonzero(rows)).flatten_indices() for name, rows in parts.items()
    }


def choose_validation(labels: np.ndarray, notes: list[str], share: float = 0.1, advice: str = "") -> np.ndarray:
    """Mask (rows,) of the train rows that become the validation split, the same in every run. Adds a note.

    Args:
        labels: labels of train: class ids (integers), scores (floats) or equal numbers (rows,), or 0 and 1 (rows,
            labels). Rows without a label are not chosen.
        share: fraction of all rows with a label, and of each class.
        advice: another remedy for the error message if train is too small.
    """
    usable = labelled(labels)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[usable] = holdout(labels[usable], share)
    percent, those = f"{share * 100:.4g}%", "" if usable.all() else " with a label"
    if not chosen.any():
        raise UserError(
            f"no validation split, and too few training rows{those} to set {percent} of them aside, {usable.sum():,}: "
            f"add a validation split{advice}"
        )
    sampling = "stratified" if len(np.unique(labels[usable])) > 1 else "random"
    notes.append(
        f"no validation split: {chosen.sum():,} rows of train{those}, a {sampling} {percent}, were set aside, the "
        "same for every seed"
    )
    return chosen


def sample(
    rows: datasets.Dataset, most: int | None, split: str, notes: list[str], labels: np.ndarray | None = None
) -> datasets.Dataset:
    """At most `most` rows of a split, the same in every run, stratified by `labels` (rows,). Adds a note."""
    if most is None or most >= len(rows):
        return rows
    notes.append(f"{most:,} of {len(rows):,} {split} rows")
    chosen = stratified(np.zeros(len(rows)) if labels is None else labels, most / len(rows))
    return rows.select(np.flatnonzero(chosen)).flatten_indices()


def holdout(labels: np.ndarray, share: float) -> np.ndarray:
    """Mask (rows,) of a stratified `share`. With integer labels, at least one row of each class is excluded."""
    chosen = stratified(labels, share)
    if np.issubdtype(labels.dtype, np.integer):
        order = _by_label(labels)
        emptied = ~np.isin(labels, labels[~chosen])
        first_of_class = order[np.unique(labels[order], return_index=True)[1]]
        chosen[first_of_class[emptied[first_of_class]]] = False
    return chosen


def stratified(labels: np.ndarray, share: float) -> np.ndarray:
    """Mask (rows,) of a `share` of the rows, evenly spaced after sorting by label (rows,) or labels (rows, labels)."""
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[_by_label(labels)[np.diff(np.floor(np.arange(len(labels) + 1) * share + 0.5)) > 0]] = True
    return chosen


def _by_label(labels: np.ndarray) -> np.ndarray:
    """Row indices sorted by label, in a fixed random order within each label."""
    return np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(labels)), *np.atleast_2d(labels.T)))
