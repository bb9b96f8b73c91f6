"""The discrete key-value bottleneck (DKVB): frozen keys that are looked up, values that are learned.

An embedding is split into C heads. Each head finds the nearest of its K keys (squared L2) and fetches the value that
belongs to it; a decoder turns the fetched values into logits. Keys are fitted once, without labels, and frozen; from
then on an input is nothing but C integers, its *codes*, and learning touches only the values that were fetched.

Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240). Keys by k-means and by the exponential
moving average of van den Oord et al. (arXiv:1711.00937, appendix A.1).
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SEARCH_BYTES = 64 * 2**20  # bound on one block of the (codebooks, rows, pairs) distance table
LAPLACE = 1e-5

Split = Literal["segment", "projection"]
Decoder = Literal["linear", "mean"]


class DiscreteKeyValueBottleneck(nn.Module):
    """C codebooks of K key-value pairs between an embedding (..., dim) and logits (..., num_outputs).

    Args:
        dim: width of the embedding.
        num_outputs: number of classes, or 1 for regression.
        codebooks: C, how many heads look up a pair each.
        pairs: K, how many pairs a codebook holds (at most 65,536, so that codes fit 16 bits).
        split: `segment` cuts the embedding into C equal pieces, `projection` multiplies it with C fixed Gaussian
            matrices whose columns have unit length.
        key_dim: width of a key under `projection` (default dim / C); under `segment` it is dim / C.
        decoder: `linear` maps the C fetched values, side by side, to logits; `mean` has no parameters: values are
            logits and are averaged over the codebooks.
        value_dim: width of a value for the linear decoder (default 16).

    Buffers (all saved): keys (C, K, key_dim), key_sums (same shape) and key_counts (C, K), the moving averages whose
    ratio is the keys, frozen, and projection (C, dim, key_dim) where there is one. Parameters: values
    (C, K, value_dim) and the linear decoder's.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        codebooks: int = 32,
        pairs: int = 512,
        split: Split = "segment",
        key_dim: int | None = None,
        decoder: Decoder = "linear",
        value_dim: int = 16,
    ) -> None:
        super().__init__()
        if not 1 <= pairs <= 2**16:
            raise ValueError(f"pairs must be between 1 and 65536, got {pairs}")
        if split == "segment" and dim % codebooks:
            divisors = [c for c in range(1, dim + 1) if dim % c == 0]
            raise ValueError(
                f"{codebooks} codebooks do not divide an embedding of width {dim}: use one of {divisors}, "
                "or the projection split"
            )
        self.codebooks, self.pairs, self.dim = codebooks, pairs, dim
        self.key_dim = dim // codebooks if split == "segment" else key_dim or max(1, dim // codebooks)
        self.value_dim = num_outputs if decoder == "mean" else value_dim

        projection = torch.empty(codebooks, dim, self.key_dim) if split == "projection" else None
        self.register_buffer("projection", projection)
        self.register_buffer("keys", torch.empty(codebooks, pairs, self.key_dim))
        self.register_buffer("key_sums", torch.empty(codebooks, pairs, self.key_dim))
        self.register_buffer("key_counts", torch.empty(codebooks, pairs))
        self.register_buffer("frozen", torch.empty((), dtype=torch.bool))
        self.values = nn.Parameter(torch.empty(codebooks, pairs, self.value_dim))
        self.decoder = nn.Linear(codebooks * value_dim, num_outputs) if decoder == "linear" else None
        self.reset()

    projection: Tensor | None
    keys: Tensor
    key_sums: Tensor
    key_counts: Tensor
    frozen: Tensor

    @torch.no_grad()
    def reset(self) -> None:
        """Random keys (standard normal); values of zero, so that a key that was never chosen says nothing."""
        if self.projection is not None:
            self.projection.copy_(F.normalize(torch.randn_like(self.projection), dim=1))
        self.keys.normal_()
        self.key_sums.copy_(self.keys)
        self.key_counts.fill_(1.0)
        self.frozen.fill_(False)
        self.values.zero_()
        if self.decoder is not None:
            self.decoder.reset_parameters()

    # ---- embeddings -> codes -> logits ----

    def heads(self, embeddings: Tensor) -> Tensor:
        """Splits embeddings (..., dim) into heads (..., codebooks, key_dim), in fp32."""
        embeddings = embeddings.float()
        if self.projection is not None:
            return torch.einsum("...d,cdk->...ck", embeddings, self.projection)
        return embeddings.unflatten(-1, (self.codebooks, self.key_dim))

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (..., codebooks), int64: for each head of the embeddings (..., dim) the index of its nearest key."""
        with torch.autocast(embeddings.device.type, enabled=False):
            heads = self.heads(embeddings)
            rows = heads.flatten(0, -3)  # (rows, codebooks, key_dim)
            return nearest_keys(rows, self.keys).unflatten(0, heads.shape[:-2])

    def decode(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, num_outputs) of codes (batch, codebooks), or the mean over the positions of codes
        (batch, positions, codebooks) that `mask` (batch, positions) keeps.
        """
        codes = codes if codes.dim() == 3 else codes.unsqueeze(1)
        batch, positions, _ = codes.shape
        weights = torch.ones(batch, positions, device=codes.device) if mask is None else mask.float()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        offsets = torch.arange(self.codebooks, device=codes.device) * self.pairs
        rows = (codes.long() + offsets).transpose(1, 2)  # (batch, codebooks, positions) into the flat values
        weights = weights.unsqueeze(1).expand_as(rows)
        table = self.values.flatten(0, 1)  # (codebooks * pairs, value_dim)
        with torch.autocast(codes.device.type, enabled=False):
            if self.decoder is None:
                return weighted_bag(rows.flatten(1), table, weights.flatten(1) / self.codebooks)
            fetched = weighted_bag(rows.flatten(0, 1), table, weights.flatten(0, 1))  # (batch * codebooks, value_dim)
            return self.decoder(fetched.view(batch, -1))

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, num_outputs) of embeddings (batch, dim), or (batch, positions, dim) with a mask."""
        return self.decode(self.encode(embeddings), mask)

    # ---- fitting and carrying keys ----

    @torch.no_grad()
    def fit_keys(
        self,
        embeddings: Tensor,
        mask: Tensor | None = None,
        epochs: int = 3,
        batch_size: int = 2048,
        decay: float = 0.9,
        expiry: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Fits the keys to embeddings (rows, dim), or (rows, positions, dim) with a mask, and freezes them.

        K-means on a sample, then `epochs` passes of moving averages. Labels play no part. In a distributed run every
        process passes its own rows; all end with the same keys.
        """
        self._refuse_frozen()
        rows = embeddings[mask.bool()] if mask is not None else embeddings.flatten(0, -2)
        generator = torch.Generator().manual_seed(seed)
        self._kmeans(self.heads(_take(rows, max(8192, 16 * self.pairs), generator)), batch_size, generator)
        steps = _largest_across_processes(-(-len(rows) // batch_size))
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            for batch in order.tensor_split(steps):
                self.update_keys(self.heads(rows[batch]), decay, expiry, generator)
        self.freeze_keys()

    @torch.no_grad()
    def update_keys(
        self, heads: Tensor, decay: float = 0.9, expiry: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """One moving-average step on heads (rows, codebooks, key_dim): keys become *means* of what chose them.

            counts <- g counts + (1 - g) n        sums <- g sums + (1 - g) s        keys = sums / smoothed counts

        with n and s the number and the sum of this batch's heads per key, over all processes. A key whose count falls
        below `expiry` times an even share of the batch is dead: it restarts at a random head of the batch, in all
        three buffers, else the next step would take the restart back.
        """
        self._refuse_frozen()
        counts, sums = self._assign(heads.float())
        self.key_counts.lerp_(counts, 1 - decay)
        self.key_sums.lerp_(sums, 1 - decay)
        total = self.key_counts.sum(1, keepdim=True)
        smoothed = (self.key_counts + LAPLACE) / (total + self.pairs * LAPLACE) * total
        self.keys.copy_(self.key_sums / smoothed.unsqueeze(-1))
        threshold = expiry * float(counts.sum()) / (self.codebooks * self.pairs)
        dead = self.key_counts < threshold
        if dead.any():
            self.keys[dead] = self._random_heads(heads.float(), generator)[dead]
            self.key_counts[dead] = threshold
            self.key_sums[dead] = self.keys[dead] * threshold

    def freeze_keys(self) -> None:
        self.frozen.fill_(True)

    def refuse_unfit(self, source: "DiscreteKeyValueBottleneck", values: bool = False) -> None:
        """Raises ValueError where the keys of another bottleneck, or with `values` all of it, do not fit in here."""
        own, other = self._shape(values), source._shape(values)
        differ = [f"{name} {own[name]} here, {other[name]} carried" for name in own if own[name] != other[name]]
        if differ:
            raise ValueError(f"the carried keys do not fit: {'; '.join(differ)}")

    def _shape(self, values: bool) -> dict[str, int | str]:
        """What keys depend on, and with `values` what values and decoder depend on too."""
        shape: dict[str, int | str] = {
            "codebooks": self.codebooks,
            "pairs": self.pairs,
            "key width": self.key_dim,
            "embedding width": self.dim,
            "split": "segment" if self.projection is None else "projection",
        }
        if values:
            shape |= {"decoder": "mean" if self.decoder is None else "linear", "value width": self.value_dim}
        return shape

    @torch.no_grad()
    def carry_keys(self, source: "DiscreteKeyValueBottleneck") -> None:
        """Takes over the keys (and the projection that they live under) of another bottleneck and freezes them.

        Raises ValueError where the two do not fit: another number of codebooks or pairs, another width or split.
        """
        self.refuse_unfit(source)
        for name in ("keys", "key_sums", "key_counts", "projection"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(source, name))
        self.freeze_keys()

    @torch.no_grad()
    def key_statistics(self, embeddings: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How well the keys cover embeddings (rows, dim) or (rows, positions, dim), means over the codebooks.

        usage: share of keys chosen at least once; perplexity: exp of the entropy of the choice, at most K;
        quantisation_error: mean squared distance to the chosen key, per dimension.
        """
        rows = embeddings[mask.bool()] if mask is not None else embeddings.flatten(0, -2)
        counts, errors = torch.zeros(self.codebooks, self.pairs), 0.0
        for chunk in rows.split(8192):
            heads = self.heads(chunk)
            codes = nearest_keys(heads, self.keys)
            chosen = self.keys[torch.arange(self.codebooks, device=codes.device), codes]
            errors += (heads - chosen).square().mean().item() * len(chunk) / len(rows)
            counts += _count(codes, self.pairs)[0].cpu()
        shares = counts / counts.sum(1, keepdim=True)
        perplexity = torch.special.entr(shares).sum(1).exp()
        return {
            "usage": (counts > 0).float().mean().item(),
            "perplexity": perplexity.mean().item(),
            "quantisation_error": errors,
        }

    def _refuse_frozen(self) -> None:
        if self.frozen:
            raise RuntimeError("the keys are frozen; reset() the bottleneck before fitting them again")

    def _kmeans(self, heads: Tensor, batch_size: int, generator: torch.Generator, iterations: int = 10) -> None:
        """Lloyd's algorithm from random heads (rows, codebooks, key_dim); an empty cluster keeps its place."""
        self.keys.copy_(self._random_heads(heads, generator))
        for _ in range(iterations):
            counts, sums = self._assign(heads)
            means = sums / counts.clamp(min=1).unsqueeze(-1)
            self.keys.copy_(torch.where(counts.unsqueeze(-1) > 0, means, self.keys))
        scale = min(1.0, batch_size / len(heads))  # as if the counts had been seen in batches of that size
        self.key_counts.copy_(counts * scale)
        self.key_sums.copy_(self.keys * self.key_counts.unsqueeze(-1))

    def _assign(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Number (C, K) and sum (C, K, key_dim) of the heads that choose each key, over all processes."""
        counts, sums = _count(nearest_keys(heads, self.keys), self.pairs, heads)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    def _random_heads(self, heads: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random heads (C, K, key_dim), for each codebook its own rows; the same on all processes."""
        repeats = -(-self.pairs // len(heads))  # a row comes twice only where there are fewer rows than pairs
        picks = [
            torch.cat([torch.randperm(len(heads), generator=generator) for _ in range(repeats)])[: self.pairs]
            for _ in range(self.codebooks)
        ]
        rows = torch.stack(picks).to(heads.device)  # (codebooks, pairs)
        chosen = heads[rows, torch.arange(self.codebooks, device=heads.device).unsqueeze(1)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        return chosen


def nearest_keys(heads: Tensor, keys: Tensor) -> Tensor:
    """Index of the nearest key (squared L2): heads (rows, C, key_dim), keys (C, K, key_dim) -> (rows, C), int64.

    |x - k|^2 = |x|^2 + 2 (|k|^2 / 2 - x.k), so the argmin needs no distances; rows go through in blocks, so memory
    stays bounded whatever their number. Exact fp32: TF32 would flip near ties.
    """
    half_norms = keys.square().sum(-1).unsqueeze(1) / 2  # (codebooks, 1, pairs)
    block = max(1, SEARCH_BYTES // (4 * keys.shape[0] * keys.shape[1]))
    if torch.compiler.is_exporting():  # a graph cannot have as many blocks as its batches will need
        return torch.baddbmm(half_norms, heads.transpose(0, 1), keys.transpose(1, 2), alpha=-1).argmin(-1).T
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = [
            torch.baddbmm(half_norms, rows.transpose(0, 1), keys.transpose(1, 2), alpha=-1).argmin(-1)
            for rows in heads.split(block)  # each (codebooks, block)
        ]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return torch.cat(found, dim=1).T if found else heads.new_zeros(0, keys.shape[0], dtype=torch.long)


def weighted_bag(rows: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (bags, width) of the rows (bags, n) of a table; the gradient reaches only those rows."""
    if torch.compiler.is_exporting():  # ONNX has no embedding bag, only a loop over its bags
        return (F.embedding(rows, table) * weights.unsqueeze(-1)).sum(1)
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


def _count(codes: Tensor, pairs: int, heads: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Counts (C, K) of codes (rows, C) and, given heads (rows, C, key_dim), their sums (C, K, key_dim)."""
    codebooks = codes.shape[1]
    flat = (codes + torch.arange(codebooks, device=codes.device) * pairs).flatten()
    counts = torch.bincount(flat, minlength=codebooks * pairs).float().view(codebooks, pairs)
    if heads is None:
        return counts, counts.new_empty(0)
    sums = heads.new_zeros(codebooks * pairs, heads.shape[-1]).index_add_(0, flat, heads.flatten(0, 1))
    return counts, sums.view(codebooks, pairs, -1)


def _take(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` random rows."""
    if len(rows) <= limit:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:limit].to(rows.device)]


def _largest_across_processes(number: int) -> int:
    """Processes must take the same number of steps, or the slower would wait forever."""
    if not dist.is_initialized():
        return number
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return max(numbers)
