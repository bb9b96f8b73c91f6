"""Filling a bottleneck: its keys, once and without labels, then its values, on codes instead of texts.

With encoder and keys frozen, the codes of a text are constants. They are computed once; from then on training the
values is an embedding bag: no encoder, no search.
"""

from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.inference import Collate, over_dataset
from common.utils.devices import process
from nlp.student_model.bottleneck_classifier import BottleneckClassifier

Keys = Literal["carried", "new", "random", "reused"]
FIT_TEXTS = 20_000  # with `tokens` pooling, keys are fitted on the positions of at most so many texts


class CodeDataset(torch.utils.data.Dataset):
    """Codes, labels and sample ids as tensors, fetched a batch at a time; collate with `as_it_is`."""

    def __init__(self, codes: list[Tensor], tokens: Dataset) -> None:
        self.codes = pad_sequence(codes, batch_first=True) if codes[0].dim() > 1 else torch.stack(codes)
        self.lengths = torch.tensor([len(c) for c in codes]) if codes[0].dim() > 1 else None
        self.labels, self.sample_ids = torch.tensor(tokens["labels"]), torch.tensor(tokens["sample_id"])

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

    def select(self, rows: Tensor) -> "CodeDataset":
        """A view of some rows."""
        part = CodeDataset.__new__(CodeDataset)
        part.codes, part.labels, part.sample_ids = self.codes[rows], self.labels[rows], self.sample_ids[rows]
        part.lengths = None if self.lengths is None else self.lengths[rows]
        return part


def as_it_is(batch: Any) -> Any:
    """The collator of a dataset that yields whole batches."""
    return batch


def prepare_keys(
    model: BottleneckClassifier,
    keys: Keys,
    source: BottleneckClassifier | None,
    texts: Dataset,
    collate: Collate,
    precision: str,
    seed: int,
) -> dict[str, float]:
    """Gives the bottleneck its keys and freezes them; returns how well they cover the training texts.

    carried: those of `source`; reused: its keys, values and decoder; new: fitted on this encoder's embeddings;
    random: as initialised.
    """
    if keys in ("carried", "reused"):
        if source is None:
            raise ValueError(f"{keys} keys need a model to take them from")
        model.bottleneck.carry_keys(source.bottleneck)
    if keys == "reused" and source is not None:
        model.bottleneck.load_state_dict(source.bottleneck.state_dict())
    if model.config.pooling == "tokens" and len(texts) > FIT_TEXTS:
        texts = texts.shuffle(seed=seed).select(range(FIT_TEXTS))
    said = over_dataset(
        model, lambda **b: {"embedding": model.embed(**b)}, texts, collate, precision, description="embedding"
    )["embedding"]
    embeddings = torch.cat(said) if model.config.pooling == "tokens" else torch.stack(said)
    if keys == "new":
        rank, world = process()
        model.bottleneck.fit_keys(embeddings[rank::world].to(model.device), seed=seed)
    model.bottleneck.freeze_keys()
    return model.bottleneck.key_statistics(embeddings.to(model.device))


def encode_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> CodeDataset:
    """The codes of all texts under the frozen encoder and keys."""

    def codes(**batch: Tensor) -> dict[str, Tensor]:
        return {"codes": model.bottleneck.encode(model.embed(**batch)).to(torch.uint16)}

    return CodeDataset(over_dataset(model, codes, texts, collate, precision, description="encoding")["codes"], texts)
