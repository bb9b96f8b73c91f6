"""The keys of codebooks: nearest-key search, k-means, and moving averages over all processes.

Shapes, for C codebooks of K keys: keys (C, K, key_dim); heads (rows, C, key_dim), the parts of the embeddings; codes
(rows, C), the indices of the nearest keys.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

# Maximum size of one block of the table of distances (codebooks, rows, codebook_size). A CPU reads it from a cache.
SEARCH_BYTES = {"cpu": 2 * 2**20, "gpu": 64 * 2**20}
RUN = 16  # successive keys whose minimum the search computes first
MIN_RUNS = 32  # with fewer, minima over runs are slow
LAPLACE = 1e-5


def nearest_keys(heads: Tensor, keys: Tensor) -> Tensor:
    """Index of the nearest key (squared L2): heads (rows, C, key_dim), keys (C, K, key_dim) -> (rows, C), int64.

    |x - k|^2 = |x|^2 + 2 (|k|^2 / 2 - x.k), so the argmin needs no distances. Rows are searched in blocks, which
    bounds the memory for any number of rows. Of equally near keys, the first is chosen. Exact fp32: TF32 would flip
    near ties.
    """
    if torch.compiler.is_exporting():  # in a graph, the number of blocks cannot depend on the batch
        return _nearest(heads, *_search_table(keys, 1), 1)
    run = max(1, min(RUN, keys.shape[1] // MIN_RUNS))
    table = _search_table(keys, run)
    limit = SEARCH_BYTES["cpu" if keys.device.type == "cpu" else "gpu"]
    block = max(1, limit // (4 * table[0].numel()))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        codes = heads.new_empty(heads.shape[:2], dtype=torch.long)
        for rows, found in zip(heads.split(block), codes.split(block), strict=True):
            found.copy_(_nearest(rows, *table, run))  # small results kept between large blocks would fragment memory
        return codes
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _search_table(keys: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Half squared norms (C, 1, run * n) and keys (C, key_dim, run * n) in the order of `_nearest`: n runs of `run`
    successive keys, the first key of each run, then the second, ... Missing keys of the last run are infinitely far.
    """
    missing = -keys.shape[1] % run
    half_norms = F.pad(keys.square().sum(-1) / 2, (0, missing), value=torch.inf)
    keys = F.pad(keys, (0, 0, 0, missing))
    return (
        rearrange(half_norms, "c (n run) -> c 1 (run n)", run=run),
        rearrange(keys, "c (n run) d -> c d (run n)", run=run),
    )


def _nearest(heads: Tensor, half_norms: Tensor, keys: Tensor, run: int) -> Tensor:
    """The search in one block of rows. On a CPU, an argmin takes longer than the product, and minima alone are fast.
    So the minimum of each run of keys is computed, then the first run with the smallest minimum, then its first
    nearest key.
    """
    scores = torch.baddbmm(half_norms, rearrange(heads, "row c d -> c row d"), keys, alpha=-1)
    if run == 1:
        return rearrange(scores.min(-1).indices, "c row -> row c")  # on a CPU faster than argmin
    scores = rearrange(scores, "c row (run n) -> c row run n", run=run)
    nearest_run = scores.amin(2).min(-1).indices
    of_run = scores.gather(3, repeat(nearest_run, "c row -> c row run 1", run=run))
    return rearrange(nearest_run * run + of_run[..., 0].min(-1).indices, "c row -> row c")


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Counts (C, K) of each key in codes (rows, C)."""
    counts = torch.bincount(_flat(codes, codebook_size), minlength=codes.shape[1] * codebook_size)
    return rearrange(counts.float(), "(c k) -> c k", k=codebook_size)


def assign(heads: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Number (C, K) and sum (C, K, key_dim) of the heads that are nearest to each key, over all processes."""
    codebooks, codebook_size, width = keys.shape
    codes = nearest_keys(heads, keys)
    counts = count_codes(codes, codebook_size)
    sums = heads.new_zeros(codebooks * codebook_size, width)
    sums.index_add_(0, _flat(codes, codebook_size), rearrange(heads, "row c d -> (row c) d"))
    sums = rearrange(sums, "(c k) d -> c k d", k=codebook_size)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    return counts, sums


def _flat(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes (rows, C) as indices (rows * C,) into the keys of all codebooks, one codebook after another."""
    offsets = torch.arange(codes.shape[1], device=codes.device) * codebook_size
    return rearrange(codes + offsets, "row c -> (row c)")


def kmeans(
    heads: Tensor, codebook_size: int, generator: torch.Generator, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Keys (C, K, key_dim) and their counts (C, K) by Lloyd's algorithm, starting from random heads.

    The key of an empty cluster does not change.
    """
    keys = random_heads(heads, codebook_size, generator)
    for _ in range(iterations):
        counts, sums = assign(heads, keys)
        means = sums / rearrange(counts.clamp(min=1), "c k -> c k 1")
        keys = torch.where(rearrange(counts > 0, "c k -> c k 1"), means, keys)
    return keys, counts


def smoothed_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Keys (C, K, key_dim): sums (C, K, key_dim) divided by counts (C, K) with Laplace smoothing."""
    total = counts.sum(1, keepdim=True)
    smoothed = (counts + LAPLACE) / (total + counts.shape[1] * LAPLACE) * total
    return sums / rearrange(smoothed, "c k -> c k 1")


def random_heads(heads: Tensor, codebook_size: int, generator: torch.Generator | None) -> Tensor:
    """Random heads (codebooks, codebook_size, key_dim), from different rows for each codebook; the same in all
    processes.
    """
    rows, codebooks, _ = heads.shape
    repeats = -(-codebook_size // rows)  # rows are repeated only if there are fewer rows than keys
    picks = [
        torch.cat([torch.randperm(rows, generator=generator) for _ in range(repeats)])[:codebook_size]
        for _ in range(codebooks)
    ]
    of_codebook = rearrange(torch.arange(codebooks, device=heads.device), "c -> c 1")
    chosen = heads[torch.stack(picks).to(heads.device), of_codebook]
    if dist.is_initialized():
        dist.broadcast(chosen, src=0)
    return chosen


def random_rows(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` random rows."""
    if len(rows) <= limit:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:limit].to(rows.device)]


def largest_across_processes(number: int) -> int:
    """The largest `number` of all processes: they must take equally many steps to stay synchronized."""
    if not dist.is_initialized():
        return number
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return max(numbers)
