"""Losses of several levels and contrastive losses: closed forms, integration, and numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import softmax
from scipy.stats import norm

from kd.common import losses


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slope_is_the_gradient(loss, x):
    """Along a random direction, by a difference quotient."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    direction, step = maps(*x.shape, seed=9), 1e-2
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-3)


# ---- the mean below zero ----


@pytest.mark.parametrize("mean", [-2.0, -0.3, 0.0, 0.7, 2.5])
@pytest.mark.parametrize("deviation", [0.2, 1.0, 3.0])
def test_the_mean_below_zero_equals_integration(mean, deviation):
    density = norm(mean, deviation).pdf
    below = min(mean, 0) - 40 * deviation
    weighted, mass = (quad(f, below, 0, epsabs=0, limit=500)[0] for f in (lambda x: x * density(x), density))
    found = losses.mean_below_zero(torch.tensor(mean), torch.tensor(deviation)).item()
    assert found == pytest.approx(weighted / mass, rel=1e-5)
    assert losses.mean_below_zero(torch.tensor(mean), torch.tensor(-deviation)).item() == found


@pytest.mark.parametrize("z", [5.0, 40.0, 1e3, 1e6])
def test_the_mean_below_zero_is_accurate_for_small_probabilities(z):
    """Compares with the asymptotic series -1/z + 2/z^3 for deviation 1."""
    found = losses.mean_below_zero(torch.tensor(z), torch.tensor(1.0)).item()
    assert found == pytest.approx(-1 / z + 2 / z**3, rel=0.02, abs=1e-9)


def test_the_mean_below_zero_without_deviation_is_the_mean_or_zero():
    means = torch.tensor([-3.0, 0.0, 2.0, 1e4, -1e4])
    found = losses.mean_below_zero(means, torch.zeros(5))
    torch.testing.assert_close(found, means.clamp(max=0), rtol=0, atol=1e-9)


# ---- partial L2 ----


def test_partial_l2_by_hand():
    """Margin -1. A positive target always counts; a negative one counts only if the student is above the margin."""
    target = torch.tensor([[2.0, 2.0, -0.5, -0.5, -3.0, -3.0, -3.0]])
    student = torch.tensor([[3.0, -1.0, 0.5, -0.8, 0.0, -2.0, -1.0]])
    expected = 1 + 9 + 1 + 0 + 1 + 0 + 0  # targets 2, 2, -0.5, none, -1, none, at the margin
    loss = losses.partial_l2(student.view(1, 1, 1, 7), target.view(1, 1, 1, 7), torch.tensor([-1.0]))
    assert loss.item() == pytest.approx(expected)


def test_partial_l2_sums_over_maps_and_averages_over_the_batch():
    student, teacher, margin = maps(3, 2, 2, 2), 2 * maps(3, 2, 2, 2, seed=1), torch.tensor([-0.1, -1.5])
    expected = np.zeros(3)
    for b, c, y, x in np.ndindex(3, 2, 2, 2):
        s, t = student[b, c, y, x].item(), max(teacher[b, c, y, x].item(), margin[c].item())
        expected[b] += 0 if s <= t <= 0 else (s - t) ** 2
    assert losses.partial_l2(student, teacher, margin).item() == pytest.approx(expected.mean(), rel=1e-5)
    kept = losses.partial_l2(student, teacher, margin, torch.tensor([True, False, True]))
    assert kept.item() == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)
    slope_is_the_gradient(lambda x: losses.partial_l2(x, teacher, margin), student)


def test_partial_l2_has_no_gradient_below_the_relu():
    student = torch.full((1, 1, 2, 2), -5.0, requires_grad=True)
    losses.partial_l2(student, torch.full((1, 1, 2, 2), -2.0), torch.tensor([-1.0])).backward()
    assert torch.equal(student.grad, torch.zeros(1, 1, 2, 2))


# ---- several sizes ----


def averaged(x, size):
    """(batch, channels, h, w) -> (batch, channels, size, size), by numpy."""
    b, c, h, w = x.shape
    return x.reshape(b, c, size, h // size, size, w // size).mean((3, 5))


@pytest.mark.parametrize(
    ("size", "weights"),
    [(8, {8: 1, 4: 1 / 2, 2: 1 / 4, 1: 1 / 8}), (4, {4: 1, 2: 1 / 2, 1: 1 / 4}), (2, {2: 1, 1: 1 / 2}), (1, {1: 1})],
)
def test_hierarchical_l2_by_hand(size, weights):
    pred, target = maps(2, 3, size, size), maps(2, 3, size, size, seed=1)
    a, b = pred.double().numpy(), target.double().numpy()
    expected = sum(w * np.square(averaged(a, s) - averaged(b, s)).mean() for s, w in weights.items())
    assert losses.hierarchical_l2(pred, target).item() == pytest.approx(expected / sum(weights.values()), rel=1e-5)
    slope_is_the_gradient(lambda x: losses.hierarchical_l2(x, target), pred)


def test_hierarchical_l2_of_a_constant_difference_is_its_square():
    pred = maps(2, 3, 8, 8)
    assert losses.hierarchical_l2(pred, pred + 3).item() == pytest.approx(9, rel=1e-5)


# ---- stages with stages ----


def test_stage_attention_is_the_softmax_of_products():
    queries, keys = maps(4, 3, 5), maps(4, 2, 5, seed=1)
    attention = losses.stage_attention(queries, keys)
    for image in range(4):
        scores = queries[image].double().numpy() @ keys[image].double().numpy().T
        np.testing.assert_allclose(attention[image].numpy(), softmax(scores, axis=1), rtol=1e-5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 3))


def test_attended_mean_by_hand():
    distances = torch.tensor([[[1.0, 3.0]], [[2.0, 10.0]]])  # two images, one stage of the student, two of the teacher
    attention = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]])
    assert losses.attended_mean(distances, attention).item() == pytest.approx((0.25 + 2.25 + 2.0) / 2)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.attended_mean(distances, attention[:1])


# ---- contrastive ----


def test_noise_contrastive_by_hand():
    scores = np.array([[0.5, 0.1, 0.2], [0.3, 0.4, 0.01]])  # P; two negatives out of ten samples, so c = 0.2
    expected = 0.0
    for pred, *others in scores:
        expected += (-math.log(pred / (pred + 0.2)) - sum(math.log(0.2 / (p + 0.2)) for p in others)) / 2
    log_scores = torch.tensor(scores).log()
    assert losses.noise_contrastive(log_scores, samples=10).item() == pytest.approx(expected, rel=1e-6)
    slope_is_the_gradient(lambda x: losses.noise_contrastive(x, 10), log_scores.float())


def test_noise_contrastive_is_finite_and_needs_negatives():
    scores = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    loss = losses.noise_contrastive(scores, 1000)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        losses.noise_contrastive(torch.zeros(1, 1), 10)
