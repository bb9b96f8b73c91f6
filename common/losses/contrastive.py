"""Losses that tell one pair from many."""

import math

import torch.nn.functional as F
from torch import Tensor


def noise_contrastive(log_scores: Tensor, samples: int) -> Tensor:
    """-log(P / (P + c)) of the pair that belongs together - the sum of log(c / (P + c)) over those that do not.

    `log_scores` are log P (batch, 1 + negatives), the pair that belongs together first; c = negatives / samples is
    what noise would have, drawn from so many samples. The negatives are summed, the batch is averaged over.
    Noise-contrastive estimation as in CRD (arXiv:1910.10699), without the 1e-7 that its code adds to the denominators.
    Raises ValueError where there are no negatives.
    """
    negatives = log_scores.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"log_scores must hold a pair and its negatives, got {tuple(log_scores.shape)}")
    log_odds = log_scores.float() - math.log(negatives / samples)  # of belonging together against noise
    return -(F.logsigmoid(log_odds[:, 0]) + F.logsigmoid(-log_odds[:, 1:]).sum(1)).mean()
