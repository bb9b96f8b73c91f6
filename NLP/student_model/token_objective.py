"""The objective of language models and translators: labels, and divergences from the teacher's distributions over the
next token.

A divergence is a function of the logits (..., vocabulary) of student and teacher that returns its value (...) for each
token. Its keyword-only arguments are those of `--method NAME:argument=value`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kd.common import losses
from kd.common.methods import Method, parse_method
from kd.common.objective import Divergence
from kd.common.token_terms import TokenWeights, divergence_term, label_term, per_token
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import NotNegative, Positive, ProperShare
from kd.nlp.student_model.arguments import SEQUENCE_KD


def kd(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    """Forward divergence T^2 KL(teacher || student) (arXiv:1503.02531)."""
    return losses.soft_target_kl(student, teacher, temperature, reduction="none")


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    """Reverse divergence T^2 KL(student || teacher) (MiniLLM, arXiv:2306.08543)."""
    return losses.soft_target_kl(student, teacher, temperature, direction="reverse", reduction="none")


def js(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0, beta: ProperShare = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence (GKD, arXiv:2306.13649): T^2 (beta KL(teacher || m) + (1 - beta)
    KL(student || m)), m = beta teacher + (1 - beta) student. Near beta = 0 it is beta times the forward divergence.
    """
    return losses.jensen_shannon(student, teacher, temperature, beta, reduction="none")


def skew_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0, skew: ProperShare = 0.1) -> Tensor:
    """Skewed forward divergence T^2 KL(teacher || skew teacher + (1 - skew) student) (DistiLLM, arXiv:2402.03898)."""
    return losses.skew_kl(student, teacher, temperature, skew, reduction="none")


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0, skew: ProperShare = 0.1
) -> Tensor:
    """Skewed reverse divergence T^2 KL(student || skew student + (1 - skew) teacher) (DistiLLM, arXiv:2402.03898)."""
    return losses.skew_kl(student, teacher, temperature, skew, direction="reverse", reduction="none")


def tv(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    """Total variation distance, times T (f-distill, arXiv:2307.15190)."""
    return losses.total_variation(student, teacher, temperature, reduction="none")


def abkd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Positive = 2.0,
    alpha: NotNegative = 0.5,
    beta: NotNegative = 0.5,
) -> Tensor:
    """Alpha-beta divergence (ABKD, arXiv:2505.04560). alpha=1:beta=0 is the forward divergence, alpha=0:beta=1 the
    reverse one. The default is between them: four times the squared Hellinger distance, times T^2.
    """
    if alpha + beta == 0:
        raise UserError("method abkd needs alpha or beta above 0: raise one")
    return losses.alpha_beta(student, teacher, temperature, alpha, beta, reduction="none")


DIVERGENCES = {
    "kd": kd,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
    "abkd": abkd,
}


def divergence_of(spec: str, temperature: float) -> Divergence:
    """The divergence NAME or NAME:key=value:... of DIVERGENCES: logits (..., vocabulary) of student and teacher ->
    values (...), without a mean. Raises UserError as `parse_method` does, and for arguments that exclude each other.
    """
    divergence = parse_method(spec, DIVERGENCES, temperature=temperature)
    divergence(torch.zeros(1, 2), torch.zeros(1, 2))
    return divergence


class MethodParts(NamedTuple):
    """The parts of --method of a translator.

    on_translations: Train on the teacher's translations instead of the references.
    divergence: From the teacher's distributions, as `divergence_of` takes it; None to train on the tokens alone.
    """

    on_translations: bool
    divergence: str | None


def parts_of(method: str) -> MethodParts:
    """The parts of DIVERGENCE, `sequence_kd` or `sequence_kd+DIVERGENCE`."""
    if method == SEQUENCE_KD:
        return MethodParts(True, None)
    divergence = method.removeprefix(f"{SEQUENCE_KD}+")
    return MethodParts(divergence != method, divergence)


def token_level(
    alpha: float, divergence: Divergence, smoothing: float = 0.0, weights: TokenWeights = per_token
) -> Method:
    """alpha * cross-entropy with (smoothed) labels + (1 - alpha) * divergence from the teacher, means over tokens or,
    with the weights `per_sequence`, over sequences.
    """
    terms = label_term(smoothing, weights), divergence_term(divergence, weights)
    return Method({"task": (alpha, terms[0]), "tokens": (1 - alpha, terms[1])})
