"""Losses between distributions over different vocabularies: values by hand, invariances and gradients."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kd.common.losses import grouped_kl, soft_target_kl, sorted_probabilities

STUDENT = torch.tensor([[0.3, 0.5, 0.2], [0.1, 0.1, 0.8]])
TEACHER = torch.tensor([[0.1, 0.6, 0.25, 0.05], [0.1, 0.0, 0.1, 0.8]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_distance_of_sorted_probabilities_by_hand(temperature: float) -> None:
    """0.5, 0.3, 0.2, 0 and 0.6, 0.25, 0.1, 0.05 differ by 0.1 + 0.05 + 0.1 + 0.05; the second position does not."""
    student, teacher = ((p + 1e-30).log() * temperature for p in (STUDENT, TEACHER))  # softmax(logits / T) is p
    expected = temperature * (0.1 + 0.05 + 0.1 + 0.05) / 2
    assert sorted_probabilities(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert sorted_probabilities(teacher, student, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_a_permutation_of_either_vocabulary_does_not_change_the_distance() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 11)
    expected = sorted_probabilities(student, teacher)
    torch.testing.assert_close(sorted_probabilities(student[:, torch.randperm(7)], teacher), expected)
    torch.testing.assert_close(sorted_probabilities(student, teacher[:, torch.randperm(11)]), expected)
    assert sorted_probabilities(student, student[:, torch.randperm(7)]).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_distance_by_hand() -> None:
    """The largest probability of the student is too small, the others too large: signs -1, 1 and 1 in their order."""
    logits = STUDENT[:1].log().requires_grad_()
    teacher = torch.tensor([[0.15, 0.7, 0.15]]).log().requires_grad_()
    sorted_probabilities(logits, teacher).backward()
    signs = torch.tensor([1.0, -1.0, 1.0])
    total = (signs * STUDENT[0]).sum()
    torch.testing.assert_close(logits.grad, (STUDENT[0] * (signs - total))[None])
    assert teacher.grad is None


def test_the_divergence_of_groups_by_hand() -> None:
    """The teacher's last token is left out: P = (0.4, 0.4) / 0.8 and Q = (0.2, 0.8)."""
    student, teacher = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    groups = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1, 2])
    expected = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert grouped_kl(student, teacher, *groups, number=2).item() == pytest.approx(expected, rel=1e-5)


def test_the_temperature_applies_to_groups() -> None:
    """At temperature 2, P and Q are the normalized square roots of (0.5, 0.5) and (0.1, 0.9)."""
    student, teacher = torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    groups = torch.tensor([0, 1]), torch.tensor([0, 1, 1, 1])
    low, high = math.sqrt(0.1), math.sqrt(0.9)
    expected = 4 * (0.5 * math.log(0.5 * (low + high) / low) + 0.5 * math.log(0.5 * (low + high) / high))
    assert grouped_kl(student, teacher, *groups, 2, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)
    # how a group is divided into tokens has no effect
    whole = torch.tensor([[0.5, 0.5]]).log()
    found = grouped_kl(student, whole, torch.arange(2), torch.arange(2), 2, temperature=2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_one_token_in_each_group_is_the_forward_divergence(scale: float) -> None:
    """For confident logits too, and for a teacher whose tokens are in another order."""
    student, teacher = (scale * torch.randn(6, 9)).requires_grad_(), scale * torch.randn(6, 9)
    order = torch.randperm(9)
    found = grouped_kl(student, teacher[:, order], torch.arange(9), order, 9, temperature=2.0)
    expected = soft_target_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize(
    "loss", [sorted_probabilities, partial(grouped_kl, student_groups=torch.arange(3), teacher_groups=torch.arange(3),
                                           number=3)],
)  # fmt: skip
def test_invalid_arguments(loss: Any) -> None:
    logits: Tensor = torch.randn(2, 3)
    with pytest.raises(ValueError, match="positive"):
        loss(logits, logits, temperature=0)
    with pytest.raises(ValueError, match="2 and 1"):
        loss(logits, logits[:1])
