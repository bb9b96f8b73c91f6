"""Streams of groups of classes, domains or datasets, for `streams.py`: their rows, and measures on them."""

import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from embeddings import Source, embeddings, read_domains
from torch import Tensor

from kd.common.utils.errors import UserError

Splits = dict[str, tuple[Tensor, Tensor]]  # embeddings (rows, width) and classes (rows,)
Read = Callable[[Source], tuple[dict[str, Tensor], list[str]]]  # as `embeddings`
Predict = Callable[[Tensor], Tensor]  # logits (n, classes) of some rows (n,) of a split


def load(
    args: Namespace, read: Read | None = None, tuned_on: tuple[str, ...] = ()
) -> tuple[Splits, list[str], Tensor]:
    """All datasets in one: splits, class names, and the dataset (classes,) of each class.

    read: reads other inputs than embeddings.
    """
    read = read or partial(embeddings, cache=args.cache)
    if args.label_column and len(args.label_column) != len(args.dataset):
        raise UserError(f"--label_column needs one name for each --dataset: {len(args.dataset)}")
    splits: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    all_names, origin = list[str](), list[int]()
    for i, (name, column) in enumerate(
        zip(args.dataset, args.label_column or [None] * len(args.dataset), strict=True)
    ):
        source = Source(args.kind, name, args.encoder, args.images, column, validation_share=0.1, tuned_on=tuned_on)
        found, names = read(source)
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
    sets = read_domains(args.domains, names) if args.domains else [label]
    most = min(map(len, sets))
    if not 2 <= args.groups <= most:
        raise UserError(f"--groups must be between 2 and {most}, the number of classes, got {args.groups}")
    for i, ids in enumerate(sets):
        if args.domains:
            label[ids] = i
        for number, part in enumerate(ids[torch.randperm(len(ids), generator=generator)].tensor_split(args.groups)):
            place[part] = number
    return label, place


class Stream:
    """One order of the groups: the rows of each split, and the place (rows,) of their groups."""

    def __init__(self, args: Namespace, seed: int) -> None:
        self.seed = seed
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

    def training_rows(self) -> Iterator[Tensor]:
        """The indices of the training rows of each group, shuffled; every row once."""
        generator = torch.Generator().manual_seed(self.seed)
        for place in range(self.groups):
            members = (self.places["train"] == place).nonzero().flatten()
            yield members[torch.randperm(len(members), generator=generator)]

    def right(self, predict: Predict, split: str, place: int) -> Tensor:
        """Whether the prediction of each row is right, among the classes seen up to the group at `place`. Rows of
        other classes are not predicted.
        """
        seen = torch.zeros(self.classes, dtype=torch.bool)
        seen[self.labels["train"][self.places["train"] <= place]] = True
        right = seen[self.labels[split]]
        rows = right.nonzero().flatten()
        allowed = self.allowed[self.places[split][rows]] & seen
        right[rows] = predict(rows).masked_fill(~allowed, -torch.inf).argmax(1) == self.labels[split][rows]
        return right

    def accuracies(self, right: Tensor, split: str) -> list[float]:
        """The accuracy of each group."""
        return [right[self.places[split] == place].double().mean().item() for place in range(self.groups)]

    def weights(self, split: str) -> Tensor:
        """The weight of each row in the mean of the accuracies of the groups."""
        sizes = self.places[split].bincount(minlength=self.groups)
        return 1 / (self.groups * sizes[self.places[split]]).double()


def forgetting(matrix: list[list[float]]) -> float:
    """The mean over all groups but the last of the best accuracy after an earlier group, minus the last one.

    matrix: for each group of the stream, the accuracies of all groups after it.
    """
    last = matrix[-1]
    lost = [max(row[place] for row in matrix[place:-1]) - last[place] for place in range(len(last) - 1)]
    return statistics.fmean(lost)
