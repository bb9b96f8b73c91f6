"""Cached outputs of a frozen teacher: computed once, stored as memory-mapped Arrow columns, read by sample id.

The outputs of a frozen teacher are the same for every epoch, student and seed. Rows are found by sample id, never by
position, so that shuffling, resuming or another batch size cannot pair a sample with the outputs of another. The
columns are written in shards, each with checksums: a process that was killed continues after its last whole shard, and
a damaged one is computed again. Only the rows of a batch are read into memory, whatever the size of the dataset.
"""

import logging
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
from kd.common.training.batching import column_array, similar_length_order
from kd.common.training.inference import Collate, run_inference
from kd.common.utils.files import CHECKSUMS, find_damage, writing_folder

logger = logging.getLogger(__name__)

SHARD_BATCHES = 32  # in a shard, which is what a killed process computes again
SHARD_FILE = "outputs.arrow"  # read by datasets.Dataset.from_file
Column = Any  # anything with a length and a tensor per row: Tensor, list or _ArrowColumn


class TeacherOutputs:
    """Logits and named features by sample id.

    Args:
        sample_ids: (samples,) distinct integers.
        logits: (samples, classes), or None.
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
        """Outputs of these samples, features padded with zeros to `positions` (batch, positions, width).

        Raises KeyError for a sample that is not in the cache.
        """
        rows = self._rows_of(sample_ids.cpu())
        features = {name: _padded(_take(column, rows), positions).to(device) for name, column in self.features.items()}
        logits = None if self.logits is None else _stacked(self.logits, rows).to(device)
        return Outputs(logits=logits, features=features)

    def feature(self, name: str, sample_ids: Tensor) -> list[Tensor]:
        """One feature of these samples, without padding."""
        return _take(self.features[name], self._rows_of(sample_ids))

    def _rows_of(self, ids: Tensor) -> list[int]:
        places = torch.searchsorted(self._sorted_ids, ids).clamp(max=len(self._sorted_ids) - 1)
        unknown = ids[self._sorted_ids[places] != ids]
        if len(unknown):
            raise KeyError(f"no teacher outputs for sample {unknown[0].item()}")
        rows: list[int] = self._order[places].tolist()
        return rows


class JoinedOutputs(TeacherOutputs):
    """Several caches as one: the `mean_logits` of their teachers, and the features of all of them."""

    def __init__(self, caches: Sequence[TeacherOutputs]) -> None:
        self.caches = caches

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        found = [cache.batch(sample_ids, positions, device) for cache in self.caches]
        features = {name: feature for outputs in found for name, feature in (outputs.features or {}).items()}
        return Outputs(logits=mean_logits(found), features=features)


def _take(column: Column, rows: list[int]) -> list[Tensor]:
    taken = column.take(rows) if isinstance(column, _ArrowColumn) else [column[row] for row in rows]
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in taken})
    return [tensor.to(dtype) for tensor in taken]


def _stacked(column: Column, rows: list[int]) -> Tensor:
    return column[rows] if isinstance(column, Tensor) else torch.stack(_take(column, rows))


def _padded(rows: list[Tensor], positions: int | None) -> Tensor:
    if rows[0].dim() == 1:
        return torch.stack(rows)
    padded = pad_sequence(rows, batch_first=True)
    missing = (positions or padded.shape[1]) - padded.shape[1]
    return nn.functional.pad(padded, (0, 0, 0, missing))


# ---- computing and storing ----


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

    `features` are outputs of submodules, {name: path}, recorded by the same hooks as those of a live teacher, and kept
    in fp16 unless a value is out of its range. The cache belongs to the teacher's weights, the model inputs in
    `dataset`, and the arguments. See `cache_outputs`.
    """
    paths = dict(features or {})

    def call(**batch: Any) -> dict[str, Tensor]:
        found = teacher(**batch)
        outputs = {name: _half_precision(feature) for name, feature in hooks.take().items()}
        return outputs | ({"logits": found.logits.float()} if logits else {})

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
) -> TeacherOutputs:
    """The outputs of `call`, as in `run_inference`, stored in `folder` under a key for all that decides them.

    Computes and stores shard by shard those that are missing, damaged or of another key. Several processes share the
    work; the first one writes. An output named `logits` becomes the logits, any other a feature.
    """
    order = similar_length_order(dataset)
    shards = [rows.tolist() for rows in order.split(SHARD_BATCHES * batch_size)]
    folders = [Path(folder) / key[:20] / f"{number:05}" for number in range(len(shards))]
    ids = torch.from_numpy(column_array(dataset, "sample_id"))
    is_main = PartialState().is_main_process
    missing = [n for n, path in enumerate(folders) if not _is_whole(path, key, ids[shards[n]])] if is_main else []
    missing = broadcast_object_list([missing])[0]  # one decision for all processes
    for number in tqdm(missing, desc="teacher", disable=not (is_main and missing), leave=False):
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


def _half_precision(states: Tensor) -> Tensor:
    """In fp16, unless a value is out of its range, as single ones of large models are."""
    half = states.half()
    return half if half.isfinite().all() else states.float()


def _is_whole(folder: Path, key: str, sample_ids: Tensor) -> bool:
    if not folder.exists():
        return False
    damage = find_damage(folder)
    if damage is None:
        table = _read(folder)
        is_ours = (table.schema.metadata or {}).get(b"key") == key.encode()
        if is_ours and np.array_equal(table["sample_id"].to_numpy(), sample_ids):
            return True
        damage = f"{folder} belongs to something else"
    logger.warning("teacher outputs: %s; computing them anew", damage)
    return False


def _write(folder: Path, key: str, outputs: dict[str, list[Tensor]]) -> None:
    table = pa.table({name: _arrow_array(rows) for name, rows in outputs.items()}, metadata={"key": key})
    for name in (SHARD_FILE, CHECKSUMS):  # of a shard that is damaged
        (folder / name).unlink(missing_ok=True)
    with writing_folder(folder) as partial, pa.ipc.new_stream(str(partial / SHARD_FILE), table.schema) as writer:
        writer.write_table(table)


def _read(folder: Path) -> pa.Table:
    with pa.memory_map(str(folder / SHARD_FILE)) as file:  # the table keeps the mapping, not the open file
        return pa.ipc.open_stream(file).read_all()


def _arrow_array(rows: list[Tensor]) -> pa.Array:
    """Numbers as they are, vectors of one size as fixed-size lists, anything else as lists of positions."""
    if len({row.shape for row in rows}) == 1 and rows[0].dim() < 2:
        return _fixed_size(torch.stack(rows))
    offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, _fixed_size(torch.cat(rows)))


def _fixed_size(values: Tensor) -> pa.Array:
    flat = pa.array(values.flatten().numpy())
    return flat if values.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


class _ArrowColumn:
    """A column of all shards, one tensor per row. Only the rows that are taken are read into memory."""

    def __init__(self, shards: Sequence[pa.ChunkedArray]) -> None:
        self.shards = [_numpy(shard.chunk(0)) for shard in shards]
        self.starts = np.cumsum([0, *map(len, shards)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Sequence[int]) -> list[Tensor]:
        found = []
        for row in rows:
            shard = bisect_right(self.starts, row) - 1
            (values, offsets), place = self.shards[shard], row - self.starts[shard]
            part = values[place] if offsets is None else values[offsets[place] : offsets[place + 1]]
            found.append(torch.tensor(part))
        return found


def _numpy(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of an array without a copy; of lists of positions also the offsets of the rows."""
    is_list = pa.types.is_large_list(array.type)
    values = array.values if is_list else array
    width = values.type.list_size if pa.types.is_fixed_size_list(values.type) else 0
    numbers = values.flatten().to_numpy().reshape(-1, width) if width else values.to_numpy()
    return numbers, array.offsets.to_numpy() if is_list else None
