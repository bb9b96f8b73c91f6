"""The discrete key-value bottleneck (DKVB): frozen keys that are looked up, and values that are trained or counted.

An embedding is split into C heads. Each head finds the nearest of the K keys of its codebook (squared L2) and fetches
the value of that key. A decoder maps the fetched values to logits. The keys are fitted once, without labels, and
frozen. An input is then represented by C integers, its *codes*, and training updates only the fetched values. Counted
values need no training: they follow from counts of the labels at each key, so examples can be added and forgotten.

Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240). Keys by k-means and by the exponential
moving average of van den Oord et al. (arXiv:1711.00937, appendix A.1). Forgetting in a bottleneck: Shah et al., "Low
Compute Unlearning via Sparse Representations", TMLR 2025 (arXiv:2311.15268).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from kd.common.bottleneck.counts import count_labels, counted_values
from kd.common.bottleneck.keys import (
    assign,
    count_codes,
    kmeans,
    largest_across_processes,
    nearest_keys,
    random_heads,
    random_rows,
    smoothed_mean,
)
from kd.common.utils.errors import UserError

STATISTICS_ROWS = 8192  # embeddings per chunk of key_statistics
STATISTICS = "usage", "perplexity", "quantisation_error"
LOWEST = -1e4  # logit of a forgotten class after a linear decoder; finite also in fp16

Split = Literal["segment", "projection"]
Decoder = Literal["linear", "mean"]
Values = Literal["trained", "counted"]


class DiscreteKeyValueBottleneck(nn.Module):
    """C codebooks of K keys and values between an embedding (..., dim) and logits (..., num_outputs).

    Args:
        dim: width of the embedding.
        num_outputs: number of classes, or 1 for regression.
        codebooks: C, the number of heads, each with a codebook.
        codebook_size: K, the number of keys and values of a codebook (at most 65,536, so that codes fit 16 bits).
        split: `segment` splits the embedding into C equal segments, `projection` multiplies it by C fixed Gaussian
            matrices with columns of unit length.
        key_dim: width of a key under `projection` (default dim / C); under `segment` it is dim / C.
        decoder: `linear` maps the C fetched values, concatenated, to logits; `mean` has no parameters: values are
            logits and are averaged over the codebooks.
        value_dim: width of a value for the linear decoder (default 16).
        values: `trained` by gradients, or `counted`: a function of label counts (`counted_values`) that `add` and
            `forget` change. Counted values need the mean decoder and classes.

    Buffers (all saved): keys (C, K, key_dim), key_sums (same shape) and key_counts (C, K), the moving averages whose
    ratio is the keys, frozen, projection (C, dim, key_dim) under that split, and label_counts (C, K, num_outputs), the
    int32 counts of counted values. Parameters: values (C, K, value_dim) and those of the linear decoder.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        codebooks: int = 32,
        codebook_size: int = 512,
        split: Split = "segment",
        key_dim: int | None = None,
        decoder: Decoder = "linear",
        value_dim: int = 16,
        values: Values = "trained",
    ) -> None:
        super().__init__()
        if values == "counted" and (decoder != "mean" or num_outputs < 2):
            raise ValueError("counted values are logits of classes: they need --decoder mean and at least two classes")
        if not 1 <= codebook_size <= 2**16:
            raise ValueError(f"codebook_size must be between 1 and 65536, got {codebook_size}")
        if split == "segment" and dim % codebooks:
            divisors = [c for c in range(1, dim + 1) if dim % c == 0]
            raise ValueError(
                f"{codebooks} codebooks do not divide an embedding of width {dim}: use one of {divisors}, "
                "or the projection split"
            )
        self.codebooks, self.codebook_size, self.dim = codebooks, codebook_size, dim
        self.key_dim = dim // codebooks if split == "segment" else key_dim or max(1, dim // codebooks)
        self.value_dim = num_outputs if decoder == "mean" else value_dim

        projection = torch.empty(codebooks, dim, self.key_dim) if split == "projection" else None
        self.register_buffer("projection", projection)
        self.register_buffer("keys", torch.empty(codebooks, codebook_size, self.key_dim))
        self.register_buffer("key_sums", torch.empty(codebooks, codebook_size, self.key_dim))
        self.register_buffer("key_counts", torch.empty(codebooks, codebook_size))
        self.register_buffer("frozen", torch.empty((), dtype=torch.bool))
        shape = (codebooks, codebook_size, self.value_dim)
        self.values = nn.Parameter(torch.empty(shape), requires_grad=values == "trained")
        counts = torch.empty(shape, dtype=torch.int32) if values == "counted" else None
        self.register_buffer("label_counts", counts)
        self.decoder = nn.Linear(codebooks * value_dim, num_outputs) if decoder == "linear" else None
        self.reset()

    projection: Tensor | None
    label_counts: Tensor | None
    keys: Tensor
    key_sums: Tensor
    key_counts: Tensor
    frozen: Tensor

    @torch.no_grad()
    def reset(self) -> None:
        """Initializes keys with standard normal samples and values with zeros, so that keys which were never selected
        do not contribute.
        """
        if self.projection is not None:
            self.projection.copy_(F.normalize(torch.randn_like(self.projection), dim=1))
        self.keys.normal_()
        self.key_sums.copy_(self.keys)
        self.key_counts.fill_(1.0)
        self.frozen.fill_(False)
        self.values.zero_()
        if self.label_counts is not None:
            self._set_counts(torch.zeros_like(self.label_counts))
        if self.decoder is not None:
            self.decoder.reset_parameters()

    @property
    def code_bits(self) -> int:
        """Bits of the codes of one embedding: codebooks x ceil(log2 K)."""
        return self.codebooks * (self.codebook_size - 1).bit_length()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The values train with --value_learning_rate and without weight decay, which would shrink unused values."""
        return {"value": [self.values]} if self.values.requires_grad else {}

    # ---- embeddings -> codes -> logits ----

    def heads(self, embeddings: Tensor) -> Tensor:
        """Splits embeddings (..., dim) into heads (..., codebooks, key_dim), in fp32."""
        if self.projection is not None:
            return einsum(embeddings.float(), self.projection, "... d, c d k -> ... c k")
        return rearrange(embeddings.float(), "... (c k) -> ... c k", c=self.codebooks)

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (..., codebooks), int64: the index of the nearest key of each head of the embeddings (..., dim)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            heads = self.heads(embeddings)
            codes = nearest_keys(rearrange(heads, "... c k -> (...) c k"), self.keys)
            return codes.view(heads.shape[:-1])

    def decode(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, num_outputs) of codes (batch, codebooks), or averaged over the positions of codes
        (batch, positions, codebooks) that `mask` (batch, positions) keeps.
        """
        codes = codes if codes.dim() == 3 else rearrange(codes, "batch c -> batch 1 c")
        weights = torch.ones(codes.shape[:2], device=codes.device) if mask is None else mask.float()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        rows = codes.long() + torch.arange(self.codebooks, device=codes.device) * self.codebook_size
        with torch.autocast(codes.device.type, enabled=False):
            if self.decoder is None:
                weights = repeat(weights / self.codebooks, "batch n -> batch (c n)", c=self.codebooks)
                return self.fetch(rearrange(rows, "batch n c -> batch (c n)"), weights)
            weights = repeat(weights, "batch n -> (batch c) n", c=self.codebooks)
            fetched = self.fetch(rearrange(rows, "batch n c -> (batch c) n"), weights)
            return self.decoder(rearrange(fetched, "(batch c) value -> batch (c value)", c=self.codebooks))

    def fetch(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums (bags, value_dim) of rows (bags, n) of the table of all values (C * K, value_dim)."""
        return weighted_bag(rows, rearrange(self.values, "c k value -> (c k) value"), weights)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, num_outputs) of embeddings (batch, dim), or (batch, positions, dim) with a mask."""
        return self.decode(self.encode(embeddings), mask)

    # ---- counted values ----

    @torch.no_grad()
    def add(self, codes: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Adds examples with labels (rows,) to counted values. codes and mask are as in `decode`. The order of
        examples has no effect. Raises ValueError for trained values.
        """
        counts = self._counts()
        self._set_counts(counts + count_labels(codes, labels, counts, mask))

    @torch.no_grad()
    def forget(self, codes: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Subtracts examples from counted values: the bottleneck is then bit-equal to one to which all other examples
        were added. Raises ValueError for trained values, and for examples that were not added with these labels; the
        values are then unchanged.
        """
        counts = self._counts()
        remaining = counts - count_labels(codes, labels, counts, mask)
        if (remaining < 0).any():
            raise ValueError("some of the examples are not in the values: their codes or labels were never added")
        self._set_counts(remaining)

    @torch.no_grad()
    def add_classes(self, number: int) -> None:
        """Adds classes without examples to counted values, after the others. Raises ValueError for trained values."""
        counts = F.pad(self._counts(), (0, number))
        self.label_counts, self.value_dim = counts, counts.shape[-1]
        self.values = nn.Parameter(counted_values(counts), requires_grad=False)

    def _counts(self) -> Tensor:
        if self.label_counts is None:
            raise ValueError("trained values have no counts: only counted values add and forget examples")
        return self.label_counts

    def _set_counts(self, counts: Tensor) -> None:
        self._counts().copy_(counts)
        self.values.copy_(counted_values(counts))

    @torch.no_grad()
    def forget_class(self, label: int) -> None:
        """Removes a class, which keeps its place among the outputs but is no longer predicted.

        From counted values this subtracts all examples of the class. Trained values and decoder keep the effect that
        the examples had on the outputs of other classes; the output of the class becomes the lowest.
        """
        if self.label_counts is not None:
            counts = self.label_counts.clone()
            counts[..., label] = 0
            self._set_counts(counts)
        elif self.decoder is None:
            self.values[..., label] = self.values.amin(-1) - 1
        else:
            self.decoder.weight[label] = 0
            self.decoder.bias[label] = LOWEST

    # ---- keys ----

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

        K-means on a sample, then `epochs` passes of moving averages, without labels. In a distributed run every
        process passes its rows; all end with the same keys.
        """
        self._check_not_frozen()
        rows = _rows(embeddings, mask)
        generator = torch.Generator().manual_seed(seed)
        sample = self.heads(random_rows(rows, max(8192, 16 * self.codebook_size), generator))
        keys, counts = kmeans(sample, self.codebook_size, generator)
        self.keys.copy_(keys)
        self.key_counts.copy_(counts * min(1.0, batch_size / len(sample)))  # scaled to a batch of that size
        self.key_sums.copy_(keys * rearrange(self.key_counts, "c k -> c k 1"))
        steps = largest_across_processes(-(-len(rows) // batch_size))
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            for batch in order.tensor_split(steps):
                self.update_keys(self.heads(rows[batch]), decay, expiry, generator)
        self.freeze_keys()

    @torch.no_grad()
    def update_keys(
        self, heads: Tensor, decay: float = 0.9, expiry: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """One moving-average step on heads (rows, codebooks, key_dim): keys become the *means* of their heads.

            counts <- g counts + (1 - g) n        sums <- g sums + (1 - g) s        keys = sums / smoothed counts

        with n and s the number and the sum of this batch's heads per key, over all processes. A key whose count falls
        below `expiry` times an even share of the batch is dead: it restarts at a random head of the batch, in all
        three buffers, since otherwise the next step would undo the restart.
        """
        self._check_not_frozen()
        counts, sums = assign(heads.float(), self.keys)
        self.key_counts.lerp_(counts, 1 - decay)
        self.key_sums.lerp_(sums, 1 - decay)
        self.keys.copy_(smoothed_mean(self.key_sums, self.key_counts))
        threshold = expiry * float(counts.sum()) / (self.codebooks * self.codebook_size)
        dead = self.key_counts < threshold
        if dead.any():
            self.keys[dead] = random_heads(heads.float(), self.codebook_size, generator)[dead]
            self.key_counts[dead] = threshold
            self.key_sums[dead] = self.keys[dead] * threshold

    def freeze_keys(self) -> None:
        self.frozen.fill_(True)

    def _check_not_frozen(self) -> None:
        if self.frozen:
            raise RuntimeError("the keys are frozen; reset() the bottleneck before fitting them again")

    @torch.no_grad()
    def carry_keys(self, source: "DiscreteKeyValueBottleneck") -> None:
        """Copies the keys of another bottleneck, and the projection that they were fitted with, and freezes them.

        Raises ValueError if the shapes differ: number or size of codebooks, widths or split.
        """
        self.check_compatible(source)
        for name in ("keys", "key_sums", "key_counts", "projection"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(source, name))
        self.freeze_keys()

    def check_compatible(self, source: "DiscreteKeyValueBottleneck", values: bool = False) -> None:
        """Raises ValueError if the keys of another bottleneck, or with `values` all its tensors, differ in shape."""
        here, other = self._shape(values), source._shape(values)
        differ = [f"{name} {here[name]} here, {other[name]} carried" for name in here if here[name] != other[name]]
        if differ:
            raise ValueError(f"the carried keys do not fit: {'; '.join(differ)}")

    def _shape(self, values: bool) -> dict[str, int | str]:
        """The shape of the keys, and with `values` also that of values and decoder."""
        shape: dict[str, int | str] = {
            "codebooks": self.codebooks,
            "codebook_size": self.codebook_size,
            "key width": self.key_dim,
            "embedding width": self.dim,
            "split": "segment" if self.projection is None else "projection",
        }
        if values:
            shape |= {"decoder": "mean" if self.decoder is None else "linear", "value width": self.value_dim}
            shape |= {"values": "trained" if self.label_counts is None else "counted"}
        return shape

    @torch.no_grad()
    def key_statistics(self, embeddings: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """Coverage of embeddings (rows, dim) or (rows, positions, dim) by the keys, averaged over the codebooks.

        usage: share of keys used at least once; perplexity: exp of the entropy of the codes, at most K;
        quantisation_error: mean squared distance to the nearest key, per dimension.
        """
        rows = _rows(embeddings, mask)
        counts, errors = torch.zeros(self.codebooks, self.codebook_size), 0.0
        for chunk in rows.split(STATISTICS_ROWS):
            heads = self.heads(chunk)
            codes = nearest_keys(heads, self.keys)
            chosen = self.keys[torch.arange(self.codebooks, device=codes.device), codes]
            errors += (heads - chosen).square().mean().item() * len(chunk) / len(rows)
            counts += count_codes(codes, self.codebook_size).cpu()
        shares = counts / counts.sum(1, keepdim=True)
        perplexity = torch.special.entr(shares).sum(1).exp()
        return {
            "usage": (counts > 0).float().mean().item(),
            "perplexity": perplexity.mean().item(),
            "quantisation_error": errors,
        }


def meta_bottleneck(width: int, num_outputs: int, shape: dict[str, Any]) -> DiscreteKeyValueBottleneck:
    """A bottleneck of this shape on the meta device. Raises UserError if it cannot split an embedding of `width`."""
    try:
        with torch.device("meta"):
            return DiscreteKeyValueBottleneck(width, num_outputs, **shape)
    except ValueError as error:
        raise UserError(str(error)) from error


def _rows(embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """Flattens embeddings (..., dim) to rows (rows, dim), without the positions that the mask excludes."""
    return rearrange(embeddings, "... d -> (...) d") if mask is None else embeddings[mask.bool()]


def weighted_bag(rows: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (bags, width) of the rows (bags, n) of a table; the gradient reaches only those rows."""
    if torch.compiler.is_exporting():  # ONNX has no embedding bag, only a loop over its bags
        return (F.embedding(rows, table) * rearrange(weights, "bag n -> bag n 1")).sum(1)
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
