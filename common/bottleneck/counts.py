"""Counts of labels per key, to which examples are added and from which they are subtracted.

Under a frozen encoder and frozen keys an example is its codes and its label. The counts (C, K, classes) are sums over
the examples, so subtracting an example leaves exactly the counts without it, in any order.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

ROWS = 4096  # examples per step


def count_labels(codes: Tensor, labels: Tensor, like: Tensor, mask: Tensor | None = None) -> Tensor:
    """Counts (C, K, classes), of the shape and type of `like`, of examples with codes (rows, C) and labels (rows,).

    Codes may be (rows, positions, C); each position that `mask` (rows, positions) keeps is then counted. Raises
    ValueError for labels or codes that are out of range, and for another number of codebooks or labels.
    """
    codebooks, codebook_size, classes = like.shape
    codes = codes if codes.dim() == 3 else rearrange(codes, "row c -> row 1 c")
    kept = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device) if mask is None else mask.bool()
    codes, labels = codes.long()[kept], repeat(labels.long(), "row -> row n", n=codes.shape[1])[kept]
    _check(codes, labels, like)
    counts = torch.zeros_like(like).flatten()
    offsets = torch.arange(codebooks, device=codes.device) * codebook_size
    for part, part_labels in zip(codes.split(ROWS), labels.split(ROWS), strict=True):
        cells = (part + offsets) * classes + rearrange(part_labels, "row -> row 1")
        counts.index_add_(0, cells.flatten(), torch.ones_like(cells.flatten(), dtype=counts.dtype))
    return counts.view_as(like)


def _check(codes: Tensor, labels: Tensor, like: Tensor) -> None:
    codebooks, codebook_size, classes = like.shape
    if codes.shape[1] != codebooks:
        raise ValueError(f"the codes have {codes.shape[1]} codebooks, the bottleneck has {codebooks}")
    for name, found, limit in (("codes", codes, codebook_size), ("labels", labels, classes)):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < limit:
            raise ValueError(f"{name} must be between 0 and {limit - 1}, got {int(found.min())} to {int(found.max())}")


def counted_values(counts: Tensor) -> Tensor:
    """Values (C, K, classes) of counts (C, K, classes): smoothed log-likelihoods of each key, given the class.

        value = sqrt(C) log((count + sqrt(n) / K) / (n + sqrt(n))),    n = examples of the class

    The frequencies are the minimax estimator of a multinomial distribution under squared loss (Trybula, Annals of
    Mathematical Statistics 1958). The mean decoder averages over the codebooks, so its prediction is that of naive
    Bayes over C categorical features with equal priors. Naive Bayes adds the C logarithms, which is overconfident for
    heads of one embedding; their mean is underconfident. Smoothing and the scale between the two were chosen on
    CLINC150's validation split, by accuracy and by log-likelihood: a constant smoothing is as good for classes of
    equal sizes, but prefers classes with few examples. The values of a class depend on its examples alone. A class
    without examples is the lowest.
    """
    codebooks, codebook_size, _ = counts.shape
    examples = counts.sum(1, keepdim=True).float()
    known = examples.clamp(min=1)
    values = codebooks**0.5 * ((counts + known.sqrt() / codebook_size) / (known + known.sqrt())).log()
    return torch.where(examples > 0, values, values.amin(-1, keepdim=True) - 1)
