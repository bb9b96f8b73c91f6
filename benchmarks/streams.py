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
`--study keys` varies them: their number, how many are selected, and what they are fitted to.

Measures on test, after the last group: the mean of the accuracies of the groups, and forgetting, the mean over the
earlier groups of the best accuracy of the group after any earlier group minus the last one.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from heads import Head, Rows
from stream_data import Stream, forgetting
from stream_heads import COUNTED, LEARNERS, LINEAR_DECODER, PROBE, TRAINED, Learner, Sizes
from stream_keys import Keys, bottleneck_with, nearest
from stream_table import table_of
from tqdm.auto import tqdm

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import Parser, run
from kd.common.utils.files import write_text

EPOCHS, JOINT_BATCH = 5, 256  # of joint training
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
    parser.add_argument("--study", choices=["heads", "keys"], default="heads", help="What is compared.")
    parser.add_argument("--foreign", help="Dataset to whose texts --study keys fits keys, too.")
    parser.add_argument("--codebooks", type=int, default=32, help="Number of codebooks.")
    parser.add_argument("--codebook_size", type=int, default=512, help="Number of keys of a codebook.")
    parser.add_argument("--key_dim", type=int, default=12, help="Width of a key.")
    parser.add_argument("--cache", default="runs/benchmark/streams", help="Folder of the embeddings.")
    parser.add_argument("--output", default="streams.json", help="File of all figures; .md holds the table.")
    args = parser.parse_args()
    records, settings = list[dict[str, Any]](), Settings()
    for seed in tqdm(range(args.orders), desc="orders"):
        order = Order(args, seed)
        for keys, learner in tqdm(list(compared(args)), desc="heads", leave=False):
            records.append(order.record(keys, learner, settings))
    table = table_of(records)
    for record in records:
        record.pop("right")
    write_text(args.output, json.dumps({"arguments": vars(args), "records": records}, indent=1))
    write_text(args.output.removesuffix(".json") + ".md", table + "\n")
    print(table)


def compared(args: Namespace) -> Iterator[tuple[Keys, Learner]]:
    usual = Keys(args.codebook_size)
    if args.study == "heads":
        yield from ((usual, learner) for learner in LEARNERS)
        return
    by_name = {learner.name: learner for learner in LEARNERS}
    yield usual, by_name[PROBE]
    sources = ["first group", *(["foreign"] if args.foreign else []), "random"]
    changes: list[dict[str, Any]] = [{}, {"selected": 4}, *({"source": source} for source in sources)]
    changes += [{"size": args.codebook_size // 8}, {"size": args.codebook_size * 8}]
    for change in changes:
        yield from ((replace(usual, **change), by_name[name]) for name in (COUNTED, TRAINED, LINEAR_DECODER))


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

    def record(self, keys: Keys, learner: Learner, settings: Settings) -> dict[str, Any]:
        """The figures of a head. Chooses its setting, unless `settings` has it from an earlier order."""
        stream, (bottleneck, rows) = self.stream, self.prepare(keys)
        sizes = Sizes(bottleneck, rows["train"].embeddings.shape[1], stream.classes, len(rows["train"]))
        if (keys, learner.name) not in settings:
            settings[keys, learner.name] = self.choose(learner, sizes)
        setting, matrix = settings[keys, learner.name], list[list[float]]()
        for head, place in self.after_groups(learner, sizes, setting):
            right = stream.right(head.predict(rows["test"]), "test", place)
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

    def choose(self, learner: Learner, sizes: Sizes) -> float | None:
        """The best setting on validation: of every second one, then of that and its neighbours."""
        score = cache(lambda place: self.on_validation(learner, sizes, learner.grid[place]))
        best = max(range(0, len(learner.grid), 2), key=score)
        around = range(max(0, best - 1), min(len(learner.grid), best + 2))
        return learner.grid[max(around, key=score)]

    def on_validation(self, learner: Learner, sizes: Sizes, setting: float | None) -> float:
        *_, (head, place) = self.after_groups(learner, sizes, setting)
        right = self.stream.right(head.predict(self.prepared[2]["validation"]), "validation", place)
        return sum(self.stream.accuracies(right, "validation")) / self.stream.groups

    def after_groups(self, learner: Learner, sizes: Sizes, setting: float | None) -> Iterator[tuple[Head, int]]:
        """The head after each group, and the place of that group; once, at the end, for joint training."""
        torch.manual_seed(self.stream.seed)
        head, rows = learner.head(sizes, setting), self.prepared[2]["train"]
        if learner.joint:
            for _ in range(EPOCHS):
                for part in torch.randperm(len(rows)).split(JOINT_BATCH):
                    head.fit(rows[part])
            yield head, self.stream.groups - 1
            return
        for place, group in enumerate(self.stream.training_rows()):
            for part in [group] if head.in_any_order else group.split(self.args.batch_size):
                head.fit(rows[part])
            yield head, place


if __name__ == "__main__":
    run(main)
