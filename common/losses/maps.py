"""Losses between maps (batch, channels, height, width) as distributions: of neurons, and of values."""

from torch import Tensor

from kd.common.losses.shared import product, same_shape, unit, weighted_mean


def nst(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps (NST, arXiv:1707.01219).

    mean k(t, t') + mean k(s, s') - 2 mean k(s, t) over all pairs of channels, k(a, b) = (a^T b)^2; a channel is the
    vector of its values at all places, scaled to length 1. Maps are of one size, of any two numbers of channels;
    averaged over the batch, of which `mask` (batch,) may keep a part. Raises ValueError for maps of different size.
    """
    own, target = (unit(x.float().flatten(2)) for x in (student, teacher.detach()))  # (batch, channels, places)
    same_shape(own[:, 0], target[:, 0])
    discrepancy = _mean_kernel(target, target) + _mean_kernel(own, own) - 2 * _mean_kernel(own, target)  # (batch,)
    return weighted_mean(discrepancy, mask)


def variational(student: Tensor, teacher: Tensor, variance: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all elements of 0.5 * [(student - teacher)^2 / variance + log variance] (VID, arXiv:1904.05835).

    What the teacher's map costs, but for a constant, under a Gaussian around what the student's says of it, with a
    variance for each channel (channels,): a lower bound on their mutual information, the sign turned. Can be negative,
    and is least where the variance is the mean squared difference. `mask` (batch,) restricts the mean to the samples
    that it keeps. Raises ValueError for maps whose shapes differ.
    """
    same_shape(student, teacher)
    variance = variance.float()[:, None, None]  # (channels, 1, 1)
    squares = (student.float() - teacher.detach().float()).square()
    return weighted_mean((squares / variance + variance.log()) / 2, mask)


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    return product(first, second.transpose(1, 2)).square().mean((1, 2))
