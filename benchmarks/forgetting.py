"""Forgets a class, examples or a part of a class, and adds a class from few examples, with heads on embeddings.

    python benchmarks/forgetting.py --dataset clinc_oos --kind texts --encoder sentence-transformers/all-MiniLM-L6-v2
    python benchmarks/forgetting.py --dataset mnist
    python benchmarks/forgetting.py --dataset cifar100 --encoder resnet56-cifar10.pt
    python benchmarks/forgetting.py --dataset cifar100 --encoder resnet56-cifar10.pt --domains superclasses.json

The encoder is frozen and has not seen the labels. The keys are fitted to all training embeddings, without labels. Each
head is compared with the same head fitted without the forgotten examples ("retrained"). Where a way to forget has a
grid of settings, the one whose accuracies are nearest to those of the retrained head is shown, and likewise for adding
the one with the highest harmonic mean of both accuracies: choices that no user can make, in favour of these ways.

The forgotten examples are all of a random class, 100 random ones, or a part of a class: the larger of two k-means
clusters. With --domains the label is the domain of the class, and the part is a random class of a domain. The
membership attack ranks forgotten training examples and test examples (of the same class or part) by their loss. Its
AUC is 0.5 if nothing distinguishes them.
"""

import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from embeddings import Source, embeddings, read_domains
from forgetting_ways import WAYS, add_class, candidates
from heads import Counted, Head, NearestMean, Ridge, Rows, Trained
from scipy.stats import t
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.keys import kmeans
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import Parser, run
from kd.common.reporting.tables import markdown, mean_and_deviation
from kd.common.utils.files import write_text

EXAMPLES = 100  # forgotten, of random classes
SHOTS = 1, 5, 20
NEW_CLASSES = 3  # added one at a time to heads that were fitted without them
TUNING = [(rate, steps) for rate in (1e-2, 1e-1) for steps in (5, 20)]
Record = dict[str, Any]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", default="mnist", help="Embedded dataset, Hub name, folder or file.")
    parser.add_argument("--kind", choices=["texts", "images"], default="images", help="What the dataset has.")
    parser.add_argument(
        "--encoder", help="Texts: Hub name or folder. Images: weights of a ResNet56 (default: pixels)."
    )
    parser.add_argument("--domains", help="JSON file of class names by domain.")
    parser.add_argument("--images", type=int, default=5_000, help="Images of each split.")
    parser.add_argument("--codebooks", type=int, default=32, help="Number of codebooks.")
    parser.add_argument("--codebook_size", type=int, default=256, help="Number of keys of a codebook.")
    parser.add_argument("--key_dim", type=int, default=12, help="Width of a key.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds: keys, forgotten examples, training.")
    parser.add_argument("--cache", default="runs/benchmark/forgetting", help="Folder of the embeddings.")
    parser.add_argument("--output", default="forgetting.json", help="File of all figures; .md holds the tables.")
    args = parser.parse_args()
    found, names = embeddings(Source(args.kind, args.dataset, args.encoder, args.images), args.cache)
    domain, forgotten, added = torch.arange(len(names)), list[Record](), list[Record]()
    for number, classes in enumerate(read_domains(args.domains, names) if args.domains else ()):
        domain[classes] = number
    for seed in tqdm(range(args.seeds), desc="seeds"):
        torch.manual_seed(seed)
        study = Study(found, domain, args)
        forgotten += [record | {"seed": seed} for record in study.forget()]
        added += [record | {"seed": seed} for record in study.add()]
    tables = "\n\n".join([table_of_forgetting(forgotten), table_of_adding(added)])
    write_text(args.output, json.dumps({"arguments": vars(args), "forgotten": forgotten, "added": added}, indent=1))
    write_text(args.output.removesuffix(".json") + ".md", tables + "\n")
    print(tables)


class Study:
    """The rows of a dataset under keys of one seed, and its heads. Labels are the `domain` (classes,) of the class."""

    def __init__(self, found: dict[str, Tensor], domain: Tensor, args: Any) -> None:
        self.with_domains, self.of_class = bool(args.domains), (found["train_labels"], found["test_labels"])
        labels = {split: domain[found[f"{split}_labels"]] for split in ("train", "test")}
        self.width, self.classes = found["train"].shape[1], int(domain.max()) + 1
        sizes = args.codebooks, args.codebook_size
        self.keys = DiscreteKeyValueBottleneck(self.width, self.classes, *sizes, "projection", args.key_dim, "mean")
        self.keys.fit_keys(found["train"], epochs=1, seed=int(torch.randint(1000, ())))
        self.train, self.test = (
            Rows(found[split], self.keys.encode(found[split]), labels[split]) for split in ("train", "test")
        )

    def heads(self) -> dict[str, Head]:
        """Heads that are not fitted, by name."""
        return {
            "counted values": Counted(self.keys, self.classes),
            "trained values": Trained(self.keys, self.width, self.classes),
            "linear": Trained(None, self.width, self.classes),
            "least squares": Ridge(self.width, self.classes),
        }

    # ---- forget ----

    def forget(self) -> Iterator[Record]:
        fitted = {name: head.fit(self.train) for name, head in self.heads().items()}
        for scenario, (chosen, affected) in self.scenarios().items():
            forgotten, rest = self.train[chosen], self.train[~chosen]
            for name, head in self.heads().items():
                retrained = head.fit(rest)
                reference = self.measure(retrained, retrained, forgotten, affected, scenario)
                before = self.measure(fitted[name], retrained, forgotten, affected, scenario)
                labels = {"scenario": scenario, "head": name, "retrained": reference}
                yield labels | {"way": "none", "milliseconds": 0.0, "found": before}
                for way in WAYS[name]:
                    by_output = scenario == "class" or (scenario == "part" and self.with_domains)
                    if not by_output and way[0] in ("delete row", "lowest output"):
                        continue
                    trials = []
                    for changed, time, words in candidates(fitted[name], way, forgotten, rest):
                        found = self.measure(changed, retrained, forgotten, affected, scenario)
                        trials.append({"way": way[0], "arguments": words, "milliseconds": time, "found": found})
                    yield labels | min(trials, key=lambda trial: distance(trial["found"], reference))

    def scenarios(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The forgotten rows of train, and the rows of test that are of the same class and cluster, as masks."""
        label = int(torch.randint(self.classes, ()))
        of_class = self.train.labels == label, self.test.labels == label
        picked = torch.zeros(len(self.train), dtype=torch.bool)
        picked[torch.randperm(len(self.train))[:EXAMPLES]] = True
        return {
            "class": of_class,
            "examples": (picked, torch.ones(len(self.test), dtype=torch.bool)),
            "part": self.part_of(of_class),
        }

    def part_of(self, of_label: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A part of the rows of one label in train and test: a class of the domain, or the larger cluster."""
        members = of_label[0]
        if self.with_domains:
            chosen = self.of_class[0][members][torch.randint(int(members.sum()), ())]
            return self.of_class[0] == chosen, self.of_class[1] == chosen
        centres = kmeans(self.train.embeddings[members].unsqueeze(1), 2, torch.Generator().manual_seed(0))[0][0]
        clusters = [torch.cdist(rows.embeddings, centres).argmin(1) for rows in (self.train, self.test)]
        larger = clusters[0][members].mode().values
        return of_label[0] & (clusters[0] == larger), of_label[1] & (clusters[1] == larger)

    def measure(self, head: Head, retrained: Head, forgotten: Rows, affected: Tensor, scenario: str) -> Record:
        logits, outputs = head.predict(self.test), head.predict(forgotten)
        correct = (logits.argmax(1) == self.test.labels).double()
        rest = correct if scenario == "examples" else correct[~affected]
        losses = -F.cross_entropy(outputs, forgotten.labels, reduction="none")
        others = -F.cross_entropy(logits[affected], self.test.labels[affected], reduction="none")
        members = torch.cat([torch.ones(len(losses)), torch.zeros(len(others))])
        return {
            "forgotten": (outputs.argmax(1) == forgotten.labels).double().mean().item(),
            "rest": rest.mean().item(),
            "agreement": (logits.argmax(1) == retrained.predict(self.test).argmax(1)).double().mean().item(),
            "auc": float(roc_auc_score(members.numpy(), torch.cat([losses, others]).numpy())),
            "largest_difference": (logits - retrained.predict(self.test)).abs().max().item(),
        }

    # ---- add ----

    def add(self) -> Iterator[Record]:
        new = torch.randperm(self.classes)[:NEW_CLASSES]
        old = ~torch.isin(self.train.labels, new)
        fitted = {name: head.fit(self.train[old]) for name, head in self.heads().items() if name != "least squares"}
        fitted["nearest mean"] = NearestMean(self.width, self.classes).fit(self.train[old])
        known = self.test[~torch.isin(self.test.labels, new)]
        for name, head in fitted.items():
            correct = head.predict(known).argmax(1) == known.labels
            yield {"way": f"{name}: before", "shots": 0, "new": 0.0, "old": correct.double().mean().item()}
        for label, shots in ((label, shots) for label in new for shots in SHOTS):
            rows = (self.train.labels == label).nonzero().flatten()
            examples = self.train[rows[torch.randperm(len(rows))[:shots]]]
            tests = self.test[~torch.isin(self.test.labels, new[new != label])]
            for way, heads in self.ways_to_add(fitted, examples):
                scores = [old_and_new(head, tests, int(label)) for head in heads]
                yield {"way": way, "shots": shots} | max(scores, key=harmonic_mean)

    def ways_to_add(self, fitted: dict[str, Any], examples: Rows) -> Iterator[tuple[str, list[Head]]]:
        for name in ("counted values", "nearest mean"):
            yield f"{name}: count", [copy.deepcopy(fitted[name]).fit(examples)]
        linear, values = fitted["linear"], fitted["trained values"]
        yield "linear: train the new row", [add_class(linear, examples, *words, True) for words in TUNING]
        yield "linear: fine-tune", [add_class(linear, examples, *words, False) for words in TUNING]
        yield "trained values: fine-tune", [add_class(values, examples, *words, False) for words in TUNING]


def old_and_new(head: Head, rows: Rows, label: int) -> Record:
    correct = (head.predict(rows).argmax(1) == rows.labels).double()
    return {"new": correct[rows.labels == label].mean().item(), "old": correct[rows.labels != label].mean().item()}


def harmonic_mean(score: Record) -> float:
    return 2 * score["new"] * score["old"] / max(score["new"] + score["old"], 1e-9)


def distance(found: Record, reference: Record) -> float:
    return abs(found["forgotten"] - reference["forgotten"]) + abs(found["rest"] - reference["rest"])


# ---- tables ----


def table_of_forgetting(records: list[Record]) -> str:
    """Means over the seeds; differences from the retrained head in points, with 95% intervals (t over the seeds)."""
    rows = []
    groups = grouped(records, "scenario", "head", "way")
    for (scenario, head, way), group in groups.items():
        if way == "none":
            continue
        before = groups[scenario, head, "none"]
        points = [100 * (record["found"]["rest"] - record["retrained"]["rest"]) for record in group]
        rows.append(
            [
                scenario,
                f"{head}: {way}",
                f"{mean(group, 'found', 'forgotten')} ({mean(group, 'retrained', 'forgotten')})",
                f"{mean(group, 'found', 'rest')} ({mean(group, 'retrained', 'rest')})",
                f"{statistics.fmean(points):.2f} ± {half_width(points):.2f}",
                mean(group, "found", "agreement"),
                f"{mean(before, 'found', 'auc')}, {mean(group, 'found', 'auc')} ({mean(group, 'retrained', 'auc')})",
                f"{statistics.fmean(record['milliseconds'] for record in group):.1f}",
            ]
        )
    header = ["forgotten", "head: way", "accuracy on the forgotten (retrained)", "on the rest (retrained)"]
    return markdown([*header, "difference, points", "agreement", "AUC before, after (retrained)", "ms"], rows)


def table_of_adding(records: list[Record]) -> str:
    rows = [
        [way, str(shots), *(mean_and_deviation([record[name] for record in group]) for name in ("new", "old"))]
        for (way, shots), group in grouped(records, "way", "shots").items()
    ]
    return markdown(["head: way", "examples", "accuracy on the new class", "on the old classes"], rows)


def grouped(records: list[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return groups


def mean(group: list[Record], which: str, name: str) -> str:
    return f"{statistics.fmean(record[which][name] for record in group):.4f}"


def half_width(values: list[float]) -> float:
    """Half of the 95% interval of the mean of some values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    run(main)
