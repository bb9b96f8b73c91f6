"""Raw splits from a local folder or file or the Hugging Face Hub, for every domain."""

import re
from collections.abc import Callable
from pathlib import Path

import datasets

from kd.common.data.hub import no_retries_when_unreachable
from kd.common.data.readers import READERS, read_rows, reason_of
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError

SPLIT_NAMES = {name: name for name in ("train", "validation", "validation_matched", "validation_mismatched", "test")}
SPLIT_NAMES |= {name: "validation" for name in ("valid", "dev", "val")}
SHARD = re.compile(r"-(\d+)-of-(\d+)$")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # of datasets.DatasetDict and datasets.Dataset
LONGEST_NAME = 200  # characters of a dataset's name in a message

Splits = dict[str, datasets.Dataset]


def usual_names(found: Splits, dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """Renames dev, valid, val to validation; a split with another name is not used, and a note says so. Raises
    UserError where there is no train split although `needs_train`, nothing but unknown names, or a split without rows.
    """
    splits: Splits = {}
    for name, rows in found.items():
        usual = SPLIT_NAMES.get(name)
        if usual in splits:
            raise UserError(f"{dataset} has two {usual} splits ({', '.join(found)}): keep one")
        if usual:
            splits[usual] = rows
    if needs_train and "train" not in splits:
        raise UserError(f"{dataset} has no train split, only {', '.join(found)}: name one of its files train.*")
    if not splits:
        raise UserError(f"{dataset} has no known split, only {', '.join(found)}: name one of its files test.*")
    ordered = {name: splits[name] for name in SPLIT_NAMES if name in splits}
    if empty := [name for name, rows in ordered.items() if not len(rows)]:
        raise UserError(f"the {empty[0]} split is empty: it needs at least one row")
    return ordered, [f"split {name} is not used" for name in found if name not in SPLIT_NAMES]


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, sorted. Raises UserError where that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read folder {folder} ({reason_of(error)})") from None


def read_folder(folder: Path) -> Splits:
    """One file per split, or shards such as train-00000-of-00002.parquet. A file that no split is called after is not
    read: its rows are an empty dataset.
    """
    by_split: dict[str, list[Path]] = {}
    for path in list_folder(folder):
        if path.suffix.lower() in READERS:
            by_split.setdefault(SHARD.sub("", path.stem), []).append(path)
    if not by_split or (SPLIT_NAMES.keys().isdisjoint(by_split) and any((folder / n).exists() for n in SAVED_TO_DISK)):
        raise UserError(_nothing_to_read(folder))
    unread = datasets.Dataset.from_dict({})
    return {name: _read(folder, name, paths) if name in SPLIT_NAMES else unread for name, paths in by_split.items()}


def _nothing_to_read(folder: Path) -> str:
    inside = list_folder(folder)
    if any((folder / name).exists() for name in SAVED_TO_DISK):
        return f"{folder} was written by save_to_disk: write its splits with to_parquet instead, as train.parquet"
    for path in inside:
        if path.is_dir() and any(file.suffix.lower() in READERS for file in list_folder(path)):
            return f"no parquet, CSV or JSON file in folder {folder}, but in {path}: name that folder"
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    tabs = "; a .tsv file is read once commas separate its columns" if any(p.suffix == ".tsv" for p in inside) else ""
    return (
        f"no parquet, CSV or JSON file in folder {folder}, which holds {names}: put train.parquet (or .csv, .jsonl) "
        f"there{tabs}"
    )


def _read(folder: Path, name: str, paths: list[Path]) -> datasets.Dataset:
    shards = [SHARD.search(path.stem) for path in paths]
    if len(paths) > 1 and (len({path.suffix for path in paths}) > 1 or not all(shards)):
        raise UserError(f"several files for split {name} in {folder} ({', '.join(p.name for p in paths)}): keep one")
    numbers = sorted((int(shard[1]), int(shard[2])) for shard in shards if shard)
    if numbers and numbers != [(i, numbers[0][1]) for i in range(numbers[0][1])]:
        raise UserError(
            f"{folder} has {len(paths)} of the {numbers[0][1]} files of split {name}: add those that are missing"
        )
    parts = [read_rows(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise UserError(f"{path} has other columns than {paths[0].name}: give both the same")
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the files of split {name} in {folder} differ in their columns ({reason_of(error)})"
        ) from None


def read_file(path: Path, otherwise: str) -> Splits:
    """The one split that a file holds: the one that it is called after, or else `otherwise`."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is no parquet, CSV or JSON file (.parquet, .csv, .json, .jsonl): convert it")
    name = SHARD.sub("", path.stem)
    return {name if name in SPLIT_NAMES else otherwise: read_rows(path)}


def short_name(dataset: str) -> str:
    """What a report calls a dataset: the last part of a path, or the name itself."""
    return Path(dataset).resolve().name if _exists(dataset) else dataset


def print_notes(name: str, notes: list[str]) -> None:
    """Prints what was inferred of a dataset and what of it is not used; of several processes, one does."""
    if process()[0] == 0:
        for note in notes:
            print(f"{name}: {note}")


def read_named(
    dataset: str, others: str, instead: str, read: Callable[[Path], Splits] = read_folder, needs_train: bool = True
) -> tuple[Splits, list[str]]:
    """The splits of a local folder, by `read`, of a file, or of a Hub name owner/name[:config], by their usual names,
    and notes on what was left out. `others` is what else a user may name, `instead` what to pass where the Hub has
    none. A file is called after its split, or else is train, or test where no train split is needed.
    """
    if _exists(dataset):
        path = Path(dataset)
        found = read(path) if path.is_dir() else read_file(path, "train" if needs_train else "test")
        return usual_names(found, dataset, needs_train)
    if HUB_NAME.fullmatch(dataset):
        name, _, config = dataset.partition(":")
        return usual_names(read_hub(dataset, name, config or None, instead), dataset, needs_train)
    raise UserError(
        f"unknown dataset {_shown(dataset)!r}: give {others}, or a Hub name such as owner/name or owner/name:config"
    )


def _exists(dataset: str) -> bool:
    try:
        Path(dataset).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path at all, with a NUL in it
        return False
    except OSError as error:
        raise UserError(f"cannot read {_shown(dataset)} ({reason_of(error)})") from None
    return True


def _shown(dataset: str) -> str:
    return dataset if len(dataset) <= LONGEST_NAME else dataset[:LONGEST_NAME] + "..."


def read_hub(wanted: str, name: str, config: str | None, instead: str) -> Splits:
    """All splits of a dataset on the Hub or in its local cache; `instead` tells what to pass where there is none."""
    try:
        with no_retries_when_unreachable():
            return dict(datasets.load_dataset(name, config))
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{wanted} is neither a folder here nor a dataset on the Hub that you may read: {instead}"
        ) from None
    except ConnectionError:
        raise UserError(
            f"{wanted} is no folder here, is not cached, and the Hub cannot be reached: {instead}"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load {wanted} from the Hub ({reason_of(error)}): check owner/name:config, or {instead}"
        ) from None
