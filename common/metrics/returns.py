"""Metrics of policies, from the returns of whole episodes (episodes,)."""

import numpy as np
from scipy.stats import trim_mean

RESAMPLES = 2000


def return_metrics(returns: np.ndarray, seed: int = 0) -> dict[str, float | int | list[float]]:
    """return_mean, return_std, return_iqm, return_ci95 and episodes of returns (episodes,).

    return_std is that of the sample (n - 1), 0 for one episode. return_iqm is the interquartile mean, without the
    lowest and the highest quarter, each rounded down to whole episodes (arXiv:2108.13264). return_ci95 is [low, high]
    of the mean, a percentile bootstrap that depends on nothing but the returns and `seed`; it is too narrow for few
    episodes, and says nothing of the variation between training runs. Raises ValueError for no episodes, another shape
    and returns that are not finite.
    """
    if returns.ndim != 1 or not returns.size:
        raise ValueError(f"need returns (episodes,) of at least one episode, got {returns.shape}")
    if not np.isfinite(returns).all():
        raise ValueError("returns must be finite, got NaN or infinity")
    returns = returns.astype(np.float64)
    # Everything is measured from one of the returns, so that rounding makes no spread where all are equal.
    origin = returns[0]
    offsets = returns - origin
    means = np.random.default_rng(seed).choice(offsets, size=(RESAMPLES, offsets.size)).mean(axis=1)
    low, high = origin + np.quantile(means, [0.025, 0.975])
    return {
        "return_mean": float(origin + offsets.mean()),
        "return_std": float(offsets.std(ddof=1)) if offsets.size > 1 else 0.0,
        "return_iqm": float(origin + trim_mean(offsets, 0.25)),
        "return_ci95": [float(low), float(high)],
        "episodes": int(offsets.size),
    }


def normalized_return(value: float, random: float, teacher: float) -> float | None:
    """(value - random) / (teacher - random): 0 is a random policy and 1 is the teacher, for negative returns as well.

    None where the teacher is no better than a random policy, which leaves no scale.
    """
    return None if teacher <= random else (value - random) / (teacher - random)
