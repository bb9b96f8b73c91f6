"""Runs a frozen model over a dataset in batches of similar length, on all processes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kd.common.training.batching import similar_length_order
from kd.common.utils.devices import best_device, process

Collate = Callable[[Any], dict[str, Tensor]]
NOT_INPUTS = ("labels", "sample_id", "view", "length")


def identity_collate(batch: Any) -> Any:
    """The collator of a dataset whose `__getitems__` returns whole batches."""
    return batch


@torch.no_grad()
def run_inference(
    model: PreTrainedModel,
    call: Callable[..., dict[str, Any]],
    dataset: Any,
    collate: Collate,
    precision: str = "fp32",
    batch_size: int = 64,
    description: str = "",
    workers: int = 0,
) -> dict[str, list[Tensor]]:
    """The outputs of `call(**batch)` for each sample: {name: one CPU tensor per row of the dataset}.

    `call` is the model or a function of it; each output is a tensor (batch, ...) or a list with one tensor per sample.
    The model is moved to the device, and is in eval mode meanwhile. Tensors (batch, positions, ...) of a batch with an
    attention mask lose their padding. Columns that are no model inputs (NOT_INPUTS) are dropped. `workers` processes
    load batches ahead. Several processes share the batches, and each returns the outputs of all of them.
    """
    rank, world = process()
    device, was_training = best_device(), model.training
    model.to(device).eval()  # type: ignore[arg-type]
    batches = [rows.tolist() for rows in similar_length_order(dataset).split(batch_size)[rank::world]]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    progress = tqdm(loader, desc=description, disable=not description or rank != 0, leave=False)
    outputs: list[tuple[int, dict[str, Tensor]]] = []
    try:
        for rows, batch in zip(batches, progress, strict=True):
            batch = {name: value.to(device) for name, value in batch.items() if name not in NOT_INPUTS}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                batch_outputs = call(**batch)
            outputs += zip(rows, _split(batch_outputs, batch.get("attention_mask")), strict=True)
    finally:
        model.train(was_training)
    if world > 1:  # as arrays, because tensors of uint16 cannot be gathered
        arrays = gather_object([(row, {name: t.numpy() for name, t in found.items()}) for row, found in outputs])
        outputs = [(row, {name: torch.from_numpy(a) for name, a in found.items()}) for row, found in arrays]
    outputs.sort(key=lambda output: output[0])
    return {name: [found[name] for _, found in outputs] for name in outputs[0][1]}


def _split(outputs: dict[str, Any], mask: Tensor | None) -> list[dict[str, Tensor]]:
    """The outputs of a batch sample by sample, without padding. Copies, so that no batch stays in memory."""
    lengths: list[int] = [] if mask is None else mask.sum(1).tolist()
    columns = {}
    for name, values in outputs.items():
        rows = values.cpu() if isinstance(values, Tensor) else [row.cpu() for row in values]
        padded = lengths and isinstance(rows, Tensor) and rows.dim() > 2
        columns[name] = [row[: lengths[i]].clone() if padded else row.clone() for i, row in enumerate(rows)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
