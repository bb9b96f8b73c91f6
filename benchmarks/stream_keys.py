"""Keys of the bottlenecks of `streams.py`: their number, how many are selected, and what they are fitted to."""

from argparse import Namespace
from dataclasses import dataclass

import torch
from embeddings import Source, embeddings
from stream_data import Stream, load
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.utils.errors import UserError


@dataclass(frozen=True)
class Keys:
    """Number of keys of a codebook, how many of them are selected, and what they are fitted to.

    source: embeddings of the `stream`, of its `first group`, of another dataset (`foreign`), or of the stream by a
        teacher (`carried`); or `random`.
    """

    size: int
    selected: int = 1
    source: str = "stream"

    def __str__(self) -> str:
        return f"{self.size} keys, {self.selected} selected, {self.source}"


def bottleneck_with(keys: Keys, args: Namespace, stream: Stream) -> DiscreteKeyValueBottleneck:
    """A bottleneck whose keys are set."""
    torch.manual_seed(stream.seed)
    train, sizes = stream.embeddings["train"], (args.codebooks, keys.size)
    found = DiscreteKeyValueBottleneck(train.shape[1], stream.classes, *sizes, "projection", args.key_dim, "mean")
    if keys.source == "first group":
        train = train[stream.places["train"] == 0]
    if keys.source == "carried":
        train = load(Namespace(**vars(args) | {"encoder": args.teacher}))[0]["train"][0]
        if train.shape[1] != found.dim:
            raise UserError(f"--teacher has embeddings of width {train.shape[1]}, --encoder of width {found.dim}")
    if keys.source == "foreign":
        train = embeddings(Source("texts", args.foreign, args.encoder, 0), args.cache)[0]["train"]
    if keys.source != "random":
        found.fit_keys(train, seed=stream.seed)
    return found


def nearest(bottleneck: DiscreteKeyValueBottleneck, embedded: Tensor, selected: int) -> Tensor:
    """Codes (rows, C), or (rows, selected, C) of several nearest keys of each codebook."""
    if selected == 1:
        return bottleneck.encode(embedded)
    keys, found = bottleneck.keys, []
    for part in embedded.split(1024):
        heads = bottleneck.heads(part).transpose(0, 1)  # (C, rows, key_dim)
        distances = keys.square().sum(-1).unsqueeze(1) / 2 - heads @ keys.transpose(1, 2)
        found.append(distances.topk(selected, largest=False).indices.permute(1, 2, 0))
    return torch.cat(found)
