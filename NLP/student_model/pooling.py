"""The pooling of hidden states: the input of the head of a text classifier, or of a bottleneck."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.utils.tasks import TaskType
from kd.nlp.teacher_model.teacher import is_decoder

Pooling = Literal["mean", "cls", "last", "tokens"]


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pools hidden states (batch, positions, hidden) to (batch, hidden) in fp32; `tokens` leaves them unpooled.

    `cls` takes the first position, `last` the last one that is not padding, with padding on either side. Raises
    ValueError if `mean` is called without a mask.
    """
    hidden = hidden.float()
    if pooling == "tokens":
        return hidden
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[:, -1] if mask is None else hidden[torch.arange(len(hidden)), last_positions(mask)]
    if mask is None:
        raise ValueError("the mean of hidden states needs an attention mask")
    weights = rearrange(mask, "batch position -> batch position 1").to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def last_positions(mask: Tensor) -> Tensor:
    """The last position (batch,) that an attention mask (batch, positions) keeps, with padding on either side."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def head_pooling(model: PreTrainedModel, task: TaskType) -> Pooling:
    """The hidden states that the head of a classifier reads: those of all tokens for token_classification, of the last
    token for a decoder, and of the first token, or the mean, for an encoder.
    """
    if task == "token_classification":
        return "tokens"
    if is_decoder(model.config):
        return "last"
    pooling: Pooling = getattr(model.config, "classifier_pooling", "cls")  # of ModernBERT
    return pooling
