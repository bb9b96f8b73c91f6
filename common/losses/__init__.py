"""Distillation losses: pure functions, tensors in, scalar out, computed in fp32. Teacher tensors are never trained."""

from common.losses.features import (
    attention_kl,
    attention_transfer,
    channel_kl,
    feature_cosine,
    feature_l2,
    spatial_kl,
)
from common.losses.policies import gaussian_kl
from common.losses.predictions import (
    cross_entropy_mix,
    hard_targets,
    jensen_shannon,
    regression_huber,
    regression_mix,
    regression_mse,
    soft_target_kl,
)

__all__ = [
    "attention_kl",
    "attention_transfer",
    "channel_kl",
    "cross_entropy_mix",
    "feature_cosine",
    "feature_l2",
    "gaussian_kl",
    "hard_targets",
    "jensen_shannon",
    "regression_huber",
    "regression_mix",
    "regression_mse",
    "soft_target_kl",
    "spatial_kl",
]
