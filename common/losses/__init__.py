"""Distillation losses: pure functions, tensors in, scalar out, computed in fp32. Teacher tensors are never trained."""

from kd.common.losses.contrastive import noise_contrastive
from kd.common.losses.features import (
    attention_kl,
    attention_transfer,
    channel_kl,
    feature_cosine,
    feature_l2,
    spatial_kl,
)
from kd.common.losses.hierarchical import (
    attended_mean,
    hierarchical_l2,
    mean_below_zero,
    partial_l2,
    stage_attention,
)
from kd.common.losses.logits import (
    class_relations,
    class_similarity,
    correlation_loss,
    decoupled_kd,
    label_probability,
    sample_relations,
    standardized,
    transport,
)
from kd.common.losses.maps import nst, variational
from kd.common.losses.policies import gaussian_kl
from kd.common.losses.predictions import (
    cross_entropy_mix,
    hard_targets,
    jensen_shannon,
    regression_huber,
    regression_mix,
    regression_mse,
    soft_target_kl,
)
from kd.common.losses.relations import (
    correlation_congruence,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

__all__ = [
    "attended_mean",
    "attention_kl",
    "attention_transfer",
    "channel_kl",
    "class_relations",
    "class_similarity",
    "correlation_congruence",
    "correlation_loss",
    "cross_entropy_mix",
    "decoupled_kd",
    "feature_cosine",
    "feature_l2",
    "gaussian_kl",
    "hard_targets",
    "hierarchical_l2",
    "jensen_shannon",
    "label_probability",
    "mean_below_zero",
    "noise_contrastive",
    "nst",
    "partial_l2",
    "pkt",
    "regression_huber",
    "regression_mix",
    "regression_mse",
    "rkd_angle",
    "rkd_distance",
    "sample_relations",
    "similarity_preserving",
    "soft_target_kl",
    "spatial_kl",
    "stage_attention",
    "standardized",
    "transport",
    "variational",
]
