"""Losses between distributions over different vocabularies, at positions where both models predict what follows the
same text. Logits are (positions, vocabulary), and the vocabularies may differ. Computed in fp32.
"""

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from kd.common.losses.predictions import Reduction
from kd.common.losses.shared import LOG_ZERO, kl, positive_temperature


def sorted_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Universal logit distillation (Boizard et al., arXiv:2402.12030): temperature * sum_i |p_(i) - q_(i)|.

    p and q are the teacher's and the student's probabilities at `temperature`, each in descending order; the smaller
    vocabulary is padded with probabilities of zero. This is the Wasserstein-1 distance if all pairs of different
    tokens have the same cost. Averaged over positions, or (positions,) with `reduction="none"`; at most
    2 * temperature. It compares the shapes of the distributions alone: a permutation of either vocabulary does not
    change it. Raises ValueError for a temperature that is not positive and for different numbers of positions.
    """
    _check(student_logits, teacher_logits, temperature)
    student, teacher = (
        F.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True).values
        for logits in (student_logits, teacher_logits.detach())
    )
    missing = teacher.shape[-1] - student.shape[-1]
    student, teacher = F.pad(student, (0, max(missing, 0))), F.pad(teacher, (0, max(-missing, 0)))
    distance = temperature * (student - teacher).abs().sum(dim=-1)
    return distance.mean() if reduction == "mean" else distance


def grouped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_groups: Tensor,
    teacher_groups: Tensor,
    number: int,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature^2 * KL(P || Q), where P(g) and Q(g) are proportional to p(g)^(1/temperature) and
    q(g)^(1/temperature), the probabilities of teacher and student of all tokens of group g. Averaged over positions,
    or (positions,) with `reduction="none"`.

    The temperature applies to groups, not to tokens: otherwise it would move probability to groups of many tokens,
    which differ between the vocabularies.

    Args:
        student_groups, teacher_groups: (vocabulary,), the group of each token, from 0 to `number`. The tokens of group
            `number` are left out, and the probabilities of the others sum to 1. In both vocabularies, each other group
            has a token.

    With one token in each group it is `soft_target_kl`. Raises ValueError for a temperature that is not positive and
    for different numbers of positions.
    """
    _check(student_logits, teacher_logits, temperature)
    student, teacher = (
        F.log_softmax(_group_logits(logits, groups, number) / temperature, dim=-1)
        for logits, groups in ((student_logits, student_groups), (teacher_logits.detach(), teacher_groups))
    )
    divergence = temperature**2 * kl(teacher, student, dim=-1)
    return divergence.mean() if reduction == "mean" else divergence


def _group_logits(logits: Tensor, groups: Tensor, number: int) -> Tensor:
    """Logits (positions, vocabulary) -> log of the summed exponentials (positions, number) of the groups."""
    logits, index = logits.float(), repeat(groups, "token -> position token", position=len(logits))
    largest = logits.new_full((len(logits), number + 1), LOG_ZERO).scatter_reduce(1, index, logits.detach(), "amax")
    sums = torch.zeros_like(largest).scatter_add(1, index, (logits - largest.gather(1, index)).exp())
    return sums[:, :number].log() + largest[:, :number]


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    positive_temperature(temperature)
    if len(student_logits) != len(teacher_logits):
        raise ValueError(f"numbers of positions differ: {len(student_logits)} and {len(teacher_logits)}")
