"""Terms of the objective over the tokens of language models, in chunks of positions.

For its gradient, a loss between logits (batch, positions, vocabulary) keeps several fp32 tensors of their size. Here,
a loss over more than CHUNK logits keeps none: it is computed a few positions at a time, and again in backward. All
terms of an objective share one pass and one gradient, whose size is that of the student's logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.common.outputs import Outputs, require
from kd.common.utils.tasks import IGNORED

CHUNK = 2**21  # logits: 8 MiB in fp32, of which a chunk needs about 20

TokenLoss = Callable[..., Tensor]
Inputs = Callable[[Outputs | None, Tensor | None], Sequence[Tensor]]
TokenWeights = Callable[[Outputs, Tensor | None], Tensor]
SumOverRows = Callable[[Tensor, Tensor], Tensor]


def per_token(student: Outputs, labels: Tensor | None) -> Tensor:
    """Weights (batch, positions) of the mean over all tokens whose label is not IGNORED; all zero without one."""
    counts = (require(labels, "labels") != IGNORED).float()
    return counts / counts.sum().clamp(min=1)


def per_sequence(student: Outputs, labels: Tensor | None) -> Tensor:
    """Weights (batch, positions) of the mean over sequences of the mean over the tokens of each, as in `per_token`.
    Sequences without a label do not count.
    """
    counts = (require(labels, "labels") != IGNORED).float()
    tokens = counts.sum(dim=1, keepdim=True)
    return counts / tokens.clamp(min=1) / (tokens > 0).sum().clamp(min=1)


def all_tokens(student: Outputs, labels: Tensor | None) -> Tensor:
    """Weights (batch, positions) of the mean over all tokens that are not padding, with a label or without."""
    logits, mask = require(student.logits, "student logits"), student.mask
    counts = logits.new_ones(logits.shape[:2], dtype=torch.float32) if mask is None else mask.float()
    return counts / counts.sum().clamp(min=1)


class TokenTerm:
    """A term that is a weighted sum of a loss over the tokens of a batch; 0 if all weights are.

    Args:
        loss: (logits (tokens, vocabulary) of the student, *inputs (tokens, ...)) -> (tokens,). It must not depend on
            other tokens, and only the student's logits have a gradient.
        inputs: (teacher outputs, labels) -> further tensors (batch, positions, ...) that the loss takes.
        weights: (student outputs, labels) -> weights (batch, positions). Tokens of weight zero are not computed.
    """

    needs_labels = False  # of all rows

    def __init__(self, loss: TokenLoss, inputs: Inputs, weights: TokenWeights = per_token) -> None:
        self.loss, self.inputs, self.weights = loss, inputs, weights

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        return token_sums([self], student, teacher, labels)[0]


def label_term(smoothing: float = 0.0, weights: TokenWeights = per_token) -> TokenTerm:
    """The cross-entropy with the labels of tokens, with label smoothing (arXiv:1512.00567)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
        )

    return TokenTerm(loss, lambda teacher, labels: [require(labels, "labels")], weights)


def divergence_term(divergence: TokenLoss, weights: TokenWeights = per_token) -> TokenTerm:
    """A divergence from the teacher's distributions: (student logits, teacher logits), both (tokens, vocabulary), ->
    (tokens,).
    """

    def logits(teacher: Outputs | None, labels: Tensor | None) -> Sequence[Tensor]:
        return [require(teacher.logits if teacher else None, "teacher logits")]

    return TokenTerm(divergence, logits, weights)


def token_sums(terms: Sequence[TokenTerm], student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
    """The values (terms,) of several terms, from one pass over the student's logits."""
    logits = require(student.logits, "student logits").flatten(0, 1)
    weights = torch.stack([term.weights(student, labels).flatten() for term in terms])
    inputs = [[tensor.flatten(0, 1).detach() for tensor in term.inputs(teacher, labels)] for term in terms]

    def sums(logits: Tensor, rows: Tensor) -> Tensor:
        logits = logits.float()  # before the losses, so that their gradients add up in fp32
        each = [term.loss(logits, *(t[rows] for t in others)) for term, others in zip(terms, inputs, strict=True)]
        return (weights[:, rows] * torch.stack(each)).sum(dim=1)

    return sum_over_rows(sums, logits, weights.any(dim=0).nonzero().flatten())


def sum_over_rows(function: SumOverRows, logits: Tensor, rows: Tensor) -> Tensor:
    """Sums a function over some of the rows of logits (all rows, vocabulary).

    `function` maps logits (some rows, vocabulary), and the numbers of their rows, to sums (values, ...) over these
    rows.
    """
    if len(rows) * logits.shape[1] <= CHUNK:
        return function(logits[rows], rows)
    return _SumInChunks.apply(logits, rows, function)


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, function: SumOverRows) -> Tensor:
        ctx.save_for_backward(logits, rows)
        ctx.function = function
        return torch.stack([function(logits[some], some) for some in _chunks(rows, logits)]).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, rows = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for some in _chunks(rows, logits):
            with torch.enable_grad():
                chunk = logits[some].requires_grad_()
                (gradient[some],) = torch.autograd.grad(ctx.function(chunk, some), chunk, slope)
        return gradient, None, None


def _chunks(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, CHUNK // logits.shape[1]))
