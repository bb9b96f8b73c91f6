"""Divergences from a part or a sample of the teacher's distribution, against dense and hand-computed values."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd.common.losses import sampled_kl, soft_target_kl, top_classes_kl


def test_the_mass_of_the_rest_counts_as_one_class():
    """p = (0.5, 0.2, 0.2, 0.1) and q = (0.4, 0.1, 0.2, 0.3); class 0 is known, then 2 and 0."""
    student = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    found = top_classes_kl(student, torch.tensor([[0]]), torch.tensor([[0.5, 0.5]]))
    assert found.item() == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-5)
    found = top_classes_kl(student, torch.tensor([[2, 0]]), torch.tensor([[0.2, 0.5, 0.3]]))
    assert found.item() == pytest.approx(0.2 * 0 + 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4), rel=1e-5)


def test_the_gradient_of_the_rest_by_hand():
    """d loss / d logit j is q_j - p_j for a known class, and q_j - r q_j / (1 - sum of known q) for another one."""
    q = torch.tensor([0.4, 0.1, 0.2, 0.3])
    logits = q.log()[None].requires_grad_()
    top_classes_kl(logits, torch.tensor([[0]]), torch.tensor([[0.5, 0.5]])).backward()
    expected = torch.tensor([[0.4 - 0.5, *(x - 0.5 * x / 0.6 for x in (0.1, 0.2, 0.3))]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_classes_are_the_dense_divergence(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 12, requires_grad=True), 3 * torch.randn(7, 12)
    p = (teacher / temperature).softmax(-1)
    classes = torch.stack([torch.randperm(12) for _ in range(7)])
    dense = soft_target_kl(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(dense, student)
    for found in (
        top_classes_kl(student, classes, torch.cat([p.gather(1, classes), torch.zeros(7, 1)], 1), temperature),
        sampled_kl(student, classes, p.gather(1, classes), torch.special.entr(p).sum(1), temperature),
    ):
        torch.testing.assert_close(found, dense)
        torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient)


def test_the_rest_bounds_the_dense_divergence_from_below():
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 30), 3 * torch.randn(50, 30)
    values, classes = teacher.softmax(-1).sort(descending=True)
    bounds = [
        top_classes_kl(student, classes[:, :k], torch.cat([values[:, :k], values[:, k:].sum(1, keepdim=True)], 1))
        for k in (1, 3, 10, 30)
    ]
    assert all(0 < low < high for low, high in zip(bounds, bounds[1:], strict=False))
    torch.testing.assert_close(bounds[-1], soft_target_kl(student, teacher))


def test_confident_predictions_have_finite_losses_and_gradients():
    student = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    classes, one = torch.tensor([[0], [0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for loss in (top_classes_kl(student, classes, one), sampled_kl(student, classes, one[:, :1], torch.zeros(2))):
        assert loss.item() == pytest.approx(100.0)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0], [-0.5, 0.5, 0.0]]))


def test_weight_zero_is_ignored_and_rounded_probabilities_are_normalized():
    torch.manual_seed(0)
    student = torch.randn(2, 9)
    one = sampled_kl(student, torch.tensor([[4], [2]]), torch.ones(2, 1), torch.zeros(2))
    assert one == F.cross_entropy(student, torch.tensor([4, 2]))
    two = sampled_kl(student, torch.tensor([[4, 0], [2, 0]]), torch.tensor([[1.0, 0.0]] * 2), torch.zeros(2))
    assert one == two
    classes, p = torch.tensor([[4, 0], [2, 0]]), torch.tensor([[0.5, 0.3, 0.2]] * 2)
    torch.testing.assert_close(top_classes_kl(student, classes, p), top_classes_kl(student, classes, 1.001 * p))


def test_losses_without_reduction():
    torch.manual_seed(0)
    student, classes, p = (
        torch.randn(3, 5),
        torch.tensor([[0, 1], [2, 4], [3, 0]]),
        torch.tensor([[0.5, 0.3, 0.2]] * 3),
    )
    for each, mean in (
        (top_classes_kl(student, classes, p, 2.0, "none"), top_classes_kl(student, classes, p, 2.0)),
        (
            sampled_kl(student, classes, p[:, :2], torch.ones(3), 2.0, "none"),
            sampled_kl(student, classes, p[:, :2], torch.ones(3), 2.0),
        ),
    ):
        assert each.shape == (3,)
        torch.testing.assert_close(each.mean(), mean)


def test_wrong_shapes_and_temperatures_are_errors():
    student, classes = torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="do not fit"):
        top_classes_kl(student, classes, torch.ones(3, 2))
    with pytest.raises(ValueError, match="do not fit"):
        sampled_kl(student[:2], classes, torch.ones(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="positive"):
        sampled_kl(student, classes, torch.ones(3, 2), torch.zeros(3), temperature=0)
