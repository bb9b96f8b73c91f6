"""Models with a bottleneck after a frozen encoder, and their training: keys without labels, values on cached codes.

With encoder and keys frozen, the codes of an input are constant. They are computed once. Training the values then
takes an embedding bag per step, without encoder and key search.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import pack, rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from kd.common.bottleneck.module import STATISTICS, DiscreteKeyValueBottleneck
from kd.common.bottleneck.stored_codes import Tensors, pack_codes, stored_tensors, unpack_codes
from kd.common.data.fingerprints import outputs_key
from kd.common.training.arguments import Keys
from kd.common.training.inference import Collate, identity_collate, run_inference
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.devices import best_device, process


class FrozenEncoderConfig(PreTrainedConfig):
    """Configuration of a frozen encoder and of the bottleneck after it.

    bottleneck: arguments of `DiscreteKeyValueBottleneck`, except width and number of outputs.
    """

    sub_configs = {"encoder_config": AutoConfig}
    encoder_config: Any = None
    bottleneck: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)


class FrozenEncoderModel(PreTrainedModel):
    """Base class of models that ship with their encoder: frozen encoder -> embedding -> bottleneck or another head.

    The encoder is trained beforehand, on labels or to match a teacher. It is frozen because the keys are only valid
    while the embeddings do not change.
    """

    encoder: Any  # a frozen module, or None if the inputs are the embeddings

    def train(self, mode: bool = True) -> Any:
        """Keeps the encoder frozen and in eval mode: dropout or batch statistics would change the embeddings."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval().requires_grad_(False)
        return self

    def copy_encoder(self, encoder: nn.Module, without: str) -> None:
        """Copies the weights of an encoder, except those of its submodule `without`."""
        weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith(f"{without}.")}
        self.encoder.load_state_dict(weights)


class CodeDataset(torch.utils.data.Dataset):
    """Codes (codebooks,) or (positions, codebooks) of each sample, labels and sample ids (samples,). Returns whole
    batches; collate with `identity_collate`.
    """

    def __init__(self, codes: Sequence[Tensor], labels: Tensor, sample_ids: Tensor) -> None:
        self.codes = pad_sequence(list(codes), batch_first=True) if codes[0].dim() > 1 else torch.stack(list(codes))
        self.lengths = torch.tensor([len(c) for c in codes]) if codes[0].dim() > 1 else None
        self.labels, self.sample_ids = labels, sample_ids

    def __len__(self) -> int:
        return len(self.codes)

    def with_labels(self, labels: Tensor) -> "CodeDataset":
        """The same samples with other labels (samples,)."""
        changed = copy.copy(self)
        changed.labels = labels
        return changed

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(rows)
        batch = {"codes": self.codes[index], "labels": self.labels[index], "sample_id": self.sample_ids[index]}
        if self.lengths is not None:
            lengths = self.lengths[index]
            longest = int(lengths.max())
            batch["codes"] = batch["codes"][:, :longest]
            batch["attention_mask"] = (torch.arange(longest) < rearrange(lengths, "batch -> batch 1")).long()
        return batch


def add_samples(bottleneck: DiscreteKeyValueBottleneck, samples: CodeDataset, batch_size: int = 4096) -> None:
    """Adds samples with labels to the counted values of a bottleneck."""
    device = bottleneck.keys.device
    for rows in torch.arange(len(samples)).split(batch_size):
        batch = {name: part.to(device) for name, part in samples.__getitems__(rows.tolist()).items()}
        bottleneck.add(batch["codes"], batch["labels"], batch.get("attention_mask"))


@dataclass(frozen=True)
class Samples:
    """The rows of a split as a dataset for the encoder, and their labels and sample ids (samples,).

    fingerprint: of the inputs of the encoder.
    """

    rows: Any
    collate: Collate
    labels: Tensor
    sample_ids: Tensor
    fingerprint: str


def set_keys(
    bottleneck: DiscreteKeyValueBottleneck,
    keys: Keys,
    source: DiscreteKeyValueBottleneck | None,
    embeddings: Tensor,
    seed: int,
) -> dict[str, float]:
    """Sets the keys of a bottleneck and freezes them. Returns their `key_statistics` on the embeddings (rows, dim).

    carried: copied from `source`; reused: copied with values and decoder; new: fitted to the embeddings; random: left
    as initialized. Raises ValueError if carried or reused keys have no `source`, or one of another shape.
    """
    if keys in ("carried", "reused"):
        if source is None:
            raise ValueError(f"{keys} keys need a source bottleneck")
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
    overrides: dict[str, Any],
    train: Samples,
    validation: Samples | None = None,
    key_rows: Any = None,
    batch_size: int = 64,
    **trainer: Any,
) -> Any:
    """Sets the keys, then (unless they are `reused`) trains the values on cached codes, or counts labels at each key.
    Keys and codes are stored in the folder `codes` of the run.

    Args:
        model: a PreTrainedModel with `embed(**inputs)`, an untrained `bottleneck`, and a forward that accepts `codes`.
        keys, source: as in `set_keys`, which raises ValueError.
        overrides: training arguments of the stage that differ from those of the run.
        key_rows: samples to which new keys are fitted. Default: all rows of `train`.
        batch_size: samples per batch of the encoder.
        trainer: further arguments of KDTrainer.

    Raises UserError if the folder `codes` is damaged or has other codes.
    """
    model.to(best_device()).eval()  # freezes the encoder, also if its codes are stored
    bottleneck: DiscreteKeyValueBottleneck = model.bottleneck
    counted = bottleneck.label_counts is not None
    precision = "fp32" if counted else run.args.precision  # an example is forgotten by its codes, without rounding
    splits = {} if keys == "reused" else {"train": train}
    if validation is not None and splits and not counted:
        splits["validation"] = validation
    key_rows = train.rows if key_rows is None else key_rows

    def compute() -> Tensors:
        embeddings = embed_samples(model, key_rows, train.collate, precision, batch_size)
        vectors = pack(embeddings, "* d")[0].to(model.device)
        statistics = set_keys(bottleneck, keys, source, vectors, run.args.seed)
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}
        found |= bottleneck.state_dict()
        for split, samples in splits.items():
            if samples.rows is key_rows and embeddings[0].dim() == 1:
                codes = list(bottleneck.encode(vectors).to(torch.uint16).cpu())
            else:
                codes = encode_samples(model, samples.rows, samples.collate, precision, batch_size)
            found |= pack_codes(split, codes)
        return found

    determines = {
        "keys": [keys, None if source is None else outputs_key(source), len(key_rows), run.args.seed, precision],
        "data": [train.fingerprint, *(samples.fingerprint for samples in splits.values())],
    }
    found = stored_tensors(run.folder / "codes" / stage, outputs_key(model, determines), compute)
    model.config.key_statistics = {name: found[name].item() for name in STATISTICS}
    bottleneck.load_state_dict({name: found[name] for name in bottleneck.state_dict()})
    if keys == "reused":
        return model
    datasets = {
        split: CodeDataset(unpack_codes(split, found), samples.labels, samples.sample_ids)
        for split, samples in splits.items()
    }
    if counted:
        add_samples(bottleneck, datasets["train"])
        return model
    return run.train(
        stage,
        model,
        overrides,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("validation"),
        data_collator=identity_collate,
        **trainer,
    )
