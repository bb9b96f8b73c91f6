"""CPU time of fitting the keys of a bottleneck and of assigning rows to them: this project, and other libraries.

    python benchmarks/key_fitting.py
    python benchmarks/key_fitting.py --codebooks 64 --codebook_size 4096 --width 768

The rows are random mixtures of clusters. Each library fits all codebooks to `--rows` of them, then assigns
`--assigned_rows`. `product` is the batched product of queries and keys alone, with its output written. The error is
the mean squared distance to the nearest key, per dimension. Times are CPU seconds of one thread; run it with
OMP_NUM_THREADS=1.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

BATCH, DECAY, EPOCHS, LLOYD = 2048, 0.9, 3, 10  # the defaults of fit_keys, for all libraries
CLUSTERS = 2000


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def mixture(rows: int, width: int) -> Tensor:
    centres = torch.randn(CLUSTERS, width)
    return centres[torch.randint(CLUSTERS, (rows,))] + 0.5 * torch.randn(rows, width)


class Ours:
    """K-means on a sample, then moving averages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.bottleneck = DiscreteKeyValueBottleneck(args.width, 2, args.codebooks, args.codebook_size)

    def fit(self, rows: Tensor) -> None:
        self.bottleneck.fit_keys(rows, epochs=EPOCHS, batch_size=BATCH, decay=DECAY)

    def assign(self, rows: Tensor) -> None:
        self.bottleneck.encode(rows)

    def error(self, rows: Tensor) -> float:
        return self.bottleneck.key_statistics(rows)["quantisation_error"]


class VectorQuantizePytorch:
    """The same in vector-quantize-pytorch: K-means on the first batch, then moving averages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.quantizer = VectorQuantize(
            dim=args.width, codebook_dim=args.width // args.codebooks, codebook_size=args.codebook_size,
            heads=args.codebooks, separate_codebook_per_head=True, decay=DECAY, kmeans_init=True, kmeans_iters=LLOYD,
        )  # fmt: skip
        self.quantizer.project_in = self.quantizer.project_out = torch.nn.Identity()

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        self.quantizer.train()
        sample = rows[torch.randperm(len(rows))[: max(8192, BATCH)]]  # the rows of our K-means
        for batch in [sample, *(b for _ in range(EPOCHS) for b in rows[torch.randperm(len(rows))].split(BATCH))]:
            self.quantizer(rearrange(batch, "row d -> 1 row d"))
        self.quantizer.eval()

    @torch.no_grad()
    def assign(self, rows: Tensor) -> list[Tensor]:
        return [self.quantizer(rearrange(batch, "row d -> 1 row d"))[0][0] for batch in rows.split(BATCH)]

    def error(self, rows: Tensor) -> float:
        return (rows - torch.cat(self.assign(rows))).square().mean().item()


class ScikitLearn:
    """One MiniBatchKMeans per codebook."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.models = [
            MiniBatchKMeans(
                args.codebook_size, batch_size=BATCH, max_iter=LLOYD, n_init=1, init="random", random_state=0
            )
            for _ in range(args.codebooks)
        ]

    def parts(self, rows: Tensor) -> list[np.ndarray]:
        return [part.contiguous().numpy() for part in rows.chunk(len(self.models), 1)]

    def fit(self, rows: Tensor) -> None:
        for model, part in zip(self.models, self.parts(rows), strict=True):
            model.fit(part)

    def assign(self, rows: Tensor) -> list[np.ndarray]:
        return [model.predict(part) for model, part in zip(self.models, self.parts(rows), strict=True)]

    def error(self, rows: Tensor) -> float:
        found = zip(self.models, self.parts(rows), self.assign(rows), strict=True)
        return float(np.mean([((part - model.cluster_centers_[codes]) ** 2).mean() for model, part, codes in found]))


def product_seconds(rows: Tensor, args: argparse.Namespace) -> float:
    keys = torch.randn(args.codebooks, args.width // args.codebooks, args.codebook_size)
    queries = rearrange(rows, "row (c d) -> row c d", c=args.codebooks).split(BATCH)
    return cpu_seconds(lambda: [torch.bmm(rearrange(q, "row c d -> c row d"), keys) for q in queries])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebooks", type=int, default=32, help="Number of codebooks.")
    parser.add_argument("--codebook_size", type=int, default=512, help="Number of keys per codebook.")
    parser.add_argument("--width", type=int, default=384, help="Width of a row.")
    parser.add_argument("--rows", type=int, default=30_000, help="Rows to which keys are fitted.")
    parser.add_argument("--assigned_rows", type=int, default=168_000, help="Rows that are assigned.")
    args = parser.parse_args()
    torch.manual_seed(0)
    everything = mixture(args.rows + args.assigned_rows, args.width)
    rows, assigned = everything.split([args.rows, args.assigned_rows])
    print("| | fit, s | assign, s | error |\n|---|---|---|---|")
    for library in (Ours, VectorQuantizePytorch, ScikitLearn):
        model = library(args)
        fit, assign = cpu_seconds(lambda m=model: m.fit(rows)), cpu_seconds(lambda m=model: m.assign(assigned))
        print(f"| {library.__name__} | {fit:.1f} | {assign:.1f} | {model.error(rows):.4f} |", flush=True)
    print(f"| product | | {product_seconds(assigned, args):.1f} | |")


if __name__ == "__main__":
    main()
