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
`--study keys` varies them for counted values: their number, how many are selected, and what they are fitted to.

Measures on test, after the last group: the mean of the accuracies of the groups, and forgetting, the mean over the
earlier groups of the best accuracy of the group after any earlier group minus the last one.
"""

import json
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from embeddings import Source, embeddings
from heads import Head, Rows
from stream_heads import COUNTED, LEARNERS, PROBE, Learner, Sizes
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import Parser, run
from kd.common.metrics.verdict import measure_mean, verdict_of_one_seed, verdict_over_seeds
from kd.common.reporting.tables import markdown, mean_and_deviation
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text

EPOCHS, JOINT_BATCH = 5, 256  # of joint training
Splits = dict[str, tuple[Tensor, Tensor]]  # embeddings (rows, width) and classes (rows,)


@dataclass(frozen=True)
class Keys:
    """Number of keys of a codebook, how many of them are selected, and what they are fitted to."""

    size: int
    selected: int = 1
    source: str = "stream"

    def __str__(self) -> str:
        return f"{self.size} keys, {self.selected} selected, {self.source}"


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
    records, settings = list[dict[str, Any]](), dict[str, float | None]()
    for order in tqdm(range(args.orders), desc="orders"):
        stream = Stream(args, order)
        for keys, learner in tqdm(list(compared(args)), desc="heads", leave=False):
            records.append(stream.record(keys, learner, settings))
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
    sizes = [replace(usual, size=size) for size in (args.codebook_size // 8, args.codebook_size * 8)]
    several = [replace(usual, selected=4)]
    sources = [
        replace(usual, source=source) for source in ("first group", "random", *(["foreign"] * bool(args.foreign)))
    ]
    by_name = {learner.name: learner for learner in LEARNERS}
    yield usual, by_name[PROBE]
    yield from ((keys, by_name[COUNTED]) for keys in (usual, *several, *sources, *sizes))


# ---- the stream ----


def load(args: Namespace, tuned_on: tuple[str, ...] = ()) -> tuple[Splits, list[str], Tensor]:
    """All datasets in one: splits, class names, and the dataset (classes,) of each class."""
    if args.label_column and len(args.label_column) != len(args.dataset):
        raise UserError(f"--label_column needs one name for each --dataset: {len(args.dataset)}")
    splits: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    all_names, origin = list[str](), list[int]()
    for i, (name, column) in enumerate(
        zip(args.dataset, args.label_column or [None] * len(args.dataset), strict=True)
    ):
        source = Source(args.kind, name, args.encoder, args.images, column, validation_share=0.1, tuned_on=tuned_on)
        found, names = embeddings(source, args.cache)
        kept = [label for label, class_name in enumerate(names) if class_name not in args.without]
        ids = torch.full((len(names),), -1)
        ids[kept] = torch.arange(len(kept)) + len(all_names)
        for split in ("train", "validation", "test"):
            labels = ids[found[f"{split}_labels"]]
            splits[split].append((found[split][labels >= 0], labels[labels >= 0]))
        all_names += [names[label] for label in kept]
        origin += [i] * len(kept)
    joined = {split: tuple(map(torch.cat, zip(*parts, strict=True))) for split, parts in splits.items()}
    return joined, all_names, torch.tensor(origin)  # type: ignore[return-value]


def groups_of(args: Namespace, names: list[str], origin: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """For each class: the label that is predicted, and the place in the stream of its group."""
    generator = torch.Generator().manual_seed(seed)
    label, place = torch.arange(len(names)), torch.empty(len(names), dtype=torch.long)
    if len(args.dataset) > 1:
        return label, torch.randperm(len(args.dataset), generator=generator)[origin]
    sets = [names]
    if args.domains:
        sets = list(read_json(args.domains).values())
        if sorted(sum(sets, [])) != sorted(names):
            raise UserError(f"--domains {args.domains} must have each class of {args.dataset[0]} once")
    most = min(map(len, sets))
    if not 2 <= args.groups <= most:
        raise UserError(f"--groups must be between 2 and {most}, the number of classes, got {args.groups}")
    for i, members in enumerate(sets):
        ids = torch.tensor([names.index(name) for name in members])
        if args.domains:
            label[ids] = i
        for number, part in enumerate(ids[torch.randperm(len(ids), generator=generator)].tensor_split(args.groups)):
            place[part] = number
    return label, place


class Stream:
    """One order of the groups: the rows of each split, and the place (rows,) of their groups."""

    def __init__(self, args: Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        splits, names, origin = load(args)
        label, place = groups_of(args, names, origin, seed)
        if args.tune_encoder:
            splits, _, _ = load(args, tuned_on=tuple(names[i] for i in (place == 0).nonzero().flatten()))
        self.embeddings = {split: embedded for split, (embedded, _) in splits.items()}
        self.labels = {split: label[classes] for split, (_, classes) in splits.items()}
        self.places = {split: place[classes] for split, (_, classes) in splits.items()}
        self.classes, self.groups = int(label.max()) + 1, int(place.max()) + 1
        self.allowed = torch.ones(self.groups, self.classes, dtype=torch.bool)  # predictions for each group
        if len(args.dataset) > 1:
            self.allowed = torch.zeros_like(self.allowed)
            self.allowed[place, label] = True
        self.prepared: tuple[Keys, DiscreteKeyValueBottleneck, dict[str, Rows]] | None = None

    def prepare(self, keys: Keys) -> tuple[DiscreteKeyValueBottleneck, dict[str, Rows]]:
        """A bottleneck with these keys, and the rows of each split with their codes."""
        if self.prepared is None or self.prepared[0] != keys:
            bottleneck = self.bottleneck(keys)
            rows = {
                split: Rows(embedded, nearest(bottleneck, embedded, keys.selected), self.labels[split])
                for split, embedded in self.embeddings.items()
            }
            self.prepared = keys, bottleneck, rows
        return self.prepared[1:]

    def bottleneck(self, keys: Keys) -> DiscreteKeyValueBottleneck:
        torch.manual_seed(self.seed)
        train, sizes = self.embeddings["train"], (self.args.codebooks, keys.size)
        found = DiscreteKeyValueBottleneck(
            train.shape[1], self.classes, *sizes, "projection", self.args.key_dim, "mean"
        )
        if keys.source == "first group":
            train = train[self.places["train"] == 0]
        if keys.source == "foreign":
            train = embeddings(Source("texts", self.args.foreign, self.args.encoder, 0), self.args.cache)[0]["train"]
        if keys.source != "random":
            found.fit_keys(train, seed=self.seed)
        return found

    # ---- one head ----

    def record(self, keys: Keys, learner: Learner, settings: dict[str, float | None]) -> dict[str, Any]:
        """The figures of a head. Chooses its setting, unless `settings` has it from an earlier order."""
        bottleneck, rows = self.prepare(keys)
        sizes = Sizes(bottleneck, rows["train"].embeddings.shape[1], self.classes, len(rows["train"]))
        name = learner.name if self.args.study == "heads" else f"{learner.name}: {keys}"
        if name not in settings:
            settings[name] = self.choose(learner, sizes)
        matrix = list[list[float]]()
        for head, place in self.after_groups(learner, sizes, settings[name]):
            right = self.right(head, "test", place)
            matrix.append(self.accuracies(right, "test"))
        weights = self.weights("test") * len(right)
        return {
            "head": name,
            "order": self.seed,
            "setting": settings[name],
            "accuracy": sum(matrix[-1]) / self.groups,
            "forgetting": None if learner.joint else forgetting(matrix),
            "matrix": matrix,
            "right": (right * weights).numpy(),
        }

    def choose(self, learner: Learner, sizes: Sizes) -> float | None:
        """The best setting on validation: of every second one, then of that and its neighbours."""
        score = cache(lambda place: self.on_validation(learner, sizes, learner.grid[place]))
        best = max(range(0, len(learner.grid), 2), key=score)
        around = range(max(0, best - 1), min(len(learner.grid), best + 2))
        return learner.grid[max(around, key=score)]

    def on_validation(self, learner: Learner, sizes: Sizes, setting: float | None) -> float:
        *_, (head, place) = self.after_groups(learner, sizes, setting)
        return sum(self.accuracies(self.right(head, "validation", place), "validation")) / self.groups

    def after_groups(self, learner: Learner, sizes: Sizes, setting: float | None) -> Iterator[tuple[Head, int]]:
        """The head after each group, and the place of that group; once, at the end, for joint training."""
        torch.manual_seed(self.seed)
        head, rows = learner.head(sizes, setting), self.prepared[2]["train"]
        if learner.joint:
            for _ in range(EPOCHS):
                for part in torch.randperm(len(rows)).split(JOINT_BATCH):
                    head.fit(rows[part])
            yield head, self.groups - 1
            return
        for place, group in enumerate(self.stream()):
            for part in [group] if head.in_any_order else group.split(self.args.batch_size):
                head.fit(rows[part])
            yield head, place

    def stream(self) -> Iterable[Tensor]:
        """The indices of the training rows of each group, shuffled; every row once."""
        generator = torch.Generator().manual_seed(self.seed)
        for place in range(self.groups):
            members = (self.places["train"] == place).nonzero().flatten()
            yield members[torch.randperm(len(members), generator=generator)]

    # ---- measures ----

    def right(self, head: Head, split: str, place: int) -> Tensor:
        """Whether the prediction of each row is right, among the classes seen up to the group at `place`."""
        seen = torch.zeros(self.classes, dtype=torch.bool)
        seen[self.labels["train"][self.places["train"] <= place]] = True
        rows, allowed = self.prepared[2][split], self.allowed[self.places[split]] & seen
        return head.predict(rows).masked_fill(~allowed, -torch.inf).argmax(1) == rows.labels

    def accuracies(self, right: Tensor, split: str) -> list[float]:
        """The accuracy of each group."""
        return [right[self.places[split] == place].double().mean().item() for place in range(self.groups)]

    def weights(self, split: str) -> Tensor:
        """The weight of each row in the mean of the accuracies of the groups."""
        sizes = self.places[split].bincount(minlength=self.groups)
        return 1 / (self.groups * sizes[self.places[split]]).double()


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


def forgetting(matrix: list[list[float]]) -> float:
    """The mean over all groups but the last of the best accuracy after an earlier group, minus the last one.

    matrix: for each group of the stream, the accuracies of all groups after it.
    """
    last = matrix[-1]
    lost = [max(row[place] for row in matrix[place:-1]) - last[place] for place in range(len(last) - 1)]
    return statistics.fmean(lost)


# ---- the table ----


def table_of(records: list[dict[str, Any]]) -> str:
    """Means over the orders with standard deviations; differences in points with 95 % intervals, paired by order."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["head"]].append(record)
    references = {
        word: next((g for name, g in groups.items() if name.startswith(word)), []) for word in (PROBE, COUNTED)
    }
    rows = [
        [
            name,
            mean_and_deviation([record["accuracy"] for record in group]),
            mean_and_deviation([record["forgetting"] for record in group if record["forgetting"] is not None]),
            *(difference(group, reference) for reference in references.values()),
            "–" if group[0]["setting"] is None else f"{group[0]['setting']:g}",
        ]
        for name, group in groups.items()
    ]
    header = ["head", "accuracy", "forgetting", "minus linear probe, points", "minus counted values, points"]
    return markdown([*header, "setting"], rows)


def difference(group: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """The paired difference of accuracy in points, with its interval."""
    if group is reference:
        return "–"
    verdicts = []
    for record, other in zip(group, reference, strict=True):
        scores = [measure_mean(one["right"]).score for one in (record, other)]
        verdicts.append(verdict_of_one_seed(*scores, len(record["right"])))
    verdict = verdict_over_seeds(verdicts)
    low, high = verdict["interval"]
    return f"{100 * verdict['gain']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    run(main)
