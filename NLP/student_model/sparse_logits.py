"""A teacher's distributions over the next token as a few tokens and numbers per label, in two forms.

- `top:k=64`: the k most probable tokens with their probabilities, and the mass of all others, which count as one token
  (`top_classes_kl`). The student is free in the shape of the rest, so the gradient is biased.
- `sample:k=16`: k draws from the teacher's distribution p (Sparse Logit Sampling, arXiv:2503.16870). Drawn c_i times,
  token i has the weight c_i / k, whose expectation is p_i, so the gradient of the forward KL is unbiased
  (`sampled_kl`). With `exponent=t` the proposal is q = p^t, normalized, and the weight c_i p_i / (k q_i). Weights are
  not normalized over the drawn tokens, which would bias them.

Both are of the distribution at the temperature of the loss: a sample at another temperature would need the
probabilities of all tokens. Draws are stratified: the j-th of k inverts the cumulative distribution at a uniform
number of [(j - 1) / k, j / k]. This is unbiased too and never varies more than independent draws, those of the paper,
which are `stratified=false`.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from kd.common.losses import sampled_kl, top_classes_kl
from kd.common.methods import parse_method
from kd.common.training.teacher_outputs import half_precision
from kd.common.utils.ranges import Count, Positive, Range, Seed

AT_ONCE = 2**24  # probabilities that are computed at once, in fp64
SMALL = 2**16  # vocabularies up to this size have token ids of two bytes
MOST_DRAWS = 2**11  # fp16 has the numbers up to this one without rounding
Columns = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Top:
    """The k most probable tokens, and the mass of the others."""

    k: Count = 64

    def compress(self, logits: Tensor, temperature: float, sample_id: int) -> Columns:
        """`tokens` (labels, k) and `probabilities` (labels, k + 1) in fp16, of logits (labels, vocabulary)."""
        parts = []
        for chunk in _chunks(logits):
            probabilities = (chunk.double() / temperature).softmax(dim=-1)
            values, tokens = probabilities.topk(self.k, dim=-1)
            others = probabilities.scatter(-1, tokens, 0.0).sum(dim=-1, keepdim=True)
            numbers = torch.cat([values, others], dim=-1)
            parts.append({"tokens": _token_ids(tokens, logits), "probabilities": numbers.half()})
        return joined(parts)

    def rows(self, columns: Columns) -> list[Tensor]:
        """The columns with one row for each label, as `loss` takes them."""
        return [columns["tokens"], columns["probabilities"]]

    def loss(self, logits: Tensor, tokens: Tensor, probabilities: Tensor, *, temperature: float) -> Tensor:
        """The loss (labels,) of logits (labels, vocabulary)."""
        return top_classes_kl(logits, tokens, probabilities, temperature, "none")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """k draws from the teacher's distribution to the power `exponent`, normalized."""

    k: Annotated[int, Range(1, MOST_DRAWS)] = 16
    exponent: Positive = 1.0
    stratified: bool = True
    seed: Seed = 0

    def compress(self, logits: Tensor, temperature: float, sample_id: int) -> Columns:
        """Of logits (labels, vocabulary): the distinct drawn `tokens` of all labels in one vector, `weights` in fp16,
        which are k times those of the loss, the number of tokens of each label as `sizes`, and the `entropy`.

        The draws depend on the logits, the seed and the sample id alone, not on the batch.
        """
        uniforms = np.random.default_rng([self.seed, sample_id]).random((len(logits), self.k))
        if self.stratified:
            uniforms = (np.arange(self.k) + uniforms) / self.k
        chunks, numbers = _chunks(logits), torch.from_numpy(uniforms)
        rows = numbers.split([len(chunk) for chunk in chunks])
        return joined(
            [self._drawn(chunk.double() / temperature, row) for chunk, row in zip(chunks, rows, strict=True)]
        )

    def _drawn(self, logits: Tensor, uniforms: Tensor) -> Columns:
        log_p = logits.log_softmax(dim=-1)
        log_q = log_p if self.exponent == 1 else (self.exponent * log_p).log_softmax(dim=-1)
        cumulative = log_q.exp().cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniforms.to(logits.device) * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=logits.shape[-1] - 1).sort(dim=-1).values
        is_first = torch.ones_like(drawn, dtype=torch.bool)
        is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        places = is_first.flatten().nonzero().flatten()
        counts = torch.diff(places, append=torch.full_like(places[:1], drawn.numel()))
        tokens, labels = drawn.flatten()[places], places // self.k
        return {
            "tokens": _token_ids(tokens, logits),
            "weights": half_precision(counts * (log_p - log_q)[labels, tokens].exp()),
            "sizes": is_first.sum(dim=-1).to(torch.int16),
            "entropy": torch.special.entr(log_p.exp()).sum(dim=-1).half(),
        }

    def rows(self, columns: Columns) -> list[Tensor]:
        """The columns with one row for each label, as `loss` takes them. Weights are 0 after the last drawn token."""
        is_drawn = torch.arange(self.k, device=columns["sizes"].device) < columns["sizes"][:, None]
        tokens = torch.zeros_like(is_drawn, dtype=torch.long).masked_scatter(is_drawn, columns["tokens"])
        weights = torch.zeros_like(is_drawn, dtype=torch.float)
        weights = weights.masked_scatter(is_drawn, columns["weights"].float() / self.k)
        return [tokens, weights, columns["entropy"]]

    def loss(self, logits: Tensor, tokens: Tensor, weights: Tensor, entropy: Tensor, *, temperature: float) -> Tensor:
        """The estimated loss (labels,) of logits (labels, vocabulary)."""
        return sampled_kl(logits, tokens, weights, entropy, temperature, "none")


Form = Top | Sample
FORMS: dict[str, type[Form]] = {"top": Top, "sample": Sample}


def form_of(spec: str) -> Form:
    """The form NAME or NAME:key=value:... of FORMS. Raises UserError as `parse_method` does."""
    form: Form = parse_method(spec, FORMS)()
    return form


def spec_of(form: Form) -> str:
    """The form as a spec with all of its arguments."""
    name = next(name for name, kind in FORMS.items() if isinstance(form, kind))
    return ":".join([name, *(f"{key}={value}" for key, value in asdict(form).items())])


def joined(parts: list[Columns]) -> Columns:
    """The columns of several parts, one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    logits = logits.cpu() if logits.device.type == "mps" else logits  # it has no fp64
    return logits.split(max(1, AT_ONCE // logits.shape[-1]))


def _token_ids(tokens: Tensor, logits: Tensor) -> Tensor:
    return tokens.to(torch.uint16 if logits.shape[-1] <= SMALL else torch.int32)
