"""Running a model over a whole dataset without gradients: once, in batches of similar length, on all processes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kd.common.utils.devices import best_device, process

Collate = Callable[[Any], dict[str, Tensor]]
NOT_INPUTS = ("labels", "sample_id", "view", "length")


def as_it_is(batch: Any) -> Any:
    """The collator of a dataset whose `__getitems__` yields whole batches."""
    return batch


@torch.no_grad()
def over_dataset(
    model: PreTrainedModel,
    call: Callable[..., dict[str, Tensor]],
    dataset: Any,
    collate: Collate,
    precision: str = "fp32",
    batch_size: int = 64,
    description: str = "",
    workers: int = 0,
) -> dict[str, list[Tensor]]:
    """What `call(**batch)` says about each sample: {name: one tensor per row of the dataset, on the CPU}.

    The model is put on the device and in eval mode (and back in its mode); `call` is the model or a function of it.
    Tensors (batch, positions, ...) of a batch with an attention mask lose their padding. Columns that the collator
    yields but no model takes (NOT_INPUTS) are dropped. `workers`: processes that fetch batches ahead.
    """
    rank, world = process()
    device, was_training = best_device(), model.training
    model.to(device).eval()  # type: ignore[arg-type]
    order = torch.arange(len(dataset))
    if "length" in getattr(dataset, "column_names", ()):
        order = torch.as_tensor(dataset["length"]).argsort(stable=True)
    batches = [rows.tolist() for rows in order.split(batch_size)[rank::world]]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    shown = tqdm(loader, desc=description, disable=not description or rank != 0, leave=False)
    pieces: list[tuple[int, dict[str, Tensor]]] = []
    try:
        for rows, batch in zip(batches, shown, strict=True):
            batch = {name: value.to(device) for name, value in batch.items() if name not in NOT_INPUTS}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                said = call(**batch)
            pieces += zip(rows, _per_row(said, batch.get("attention_mask")), strict=True)
    finally:
        model.train(was_training)
    if world > 1:  # as arrays, because tensors of uint16 do not survive the way
        arrays = gather_object([(row, {name: t.numpy() for name, t in said.items()}) for row, said in pieces])
        pieces = [(row, {name: torch.from_numpy(a) for name, a in said.items()}) for row, said in arrays]
    pieces.sort(key=lambda piece: piece[0])
    return {name: [said[name] for _, said in pieces] for name in pieces[0][1]}


def _per_row(said: dict[str, Tensor], mask: Tensor | None) -> list[dict[str, Tensor]]:
    said = {name: tensor.cpu() for name, tensor in said.items()}
    lengths = mask.sum(1).tolist() if mask is not None else None
    return [
        {name: t[i, : lengths[i]].clone() if lengths and t.dim() > 2 else t[i].clone() for name, t in said.items()}
        for i in range(len(next(iter(said.values()))))
    ]
