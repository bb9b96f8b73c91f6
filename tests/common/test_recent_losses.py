"""Refined logits (RLD), alpha-beta divergence (ABKD) and virtual relations (VRM) against independent computations."""

import math
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, zscore

from kd.common import losses
from kd.common.methods import TaskSpec
from kd.common.methods.classification import LOGIT_METHODS
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError

# The teacher is right about the first two samples. It ranks one class above the label of the third, and all above that
# of the last.
LABELS = torch.tensor([0, 2, 1, 3])
TEACHER = torch.tensor([[4.0, 1.0, 0.5, -1.0], [0.0, 1.0, 3.0, 2.0], [2.5, 2.0, -1.0, 0.0], [1.0, 2.0, 0.5, -3.0]])


def logits(rows: int = 4, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def spec(classes: int = 4, views: int = 1) -> TaskSpec:
    def never(*_):
        raise AssertionError("logits are all that these methods need")

    return TaskSpec(classes, None, None, never, never, never, LABELS, never, views)


# ---- RLD ----


def test_refined_kd_by_hand():
    """Two divergences for each sample, over lists of classes."""
    student = logits()
    total = 0.0
    for s, t, label in zip(student.double().numpy(), TEACHER.double().numpy(), LABELS.tolist(), strict=True):
        confidence, found = softmax(t / 3).max(), softmax(s / 3)[label]
        total += 0.5 * entropy([confidence, 1 - confidence], [found, 1 - found])
        below = [c for c in range(4) if t[c] < t[label]]
        if below:
            total += 2.0 * entropy(softmax(t[below] / 3), softmax(s[below] / 3))
    found = losses.refined_kd(student, TEACHER, LABELS, alpha=0.5, beta=2.0, temperature=3.0)
    assert found.item() == pytest.approx(9 * total / 4, rel=1e-5)


def test_refined_kd_is_decoupled_kd_where_the_teacher_is_right():
    student, teacher, labels = logits()[:2], TEACHER[:2], LABELS[:2]
    found = losses.refined_kd(student, teacher, labels, 1.0, 8.0, 4.0)
    assert found.item() == pytest.approx(losses.decoupled_kd(student, teacher, labels, 1.0, 8.0, 4.0).item(), rel=1e-5)


def test_refined_kd_matches_no_wrong_class():
    """Where the teacher is wrong, the target for the label's probability is the teacher's confidence, unlike in DKD,
    and the logits of classes that the teacher ranks above the label have no effect on the second divergence.
    """
    teacher, label = TEACHER[2:3], LABELS[2:3]
    student = torch.tensor([[-1.0, 4.0, -2.0, -1.0]])
    moved = torch.tensor([[-9.0, 4.0, -2.0, -1.0]])  # class 0 is the teacher's prediction
    correlation = partial(losses.refined_kd, teacher_logits=teacher, labels=label, alpha=0.0, temperature=1.0)
    assert correlation(student).item() == pytest.approx(correlation(moved).item(), rel=1e-5)
    confidence = softmax(teacher.numpy(), 1).max()
    sure = torch.log(torch.tensor([[(1 - confidence) / 3, confidence, (1 - confidence) / 3, (1 - confidence) / 3]]))
    assert losses.refined_kd(sure, teacher, label, beta=0.0, temperature=1.0).item() == pytest.approx(0, abs=1e-6)
    assert losses.decoupled_kd(sure, teacher, label, beta=0.0, temperature=1.0) > 0.01


def test_a_label_below_all_other_classes_leaves_only_the_confidence():
    student = logits(1).requires_grad_()
    loss = losses.refined_kd(student, TEACHER[3:], LABELS[3:], alpha=0.0)
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


# ---- ABKD ----


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 1.0, 0.09),  # half the squared distance
        (0.5, 0.5, 4 * (1 - math.sqrt(0.4) - math.sqrt(0.1))),  # four times the squared Hellinger distance
        (1.0, 0.0, 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
        (0.0, 1.0, -0.5 * math.log(1.6) - 0.5 * math.log(0.4)),
        (2.0, 0.0, (0.64 * math.log(2.56) + 0.04 * math.log(0.16) - 0.68 + 0.5) / 4),
        (0.8, 0.3, -(sum(p**0.8 * 0.5**0.3 - (0.8 * p**1.1 + 0.3 * 0.5**1.1) / 1.1 for p in (0.8, 0.2)) / 0.24)),
    ],
)
def test_alpha_beta_divergence_of_two_classes_by_hand(alpha, beta, expected):
    """The teacher's probabilities are 0.8 and 0.2, the student's are equal."""
    teacher = torch.tensor([[0.8, 0.2]]).log()
    found = losses.alpha_beta(torch.zeros(1, 2), teacher, alpha=alpha, beta=beta)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    at_three = losses.alpha_beta(torch.zeros(1, 2), 3 * teacher, 3.0, alpha, beta)
    assert at_three.item() == pytest.approx(9 * expected, abs=1e-5)


def test_alpha_beta_divergence_contains_both_kls_and_their_gradients():
    for settings, direction in (((1.0, 0.0), "forward"), ((0.0, 1.0), "reverse")):
        first, second = logits().requires_grad_(), logits().requires_grad_()
        found = losses.alpha_beta(first, TEACHER, 4.0, *settings)
        expected = losses.soft_target_kl(second, TEACHER, 4.0, direction=direction)
        found.backward()
        expected.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("near", "limit"), [((0.7, 0.005), (0.7, 0.0)), ((0.005, 0.7), (0.0, 0.7))])
def test_the_limits_of_the_divergence_are_continuous(near, limit):
    student, teacher = logits(), TEACHER
    found = losses.alpha_beta(student, teacher, 2.0, *near)
    assert found.item() == pytest.approx(losses.alpha_beta(student, teacher, 2.0, *limit).item(), rel=0.02)


def test_sample_weights_select_positions():
    student, weights = logits(), torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = losses.alpha_beta(student, TEACHER, sample_weights=weights)
    assert found.item() == pytest.approx(losses.alpha_beta(student[:1], TEACHER[:1]).item(), rel=1e-5)


def test_arguments_of_the_divergence_are_checked():
    for settings in ((1.0, -0.1, 0.5), (1.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="not both 0"):
            losses.alpha_beta(logits(), TEACHER, *settings)
    with pytest.raises(ValueError, match="must be positive"):
        losses.alpha_beta(logits(), TEACHER, 0.0)
    with pytest.raises(UserError, match="abkd needs alpha or beta above 0"):
        LOGIT_METHODS["abkd"](spec(), alpha=0.0, beta=0.0)


# ---- VRM ----


def directions(pairs):
    return [(a - b) / np.linalg.norm(a - b) for a, b in pairs]


def huber(first, second):
    gaps = np.abs(first - second)
    return np.where(gaps <= 1, gaps**2 / 2, gaps - 0.5).sum()


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_relations_across_views_by_hand(keep):
    """Between each real and each virtual view, in loops; the pairs with the largest joint entropy are pruned."""
    student, teacher = logits(6, 5), logits(6, 5, seed=1)  # two views of three samples
    z, t = (zscore(x.double().numpy(), 1, ddof=1) for x in (student, teacher))
    pairs = [(m, n) for m in range(3) for n in range(3, 6)]
    student_edges, edges = (directions([(x[m], x[n]) for m, n in pairs]) for x in (z, t))
    certainty = entropy(softmax(student.double().numpy(), 1), axis=1)
    order = np.argsort([certainty[m] + certainty[n] for m, n in pairs])[: math.ceil(9 * keep)]
    expected = np.mean([huber(student_edges[i], edges[i]) for i in order])
    found = losses.sample_directions(student, teacher, views=2, keep=keep)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_relations_between_classes_by_hand():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    z, t = (zscore(x.double().numpy(), 1, ddof=1).T for x in (student, teacher))
    edges = zip(*(directions(combinations(x, 2)) for x in (z, t)), strict=True)
    expected = np.mean([huber(a, b) for a, b in edges])
    assert losses.class_directions(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_relations_ignore_shift_and_scale_and_pruned_samples_have_no_gradient():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    for loss in (partial(losses.sample_directions, views=2), losses.class_directions):
        assert loss(3 * teacher + 1, teacher).item() == pytest.approx(0, abs=1e-5)
    student[1] = 0.01 * student[1]  # nearly uniform: all pairs with it have a large joint entropy
    student.requires_grad_()
    losses.sample_directions(student, teacher, views=2, keep=0.3).backward()
    assert student.grad[1].eq(0).all() and student.grad[[0, 2]].abs().sum() > 0


def test_one_view_relates_the_samples_of_the_batch():
    student, teacher = logits(4, 5), logits(4, 5, seed=1)
    z, t = (zscore(x.double().numpy(), 1, ddof=1) for x in (student, teacher))
    edges = zip(*(directions(combinations(x, 2)) for x in (z, t)), strict=True)
    among = sum(2 * huber(a, b) for a, b in edges) / 16  # both orders of a pair, and samples with themselves
    assert losses.sample_directions(student, teacher, keep=1.0).item() == pytest.approx(among, rel=1e-4)


def test_vrm_relates_the_first_view_to_the_second():
    student, teacher, labels = logits(8), logits(8, seed=1), LABELS.repeat(2)
    parts = LOGIT_METHODS["vrm"](spec(views=2), sample_weight=3.0, class_weight=5.0, keep=0.7).objective(
        Outputs(logits=student), Outputs(logits=teacher), labels
    )
    assert parts["samples"].item() == pytest.approx(3 * losses.sample_directions(student, teacher, 2, 0.7).item())
    assert parts["classes"].item() == pytest.approx(5 * losses.class_directions(student, teacher).item())
    assert parts["task"].item() == pytest.approx(torch.nn.functional.cross_entropy(student, labels).item())
