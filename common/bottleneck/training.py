"""Training a bottleneck after a frozen encoder: its keys, once and without labels, then its values, on cached codes.

With encoder and keys frozen, the codes of an input are constants. They are computed once; from then on training the
values is an embedding bag, without encoder or search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import pack, rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.training.arguments import Keys
from kd.common.training.inference import Collate, identity_collate, run_inference
from kd.common.training.run import TrainerRun
from kd.common.utils.devices import best_device, process


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
            batch["attention_mask"] = (torch.arange(longest) < rearrange(lengths, "batch -> batch 1")).long()
        return batch


@dataclass(frozen=True)
class Samples:
    """The rows of a split as a dataset for the encoder, and their labels and sample ids (samples,)."""

    rows: Any
    collate: Collate
    labels: Tensor
    sample_ids: Tensor


def set_keys(
    bottleneck: DiscreteKeyValueBottleneck,
    keys: Keys,
    source: DiscreteKeyValueBottleneck | None,
    embeddings: Tensor,
    seed: int,
) -> dict[str, float]:
    """Sets the keys of a bottleneck and freezes them; returns how well they cover the embeddings (rows, dim).

    carried: copied from `source`; reused: with its values and decoder as well; new: fitted to the embeddings; random:
    as initialized. Raises ValueError without a `source` to copy from, and where its shape differs.
    """
    if keys in ("carried", "reused"):
        if source is None:
            raise ValueError(f"{keys} keys need a bottleneck to take them from")
        bottleneck.check_compatible(source, values=keys == "reused")
        bottleneck.carry_keys(source)
        if keys == "reused":
            bottleneck.load_state_dict(source.state_dict())
    if keys == "new":
        rank, world = process()
        bottleneck.fit_keys(embeddings[rank::world], seed=seed)
    bottleneck.freeze_keys()
    return bottleneck.key_statistics(embeddings)


def embed_samples(model: Any, rows: Any, collate: Collate, precision: str, batch_size: int = 64) -> list[Tensor]:
    """The frozen encoder's embedding of each sample, (width,) or (positions, width)."""

    def embed(**batch: Tensor) -> dict[str, Tensor]:
        return {"embedding": model.embed(**batch)}

    return run_inference(model, embed, rows, collate, precision, batch_size, "embedding")["embedding"]


def encode_samples(model: Any, rows: Any, collate: Collate, precision: str, batch_size: int = 64) -> list[Tensor]:
    """The codes of each sample, uint16, (codebooks,) or (positions, codebooks), under frozen encoder and keys."""

    def encode(**batch: Tensor) -> dict[str, Tensor]:
        return {"codes": model.bottleneck.encode(model.embed(**batch)).to(torch.uint16)}

    return run_inference(model, encode, rows, collate, precision, batch_size, "encoding")["codes"]


def train_bottleneck(
    run: TrainerRun,
    stage: str,
    model: Any,
    keys: Keys,
    source: DiscreteKeyValueBottleneck | None,
    settings: dict[str, Any],
    train: Samples,
    validation: Samples | None = None,
    key_rows: Any = None,
    batch_size: int = 64,
    **trainer: Any,
) -> Any:
    """Fits the keys to the encoder's embeddings, then (unless they are `reused`) trains the values on cached codes.

    `model` is a PreTrainedModel with an untrained `bottleneck` and `embed(**inputs)`, which takes `codes` instead of
    inputs. `source`: a bottleneck to take keys from; `key_rows`: the samples that keys are fitted to, if not all of
    `train`; `batch_size`: that of the encoder; `settings`: training arguments of the stage; `trainer`: further
    arguments of KDTrainer. Raises ValueError as `set_keys` does.
    """
    model.to(best_device())
    bottleneck: DiscreteKeyValueBottleneck = model.bottleneck
    precision = run.args.precision
    key_rows = train.rows if key_rows is None else key_rows
    embeddings = embed_samples(model, key_rows, train.collate, precision, batch_size)
    vectors = pack(embeddings, "* d")[0].to(model.device)
    model.config.key_statistics = set_keys(bottleneck, keys, source, vectors, run.args.seed)
    if keys == "reused":
        return model
    if key_rows is train.rows and embeddings[0].dim() == 1:
        codes = list(bottleneck.encode(vectors).to(torch.uint16).cpu())
    else:
        codes = encode_samples(model, train.rows, train.collate, precision, batch_size)

    train_dataset, eval_dataset = CodeDataset(codes, train.labels, train.sample_ids), None
    if validation is not None:
        codes = encode_samples(model, validation.rows, validation.collate, precision, batch_size)
        eval_dataset = CodeDataset(codes, validation.labels, validation.sample_ids)
    return run.train(
        stage,
        model,
        settings,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=identity_collate,
        **trainer,
    )
