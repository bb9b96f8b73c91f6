"""Learns from a stream of groups of classes, domains or datasets, one pass, with heads on a frozen encoder.

    python benchmarks/streams.py --dataset clinc_oos --without oos --encoder sentence-transformers/all-MiniLM-L6-v2
    python benchmarks/streams.py --dataset cifar100 --kind images --encoder resnet56-cifar10.pt
    python benchmarks/streams.py --dataset clinc_oos --without oos --encoder NAME --domains domains.json --groups 5
    python benchmarks/streams.py --dataset clinc_oos TREC SST5 --label_column intent coarse_label label --encoder NAME

The first two are class-incremental: the groups of classes arrive one after another. With --domains the label is the
domain of the class, and each group has other classes of every domain. Several datasets are task-incremental:
one dataset after another, and predictions are restricted to the classes of the text's dataset. A head sees every
example once, in small batches, and no boundary between groups; only replay stores examples. Predictions are
restricted to classes seen so far. Each order has other groups, keys and shuffles.

A head's setting, its learning rate or ridge, is chosen by the accuracy on validation at the end of the first order's
stream, and kept for all orders: of seven powers of ten, then of the best one and the halves of a decade next to it.
Joint training takes several epochs on shuffled examples.
Keys are fitted to the embeddings of all training examples, without labels, before the stream begins.
`--study keys` varies them: their number, how many are selected, and what they are fitted to. `--study carried`
compares those of a teacher with new ones, for a student's encoder that was aligned with the teacher's. `--study
encoder` trains the encoder of texts, too, with AdamW; its learning rate is chosen on a third of the stream.

Measures on test, after the last group: the mean of the accuracies of the groups, and forgetting, the mean over the
earlier groups of the best accuracy of the group after any earlier group minus the last one.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from heads import Head, Rows
from stream_data import Stream, forgetting, load
from stream_encoder import TUNED_ENCODERS, token_ids
from stream_heads import COUNTED, LEARNERS, LINEAR_DECODER, PROBE, TRAINED, Learner, Sizes
from stream_keys import Keys, bottleneck_with, nearest
from stream_table import table_of
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import Parser, run
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text

EPOCHS, JOINT_BATCH = 5, 256  # of joint training
SEARCHED = 3  # the setting of an encoder is chosen on every third example
Settings = dict[tuple[Keys, str], float | None]  # of keys and the name of a head


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", nargs="+", required=True, help="Embedded dataset, Hub name, folder or file.")
    parser.add_argument("--label_column", nargs="+", default=[], help="Of each dataset (default: inferred).")
    parser.add_argument("--without", nargs="+", default=[], help="Classes that are left out.")
    parser.add_argument("--kind", choices=["texts", "images"], default="texts", help="What the datasets have.")
    parser.add_argument("--encoder", help="Texts: Hub name or folder. Images: a classifier, or a .pt file.")
    parser.add_argument("--tune_encoder", action="store_true", help="Fine-tune it on the first group's classes.")
    parser.add_argument("--images", type=int, default=50_000, help="Maximum number of images of each split.")
    parser.add_argument("--groups", type=int, default=10, help="Number of groups of classes.")
    parser.add_argument("--domains", help="JSON file of class names by domain.")
    parser.add_argument("--orders", type=int, default=3, help="Number of orders of the stream.")
    parser.add_argument("--batch_size", type=int, default=32, help="Examples per step.")
    parser.add_argument(
        "--study", choices=["heads", "keys", "carried", "encoder"], default="heads", help="What is compared."
    )
    parser.add_argument("--foreign", help="Dataset to whose texts --study keys and carried fit keys, too.")
    parser.add_argument("--teacher", help="Encoder whose keys --study carried carries to --encoder.")
    parser.add_argument("--codebooks", type=int, default=32, help="Number of codebooks.")
    parser.add_argument("--codebook_size", type=int, default=512, help="Number of keys of a codebook.")
    parser.add_argument("--key_dim", type=int, default=12, help="Width of a key.")
    parser.add_argument("--cache", default="runs/benchmark/streams", help="Folder of the embeddings.")
    parser.add_argument("--output", default="streams.json", help="File of all figures; .md holds the table.")
    args = parser.parse_args()
    if args.study == "encoder" and (args.kind != "texts" or len(args.dataset) > 1):
        raise UserError("--study encoder trains an encoder of the texts of one --dataset")
    if (args.study == "carried") != bool(args.teacher):
        raise UserError("--study carried needs --teacher NAME, and no other study uses it")
    records, settings = list[dict[str, Any]](), Settings()
    for seed in tqdm(range(args.orders), desc="orders"):
        order = Order(args, seed)
        for keys, learner in tqdm(list(comparisons(args)), desc="heads", leave=False):
            records.append(order.record(keys, learner, settings))
    table = table_of(records)
    for record in records:
        record.pop("right")
    write_text(args.output, json.dumps({"arguments": vars(args), "records": records}, indent=1))
    write_text(args.output.removesuffix(".json") + ".md", table + "\n")
    print(table)


def comparisons(args: Namespace) -> Iterator[tuple[Keys, Learner]]:
    usual = Keys(args.codebook_size)
    if args.study == "heads":
        yield from ((usual, learner) for learner in LEARNERS)
        return
    by_name = {learner.name: learner for learner in LEARNERS}
    if args.study == "encoder":
        yield from ((usual, learner) for learner in (by_name[PROBE], by_name[COUNTED], *TUNED_ENCODERS))
        return
    names = "first group", *(["foreign"] if args.foreign else []), "random"
    sources = [replace(usual, source=name) for name in names]
    if args.study == "carried":
        compared, heads = [replace(usual, source="carried"), usual, *sources], [COUNTED, TRAINED]
    else:
        sizes = [replace(usual, size=size) for size in (args.codebook_size // 8, args.codebook_size * 8)]
        compared, heads = [usual, replace(usual, selected=4), *sources, *sizes], [COUNTED, TRAINED, LINEAR_DECODER]
    yield compared[0], by_name[PROBE]
    yield from ((keys, by_name[head]) for keys in compared for head in heads)


class Order:
    """Heads that learn from one order of the groups."""

    def __init__(self, args: Namespace, seed: int) -> None:
        self.args, self.stream = args, Stream(args, seed)
        self.prepared: tuple[Keys, DiscreteKeyValueBottleneck, dict[str, Rows]] | None = None

    def prepare(self, keys: Keys) -> tuple[DiscreteKeyValueBottleneck, dict[str, Rows]]:
        """A bottleneck with these keys, and the rows of each split with their codes."""
        if self.prepared is None or self.prepared[0] != keys:
            bottleneck = bottleneck_with(keys, self.args, self.stream)
            rows = {
                split: Rows(embedded, nearest(bottleneck, embedded, keys.selected), self.stream.labels[split])
                for split, embedded in self.stream.embeddings.items()
            }
            self.prepared = keys, bottleneck, rows
        return self.prepared[1:]

    @cached_property
    def tokens(self) -> dict[str, Rows]:
        """The rows of each split with token ids in place of embeddings, and without codes."""
        splits, _, _ = load(self.args, token_ids)
        return {split: Rows(ids, ids[:, :0], self.stream.labels[split]) for split, (ids, _) in splits.items()}

    def record(self, keys: Keys, learner: Learner, settings: Settings) -> dict[str, Any]:
        """The figures of a head. Chooses its setting, unless `settings` has it from an earlier order."""
        stream, (bottleneck, rows) = self.stream, self.prepare(keys)
        train = rows["train"]
        sizes = Sizes(bottleneck, train.embeddings.shape[1], stream.classes, len(train), self.args.encoder)
        rows = self.tokens if learner.end_to_end else rows
        if (keys, learner.name) not in settings:
            settings[keys, learner.name] = self.choose(learner, sizes, rows)
        setting, matrix = settings[keys, learner.name], list[list[float]]()
        for head, place in self.after_groups(learner, sizes, setting, rows["train"]):
            right = self.right(head, rows, "test", place)
            matrix.append(stream.accuracies(right, "test"))
        return {
            "head": learner.name,
            "keys": str(keys),
            "order": stream.seed,
            "setting": setting,
            "accuracy": sum(matrix[-1]) / stream.groups,
            "forgetting": None if learner.joint else forgetting(matrix),
            "matrix": matrix,
            "right": (right * stream.weights("test") * len(right)).numpy(),
        }

    def choose(self, learner: Learner, sizes: Sizes, rows: dict[str, Rows]) -> float | None:
        """The best setting on validation: of every second one, then of that and its neighbours."""
        score = cache(lambda place: self.on_validation(learner, sizes, learner.grid[place], rows))
        best = max(range(0, len(learner.grid), 2), key=score)
        around = range(max(0, best - 1), min(len(learner.grid), best + 2))
        return learner.grid[max(around, key=score)]

    def on_validation(self, learner: Learner, sizes: Sizes, setting: float | None, rows: dict[str, Rows]) -> float:
        every = SEARCHED if learner.end_to_end else 1
        *_, (head, place) = self.after_groups(learner, sizes, setting, rows["train"], every)
        right = self.right(head, rows, "validation", place)
        return sum(self.stream.accuracies(right, "validation")) / self.stream.groups

    def right(self, head: Head, rows: dict[str, Rows], split: str, place: int) -> Tensor:
        """Whether the head's prediction of each row of the split is right, after the group at `place`."""
        return self.stream.right(lambda chosen: head.predict(rows[split][chosen]), split, place)

    def after_groups(
        self, learner: Learner, sizes: Sizes, setting: float | None, rows: Rows, every: int = 1
    ) -> Iterator[tuple[Head, int]]:
        """The head after each group, and the place of that group; once, at the end, for joint training. `every`: with
        2, it learns from every second example.
        """
        torch.manual_seed(self.stream.seed)
        head = learner.head(sizes, setting)
        if learner.joint:
            for _ in range(EPOCHS):
                for part in torch.randperm(len(rows)).split(JOINT_BATCH):
                    head.fit(rows[part])
            yield head, self.stream.groups - 1
            return
        for place, group in enumerate(self.stream.training_rows()):
            group = group[::every]
            for part in [group] if head.in_any_order else group.split(self.args.batch_size):
                head.fit(rows[part])
            yield head, place


if __name__ == "__main__":
    run(main)
