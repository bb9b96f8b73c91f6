"""Filling a bottleneck: its keys, once and without labels, then its values, on codes instead of inputs.

With encoder and keys frozen, the codes of an input are constants. They are computed once; from then on training the
values is an embedding bag: no encoder, no search.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.utils.devices import process

Keys = Literal["carried", "new", "random", "reused"]


class CodeDataset(torch.utils.data.Dataset):
    """Codes (codebooks,) or (positions, codebooks) of each sample, labels and sample ids (samples,), fetched a batch
    at a time; collate with `identity_collate`.
    """

    def __init__(self, codes: Sequence[Tensor], labels: Tensor, sample_ids: Tensor) -> None:
        self.codes = pad_sequence(list(codes), batch_first=True) if codes[0].dim() > 1 else torch.stack(list(codes))
        self.lengths = torch.tensor([len(c) for c in codes]) if codes[0].dim() > 1 else None
        self.labels, self.sample_ids = labels, sample_ids

    def __len__(self) -> int:
        return len(self.codes)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(rows)
        batch = {"codes": self.codes[index], "labels": self.labels[index], "sample_id": self.sample_ids[index]}
        if self.lengths is not None:
            lengths = self.lengths[index]
            longest = int(lengths.max())
            batch["codes"] = batch["codes"][:, :longest]
            batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        return batch


def set_keys(
    bottleneck: DiscreteKeyValueBottleneck,
    keys: Keys,
    source: DiscreteKeyValueBottleneck | None,
    embeddings: Tensor,
    seed: int,
) -> dict[str, float]:
    """Gives a bottleneck its keys and freezes them; returns how well they cover the embeddings (rows, hidden).

    carried: those of `source`; reused: its values and decoder as well; new: fitted to the embeddings; random: as they
    were initialised. Raises ValueError where there is nothing to take over, or what there is does not fit.
    """
    if keys in ("carried", "reused"):
        if source is None:
            raise ValueError(f"{keys} keys need a bottleneck to take them from")
        bottleneck.refuse_unfit(source, values=keys == "reused")
        bottleneck.carry_keys(source)
        if keys == "reused":
            bottleneck.load_state_dict(source.state_dict())
    if keys == "new":
        rank, world = process()
        bottleneck.fit_keys(embeddings[rank::world], seed=seed)
    bottleneck.freeze_keys()
    return bottleneck.key_statistics(embeddings)
