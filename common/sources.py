"""Raw splits from a local folder or the Hugging Face Hub, for every domain."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from common.hub import no_retries_when_unreachable
from common.utils.errors import UserError

SPLIT_NAMES = {name: name for name in ("train", "validation", "validation_matched", "validation_mismatched", "test")}
SPLIT_NAMES |= {name: "validation" for name in ("valid", "dev", "val")}
SHARD = re.compile(r"-\d+-of-\d+$")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

Splits = dict[str, datasets.Dataset]


def usual_names(found: Splits, dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """Renames dev, valid, val to validation; a split with another name is not used, and a note says so.

    needs_train: False for a dataset that a model is only measured on: any split will do.
    """
    splits: Splits = {}
    for name, rows in found.items():
        usual = SPLIT_NAMES.get(name)
        if usual in splits:
            raise UserError(f"{dataset} has two {usual} splits ({', '.join(found)}): keep one")
        if usual:
            splits[usual] = rows
    if "train" not in splits and (needs_train or not splits):
        raise UserError(f"{dataset} has no train split, only {', '.join(found)}: name one of its files train.*")
    ordered = {name: splits[name] for name in SPLIT_NAMES if name in splits}
    return ordered, [f"split {name} is not used" for name in found if name not in SPLIT_NAMES]


def read_folder(folder: Path) -> Splits:
    """One file per split, or shards such as train-00000-of-00002.parquet."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not files:
        raise UserError(f"no parquet, CSV or JSON file in folder {folder}: put train.parquet (or .csv, .jsonl) there")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(SHARD.sub("", path.stem), []).append(path)
    for name, paths in by_split.items():
        if len(paths) > 1 and (len({p.suffix for p in paths}) > 1 or not all(SHARD.search(p.stem) for p in paths)):
            raise UserError(
                f"several files for split {name} in {folder} ({', '.join(p.name for p in paths)}): keep one"
            )
    return {name: _read(paths) for name, paths in by_split.items()}


def _read(paths: list[Path]) -> datasets.Dataset:
    try:
        return datasets.concatenate_datasets([datasets.Dataset(READERS[path.suffix](path)) for path in paths])
    except (pa.ArrowException, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot read {paths[0]} ({reason}): give {paths[0].suffix[1:]} rows of the same columns"
        ) from None


def _read_json(path: Path) -> pa.Table:
    """Either one list of objects or one object per line."""
    text = path.read_text(encoding="utf-8")
    listed = text.lstrip().startswith("[")
    return pa.Table.from_pylist(json.loads(text) if listed else [json.loads(x) for x in text.split("\n") if x.strip()])


def _read_csv(path: Path) -> pa.Table:
    return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))


# Read without datasets' own cache, which would copy every file to disk.
READERS = {".parquet": pyarrow.parquet.read_table, ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json}


def short_name(dataset: str) -> str:
    """What a report calls a dataset: the last part of a folder's path, or the name itself."""
    return Path(dataset).resolve().name if Path(dataset).is_dir() else dataset


def read_named(
    dataset: str,
    others: str,
    instead: str,
    read: Callable[[Path], Splits] = read_folder,
    needs_train: bool = True,
) -> tuple[Splits, list[str]]:
    """The splits of a local folder, by `read`, or of a Hub name owner/name[:config], by their usual names, and notes
    on what was left out. `others` is what else a user may name, `instead` what to pass where the Hub has none.
    """
    if Path(dataset).is_dir():
        return usual_names(read(Path(dataset)), dataset, needs_train)
    if HUB_NAME.fullmatch(dataset) and not Path(dataset).exists():
        name, _, config = dataset.partition(":")
        return usual_names(read_hub(dataset, name, config or None, instead), dataset, needs_train)
    raise UserError(
        f"unknown dataset {dataset!r}: give {others}, or a Hub name such as owner/name or owner/name:config"
    )


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
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {wanted} from the Hub ({reason}): check owner/name:config, or {instead}"
        ) from None
