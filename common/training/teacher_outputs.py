"""Cached outputs of a frozen teacher: for a dataset (`TeacherOutputs`), or for the views of images (`TeacherViews`).

A frozen teacher's outputs are the same in every epoch, for every student and seed. They are looked up by sample id,
never by position, so shuffling, resuming or another batch size cannot assign them to another sample.

`TeacherOutputs` are computed in one pass and stored as memory-mapped Arrow columns, in shards with checksums: a killed
process continues after its last complete shard, and a damaged shard is computed again. Only the rows of a batch are
read into memory, whatever the size of the dataset.

`TeacherViews` are a table that is filled during training. If each sample has a small, fixed number of views (81 crops
x 2 flips of a small image), the first run fills the table, and later runs (of another student or seed) read it. The
file is sparse and memory-mapped: 50,000 images x 162 views x 100 classes take 1.6 GB.
"""

import json
import logging
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kd.common.data.fingerprints import dataset_hash, outputs_key
from kd.common.outputs import FeatureHooks, Outputs, mean_logits
from kd.common.training.inference import Collate, column_array, run_inference, similar_length_order
from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, find_damage, write_text, writing_folder

logger = logging.getLogger(__name__)

SHARD_BATCHES = 32  # batches in a shard; after a kill, the unfinished shard is computed again
SHARD_FILE = "outputs.arrow"  # datasets.Dataset.from_file reads it
Column = Any  # anything with a length and a tensor per row: Tensor, list or _ArrowColumn


class TeacherOutputs:
    """Logits and named features by sample id.

    Args:
        sample_ids: (samples,) distinct integers.
        logits: (samples, classes), one tensor (positions, classes) per sample, or None.
        features: {name: one tensor per sample, (positions, width) or (width,)}.
    """

    def __init__(
        self, sample_ids: Tensor, logits: Column | None = None, features: Mapping[str, Column] | None = None
    ) -> None:
        self.sample_ids, self.logits, self.features = sample_ids, logits, dict(features or {})
        self._sorted_ids, self._order = sample_ids.sort()
        if (self._sorted_ids[1:] == self._sorted_ids[:-1]).any():
            raise ValueError("sample ids must be distinct")

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        """Outputs of these samples. Features and logits of tokens are padded with zeros to (batch, positions, width).

        Raises KeyError for a sample that is not in the cache.
        """
        rows = self._rows(sample_ids.cpu())
        features = {name: _batched(column, rows, positions).to(device) for name, column in self.features.items()}
        logits = None if self.logits is None else _batched(self.logits, rows, positions).to(device)
        return Outputs(logits=logits, features=features)

    def feature(self, name: str, sample_ids: Tensor) -> list[Tensor]:
        """One feature of these samples, without padding."""
        column, rows = self.features[name], self._rows(sample_ids)
        return column.take(rows) if isinstance(column, _ArrowColumn) else [column[row] for row in rows]

    def _rows(self, ids: Tensor) -> list[int]:
        places = torch.searchsorted(self._sorted_ids, ids).clamp(max=len(self._sorted_ids) - 1)
        unknown = ids[self._sorted_ids[places] != ids]
        if len(unknown):
            raise KeyError(f"no teacher outputs for sample {unknown[0].item()}")
        rows: list[int] = self._order[places].tolist()
        return rows


class JoinedOutputs(TeacherOutputs):
    """Several caches as one: the `mean_logits` of their teachers, and the features of all of them.

    `weights`: one per cache that has logits (default: equal).
    """

    def __init__(self, caches: Sequence[TeacherOutputs], weights: Sequence[float] | None = None) -> None:
        self.caches, self.weights = caches, weights

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        outputs = [cache.batch(sample_ids, positions, device) for cache in self.caches]
        features = {name: feature for one in outputs for name, feature in (one.features or {}).items()}
        mask = next((one.mask for one in outputs if one.mask is not None), None)
        return Outputs(logits=mean_logits(outputs, self.weights), features=features, mask=mask)


def _batched(column: Column, rows: list[int], positions: int | None = None) -> Tensor:
    """Rows of a column as one tensor (batch, ...). Rows (positions, width) are padded."""
    if isinstance(column, Tensor) and column.dim() == 2:
        return column[rows]
    tensors = column.take(rows) if isinstance(column, _ArrowColumn) else [column[row] for row in rows]
    if tensors[0].dim() < 2:
        return torch.stack(tensors)
    padded = pad_sequence(tensors, batch_first=True)
    missing = (positions or padded.shape[1]) - padded.shape[1]
    return nn.functional.pad(padded, (0, 0, 0, missing))


# ---- computing and storing the outputs of a dataset ----


def cache_teacher_outputs(
    teacher: PreTrainedModel,
    dataset: Dataset,
    collate: Collate,
    folder: str | Path,
    *,
    features: Mapping[str, str] | None = None,
    logits: bool = True,
    precision: str = "fp32",
    batch_size: int = 64,
) -> TeacherOutputs:
    """Runs a teacher once over a dataset with a column `sample_id`, or reads what an earlier call stored in `folder`.

    The cache is valid for the teacher's weights, the model inputs in `dataset`, and these arguments.

    Args:
        features: {name: path of a submodule} whose outputs are stored as features, in fp16 unless a value is out of
            its range. They are recorded by the same hooks as those of a live teacher.
    """
    paths = dict(features or {})

    def call(**batch: Any) -> dict[str, Tensor]:
        model_output = teacher(**batch)
        outputs = {name: half_precision(feature) for name, feature in hooks.take().items()}
        return outputs | ({"logits": model_output.logits.float()} if logits else {})

    key = outputs_key(teacher, dataset_hash(dataset), precision, sorted(paths.items()), logits)
    hooks = FeatureHooks(teacher, paths)
    try:
        return cache_outputs(teacher, call, dataset, collate, folder, key, precision, batch_size)
    finally:
        hooks.remove()


def cache_outputs(
    model: PreTrainedModel,
    call: Callable[..., dict[str, Any]],
    dataset: Dataset,
    collate: Collate,
    folder: str | Path,
    key: str,
    precision: str = "fp32",
    batch_size: int = 64,
    shard_rows: int | None = None,
    refuse_damaged: bool = False,
) -> TeacherOutputs:
    """The outputs of `call`, as in `run_inference`, stored in `folder` under a key that identifies all inputs.

    Computes and stores the shards that are missing, damaged or of another key. Several processes share the work; the
    main process writes. An output named `logits` becomes the logits; the other outputs become features.

    Args:
        shard_rows: Number of samples in a shard. Default: those of SHARD_BATCHES batches.
        refuse_damaged: Raise UserError for a shard that is damaged or of another key, instead of computing it again.
    """
    order = similar_length_order(dataset)
    shards = [rows.tolist() for rows in order.split(shard_rows or SHARD_BATCHES * batch_size)]
    folders = [Path(folder) / key[:20] / f"{number:05}" for number in range(len(shards))]
    ids = torch.from_numpy(column_array(dataset, "sample_id"))
    is_main = PartialState().is_main_process
    missing = []
    if is_main:
        missing = [n for n, f in enumerate(folders) if not _is_complete(f, key, ids[shards[n]], refuse_damaged)]
    missing = broadcast_object_list([missing])[0]  # one decision for all processes
    for number in tqdm(missing, "teacher", leave=False) if is_main and missing else missing:
        rows = dataset.select(shards[number])
        outputs = run_inference(model, call, rows, collate, precision, batch_size)
        if is_main:
            _write(folders[number], key, {"sample_id": list(ids[shards[number]])} | outputs)
    PartialState().wait_for_everyone()
    tables = [_read(path) for path in folders]
    columns: dict[str, Column] = {
        name: _ArrowColumn([table[name] for table in tables]) for name in tables[0].column_names if name != "sample_id"
    }
    return TeacherOutputs(ids[order], columns.pop("logits", None), columns)


def half_precision(feature: Tensor) -> Tensor:
    """Converts to fp16, or to fp32 if a value is out of the range of fp16, as in some large models."""
    half = feature.half()
    return half if half.isfinite().all() else feature.float()


def _is_complete(folder: Path, key: str, sample_ids: Tensor, refuse_damaged: bool) -> bool:
    if not folder.exists():
        return False
    damage = find_damage(folder)
    if damage is None:
        table = _read(folder)
        same_key = (table.schema.metadata or {}).get(b"key") == key.encode()
        if same_key and np.array_equal(table["sample_id"].to_numpy(), sample_ids):
            return True
        damage = f"{folder} was stored for another teacher or dataset"
    if refuse_damaged:
        raise UserError(f"{damage}: remove {folder}, and it is computed again")
    logger.warning("teacher outputs: %s; computing them again", damage)
    return False


def _write(folder: Path, key: str, outputs: dict[str, list[Tensor]]) -> None:
    table = pa.table({name: _arrow_array(rows) for name, rows in outputs.items()}, metadata={"key": key})
    for name in (SHARD_FILE, CHECKSUMS):  # remove a shard that is damaged or has another key
        (folder / name).unlink(missing_ok=True)
    with writing_folder(folder) as partial, pa.ipc.new_stream(str(partial / SHARD_FILE), table.schema) as writer:
        writer.write_table(table)


def _read(folder: Path) -> pa.Table:
    with pa.memory_map(str(folder / SHARD_FILE)) as file:  # the table keeps the mapping, not the open file
        return pa.ipc.open_stream(file).read_all()


def _arrow_array(rows: list[Tensor]) -> pa.Array:
    """Scalars as numbers, vectors of one size as fixed-size lists, anything else as lists of positions."""
    if len({row.shape for row in rows}) == 1 and rows[0].dim() < 2:
        return _fixed_size(torch.stack(rows))
    offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, _fixed_size(torch.cat(rows)))


def _fixed_size(values: Tensor) -> pa.Array:
    flat = pa.array(values.flatten().numpy())
    return flat if values.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


class _ArrowColumn:
    """A column of all shards, with one tensor per row. Only the rows that are taken are read into memory."""

    def __init__(self, shards: Sequence[pa.ChunkedArray]) -> None:
        self.shards = [_numpy(shard.chunk(0)) for shard in shards]
        self.starts = np.cumsum([0, *map(len, shards)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Sequence[int]) -> list[Tensor]:
        tensors = []
        for row in rows:
            shard = bisect_right(self.starts, row) - 1
            (values, offsets), place = self.shards[shard], row - self.starts[shard]
            part = values[place] if offsets is None else values[offsets[place] : offsets[place + 1]]
            tensors.append(torch.tensor(part))
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})  # fp16 or fp32 by shard
        return [tensor.to(dtype) for tensor in tensors]


def _numpy(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of an array without a copy; for lists of positions also the offsets of the rows."""
    is_list = pa.types.is_large_list(array.type)
    values = array.values if is_list else array
    width = values.type.list_size if pa.types.is_fixed_size_list(values.type) else 0
    numbers = values.flatten().to_numpy().reshape(-1, width) if width else values.to_numpy()
    return numbers, array.offsets.to_numpy() if is_list else None


# ---- a table of all views ----


class TeacherViews:
    """Logits (samples * views, classes) in fp16 in a folder, row sample_id * views + view.

    Each row has a checksum, 0 while the row is empty. A row that does not match its checksum is computed again: it was
    damaged, truncated or never filled. Several processes may fill a table, because all write the same values.
    Computed logits are rounded to fp16 too, so training does not depend on how many rows were filled.

    Args:
        key: Identifies the teacher's weights, the data and the precision (`fingerprints.outputs_key`). Tables of other
            keys in the folder are not changed.
    """

    def __init__(self, folder: str | Path, key: str, samples: int, views: int, classes: int) -> None:
        self.views = views
        path = Path(folder) / key[:20]
        path.mkdir(parents=True, exist_ok=True)
        description = json.dumps({"samples": samples, "views": views, "classes": classes, "key": key})
        shape = path / "shape.json"  # not read by the project; it describes the folder for users
        if not shape.exists() or shape.read_bytes() != description.encode():
            write_text(shape, description)
        self._start = zlib.crc32(description.encode())  # so that rows of a table of another shape do not match
        self.logits = _table(path / "logits.f16", np.dtype(np.float16), (samples * views, classes))
        self.checksums = _table(path / "checksums.u32", np.dtype(np.uint32), (samples * views,))
        self._damage_reported = False

    def batch(self, sample_ids: Tensor, views: Tensor, compute: Callable[[Tensor], Tensor]) -> Outputs:
        """Logits (batch, classes) of views (batch,) of samples (batch,).

        `compute(rows)` returns the teacher's logits for those rows of the batch that are not in the table.
        """
        rows = (sample_ids * self.views + views).cpu().numpy()
        logits, checksums = self.logits[rows], self.checksums[rows]
        missing = np.flatnonzero(self._row_checksums(rows, logits) != checksums)
        if len(missing):
            if checksums[missing].any() and not self._damage_reported:
                logger.warning("%s is damaged: rows with a wrong checksum are computed again", self.logits.filename)
                self._damage_reported = True
            logits[missing] = compute(torch.from_numpy(missing).to(sample_ids.device)).float().cpu().numpy()
            self._write(rows[missing], logits[missing])
        return Outputs(logits=torch.from_numpy(logits).float().to(sample_ids.device))

    def _row_checksums(self, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Checksums of the logits and the number of each row, so no row matches in place of another; never 0."""
        starts = (int(row + self._start) % 2**32 for row in rows)
        checksums = (zlib.crc32(values, start) or 1 for values, start in zip(logits, starts, strict=True))
        return np.fromiter(checksums, np.uint32, len(rows))

    def _write(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """Uses ordinary writes: on a full disk, a write to mapped memory would kill the process. Checksums are written
        last, so a killed run leaves no row with a checksum and no logits.
        """
        for table, values in ((self.logits, logits), (self.checksums, self._row_checksums(rows, logits))):
            try:
                with open(str(table.filename), "r+b") as file:
                    for row, value in zip(rows, values, strict=True):
                        file.seek(int(row) * value.nbytes)
                        file.write(value.tobytes())
            except OSError as error:
                raise UserError(f"cannot write {table.filename}: {error.strerror}") from None


def _table(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Maps a file as an array. The file is extended with zeros that take no disk space; its content is kept."""
    with path.open("ab") as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, mode="r", shape=shape)
