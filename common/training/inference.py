"""Batches of samples of similar length: the training sampler, inference, and the attention kernel for short texts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from kd.common.utils.devices import autocast, best_device, process

Collate = Callable[[Any], dict[str, Tensor]]
NOT_INPUTS = ("labels", "sample_id", "view", "length")
SHORT = 128  # tokens; torch's fused attention kernel is faster from about 256 on


def identity_collate(batch: Any) -> Any:
    """The collator of a dataset whose `__getitems__` returns whole batches."""
    return batch


def column_array(dataset: Any, name: str) -> np.ndarray:
    """A numeric column of a `datasets.Dataset` as an array, without Python objects for its values."""
    return np.asarray(dataset.select_columns([name]).with_format("numpy")[:][name])


def similar_length_order(dataset: Any) -> Tensor:
    """Row numbers by increasing `length`, or in order for a dataset without that column."""
    if "length" not in getattr(dataset, "column_names", ()):
        return torch.arange(len(dataset))
    return torch.from_numpy(column_array(dataset, "length")).argsort(stable=True)


class LengthGroupedSampler(Sampler[int]):
    """Yields indices such that each block of `batch_size` of them has similar lengths and needs little padding.

    Shuffles all samples, sorts them inside chunks of 50 batches, then shuffles the batches. The order depends on
    (seed, epoch) and not on the global generator: a run that is resumed in mid-epoch continues with the same batches.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        chunks = torch.randperm(len(self.lengths), generator=generator).split(50 * self.batch_size)
        by_length = [chunk[self.lengths[chunk].argsort(descending=True, stable=True)] for chunk in chunks]
        batches = [batch for chunk in by_length for batch in chunk.split(self.batch_size)]
        # Short batches come last: after a short batch, every batch would mix two groups.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(full), generator=generator)
        short = [batch for batch in batches if len(batch) < self.batch_size]
        return iter(torch.cat([*(full[i] for i in order), *short]).tolist())


@torch.no_grad()
def run_inference(
    model: nn.Module,
    call: Callable[..., dict[str, Any]],
    dataset: Any,
    collate: Collate,
    precision: str = "fp32",
    batch_size: int = 64,
    description: str = "",
    workers: int = 0,
) -> dict[str, list[Tensor]]:
    """Computes the outputs of `call(**batch)` for each sample: {name: list with one CPU tensor per row}.

    The model is moved to the device and is in eval mode during the call. Several processes share the batches, and all
    of them return all outputs.

    Args:
        call: The model, or a function of it. Each output is a tensor (batch, ...) or a list with a tensor per sample.
            If the batch has an attention mask, padding is removed from outputs (batch, positions, ...).
        collate: Makes a batch of rows. Columns that are no model inputs (NOT_INPUTS) are dropped.
        description: Shown by the progress bar; without it there is no bar.
        workers: Number of processes that load batches in advance.
    """
    rank, world = process()
    device, was_training = best_device(), model.training
    model.to(device).eval()
    batches = [rows.tolist() for rows in similar_length_order(dataset).split(batch_size)[rank::world]]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    progress = tqdm(loader, description, leave=False) if description and rank == 0 else loader
    outputs: list[tuple[int, dict[str, Tensor]]] = []
    try:
        for rows, batch in zip(batches, progress, strict=True):
            batch = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
            batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            with autocast(device, precision):
                batch_outputs = call(**batch)
            outputs += zip(rows, _split(batch_outputs, batch.get("attention_mask")), strict=True)
    finally:
        model.train(was_training)
    if world > 1:  # gathers arrays, because tensors of uint16 cannot be gathered
        arrays = gather_object([(row, {name: t.numpy() for name, t in values.items()}) for row, values in outputs])
        outputs = [(row, {name: torch.from_numpy(a) for name, a in values.items()}) for row, values in arrays]
    outputs.sort(key=lambda output: output[0])
    return {name: [values[name] for _, values in outputs] for name in outputs[0][1]}


def _split(outputs: dict[str, Any], mask: Tensor | None) -> list[dict[str, Tensor]]:
    """The outputs of a batch by sample, without padding on either side, copied so that no batch stays in memory."""
    kept = None if mask is None else mask.bool().cpu()
    columns = {}
    for name, values in outputs.items():
        rows = values.cpu() if isinstance(values, Tensor) else [row.cpu() for row in values]
        if kept is not None and isinstance(rows, Tensor) and rows.dim() > 2:
            columns[name] = [row[keep] for row, keep in zip(rows, kept, strict=True)]
        else:
            columns[name] = [row.clone() for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@contextmanager
def eager_attention_on_cpu(model: nn.Module, dataset: Any, precision: str, device: str) -> Iterator[None]:
    """Uses eager attention while a transformers model trains on short texts in bf16 on a CPU. Does nothing otherwise.

    There, a forward and backward pass through torch's fused kernel takes up to seven times as long as matrix
    products and a softmax. Without gradients the fused kernel is as fast, so it is restored after training. Figures:
    benchmarks/README.md. The column `length` of `dataset` holds the number of tokens.
    """
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    is_short = "length" in getattr(dataset, "column_names", ()) and column_array(dataset, "length").max() <= SHORT
    if not (is_short and before == "sdpa" and precision == "bf16" and device == "cpu"):
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
