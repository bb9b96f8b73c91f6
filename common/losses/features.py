"""Losses between features of one shape: hidden states, attention distributions, maps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.losses.shared import kl, same_shape, weighted_mean


def feature_l2(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over all elements of features of one shape (FitNets, arXiv:1412.6550).

    `mask` has the leading dimensions of the features, such as (batch, positions) for (batch, positions, channels), and
    restricts the mean to the places that it keeps; zero where it keeps none. Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    return weighted_mean((student.float() - teacher.detach().float()).square(), mask)


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean of 1 - cosine similarity along `dim` of features of one shape (DistilBERT, arXiv:1910.01108).

    `mask` has leading dimensions of what is left without `dim` and restricts the mean as in feature_l2. A vector of
    zeros is at distance 1 from everything. Raises ValueError for shapes that differ.
    """
    same_shape(student, teacher)
    return weighted_mean(1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=dim), mask)


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of self-attention distributions, from queries and keys (MiniLM, arXiv:2002.10957).

    Queries and keys are (batch, positions, width), of any two widths: `heads` equal parts of either are its heads
    (MiniLMv2, arXiv:2012.15828). Averaged over batch, heads and positions; what `mask` (batch, positions) does not
    keep neither asks nor is looked at. Raises ValueError for a width that `heads` does not divide, and for other
    shapes.
    """
    own = _attention(student_query, student_key, heads, mask)  # (batch, heads, positions, positions)
    target = _attention(teacher_query.detach(), teacher_key.detach(), heads, mask)
    same_shape(own, target)
    return weighted_mean(kl(target, own, dim=-1).transpose(1, 2), mask)  # of (batch, positions, heads)


def channel_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the softmax being over the channels of each place.

    Maps are (batch, channels, height, width); summed over channels, averaged over batch and places. `mask` (batch,)
    restricts the mean to the samples that it keeps. Never negative, which KL on raw features can be. Raises ValueError
    for a temperature that is not positive and for shapes that differ.
    """
    same_shape(student, teacher)
    return weighted_mean(_softmax_kl(student, teacher, temperature, dim=1), mask)


def spatial_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """As channel_kl, but the softmax is over the places of each channel (channel-wise distillation, arXiv:2011.13256).

    Summed over height and width, averaged over batch and channels.
    """
    same_shape(student, teacher)
    return weighted_mean(_softmax_kl(student.flatten(2), teacher.flatten(2), temperature, dim=-1), mask)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention maps: the channels' mean square per place, as a unit vector over places.

    Maps are (batch, channels, height, width), of one size but any number of channels; `mask` (batch,) restricts the
    mean to the samples that it keeps. Zagoruyko and Komodakis, arXiv:1612.03928, with p = 2. Raises ValueError for
    maps of different size.
    """
    own, target = (F.normalize(x.float().square().mean(1).flatten(1), dim=1) for x in (student, teacher.detach()))
    same_shape(own, target)
    return weighted_mean((own - target).square(), mask)


def _attention(query: Tensor, key: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Log-probabilities (batch, heads, positions, positions) of what each position looks at."""
    same_shape(query, key)
    if query.shape[-1] % heads:
        raise ValueError(f"a width of {query.shape[-1]} does not split into {heads} heads")
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _softmax_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    own = F.log_softmax(student.float() / temperature, dim=dim)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=dim)
    return temperature**2 * kl(target, own, dim)
