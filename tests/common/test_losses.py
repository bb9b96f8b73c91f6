"""Losses against closed forms and other implementations, and at numerical edge cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import entropy
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from kd.common import losses

MAPS = (2, 3, 4, 5)  # (batch, channels, height, width)


def reverse_kl(student, teacher):
    return losses.soft_target_kl(student, teacher, direction="reverse")


def skew_reverse_kl(student, teacher):
    return losses.skew_kl(student, teacher, direction="reverse")


def gaussian_means(student, teacher):
    return losses.gaussian_kl(student, torch.tensor(-0.5), teacher, torch.tensor(-0.5))


def gaussian_stds(student, teacher):
    return losses.gaussian_kl(torch.zeros(student.shape), student, torch.zeros(teacher.shape), teacher)


def reverse_gaussian_stds(student, teacher):
    mean = torch.zeros(student.shape)
    return losses.gaussian_kl(mean, student, mean, teacher, direction="reverse")


def partial_l2(student, teacher):
    return losses.partial_l2(student, teacher, torch.tensor([-0.1, -0.5, -2.0]))


# Every loss of a student and a teacher tensor, with a shape that it takes.
LOSSES = {
    "soft_target_kl": (losses.soft_target_kl, (4, 3)),
    "reverse_kl": (reverse_kl, (4, 3)),
    "skew_kl": (losses.skew_kl, (4, 3)),
    "skew_reverse_kl": (skew_reverse_kl, (4, 3)),
    "jensen_shannon": (losses.jensen_shannon, (4, 3)),
    "total_variation": (losses.total_variation, (4, 3)),
    "alpha_beta": (losses.alpha_beta, (4, 3)),
    "hard_targets": (losses.hard_targets, (4, 3)),
    "gaussian_means": (gaussian_means, (4, 3)),
    "feature_l2": (losses.feature_l2, (4, 5, 3)),
    "feature_cosine": (losses.feature_cosine, (4, 5, 3)),
    "channel_kl": (losses.channel_kl, MAPS),
    "spatial_kl": (losses.spatial_kl, MAPS),
    "hierarchical_l2": (losses.hierarchical_l2, MAPS),
    "partial_l2": (partial_l2, MAPS),
    "binary_soft_target_kl": (losses.binary_soft_target_kl, (4, 3)),
    "regression_mse": (losses.regression_mse, (4,)),
    "regression_huber": (losses.regression_huber, (4,)),
}
DIVERGENCES = {name: case for name, case in LOSSES.items() if name != "hard_targets"}  # zero at equality


def cases(which):
    return pytest.mark.parametrize(("loss", "shape"), which.values(), ids=which.keys())


def pair(shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


@cases(LOSSES)
def test_gradient_reaches_only_the_student(loss, shape):
    student, teacher = pair(shape)
    value = loss(student, teacher)
    value.backward()
    assert value.shape == ()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@cases(LOSSES)
def test_gradient_is_the_slope(loss, shape):
    student, teacher = pair(shape)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    direction, step = torch.randn(shape, generator=torch.Generator().manual_seed(1)), 1e-2
    with torch.no_grad():
        slope = (loss(student + step * direction, teacher) - loss(student - step * direction, teacher)) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-3)


@cases(DIVERGENCES)
def test_zero_at_equality_and_above_zero_elsewhere(loss, shape):
    student, _ = pair(shape)
    assert loss(student, student).item() == pytest.approx(0, abs=1e-6)
    for seed in range(20):
        assert loss(*pair(shape, seed)) > 1e-3


@pytest.mark.parametrize(
    "loss",
    [losses.channel_kl, losses.spatial_kl, losses.soft_target_kl, reverse_kl, gaussian_stds, reverse_gaussian_stds],
)
def test_rounding_never_makes_a_divergence_negative(loss):
    shape = (2, 10, 4, 4) if loss in (losses.channel_kl, losses.spatial_kl) else (8, 50)
    for seed in range(20):
        student, teacher = pair(shape, seed)
        assert loss(student, student + 1e-6 * teacher) >= 0


@cases(LOSSES)
def test_low_precision_is_computed_in_fp32(loss, shape):
    student, teacher = (t.detach().bfloat16() for t in pair(shape))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.float(), teacher.float()).item(), rel=1e-6)


@cases(LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extreme_values(loss, shape, dtype):
    student, teacher = (t.detach().to(dtype) for t in pair(shape, scale=1e4))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@cases(LOSSES)
def test_different_shapes_are_an_error_with_both_shapes(loss, shape):
    student, teacher = torch.zeros(shape), torch.zeros((*shape[:-1], shape[-1] + 1))
    with pytest.raises(ValueError, match=r"shapes differ: \(") as error:
        loss(student, teacher)
    assert str(tuple(student.shape)) in str(error.value)
    assert str(tuple(teacher.shape)) in str(error.value)


@cases(LOSSES)
def test_the_order_of_the_batch_has_no_effect(loss, shape):
    student, teacher = pair(shape)
    order = torch.arange(shape[0]).flip(0)
    assert loss(student[order], teacher[order]).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)
    assert loss(student[order], teacher).item() != pytest.approx(loss(student, teacher).item(), rel=1e-5)


# Teacher (3/4, 1/4), student (1/2, 1/2) at temperature 1; at temperature 2 the teacher's odds are sqrt(3) to 1.
FORWARD = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # 0.1308
REVERSE = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # 0.1438
FORWARD_AT_2 = 0.633974596 * math.log(2 * 0.633974596) + 0.366025404 * math.log(2 * 0.366025404)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FORWARD),
        ({"direction": "reverse"}, REVERSE),
        ({"temperature": 2.0}, 4 * FORWARD_AT_2),
        ({"temperature": 2.0, "scale": 1.0}, FORWARD_AT_2),
        ({"temperature": 5.0, "teacher_temperature": 2.0}, 10 * FORWARD_AT_2),  # a flat student is flat at any
        ({"scale": 0.0}, 0.0),
    ],
)
def test_soft_target_kl_by_hand(options, expected):
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert losses.soft_target_kl(student, teacher, **options).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_target_kl_is_torch_batchmean(temperature):
    student, teacher = pair((16, 7), scale=3.0)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
    )
    assert losses.soft_target_kl(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_soft_target_kl_of_a_confident_and_wrong_student():
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert losses.soft_target_kl(student, teacher).item() == pytest.approx(1e4)


def test_temperature_squared_keeps_the_gradient_at_high_temperature():
    # Hinton 2015, section 2.1: at high temperature it is (student - teacher) / classes for logits of mean zero.
    student, teacher = torch.tensor([[0.6, -0.2, -0.4]], requires_grad=True), torch.tensor([[-0.1, 0.5, -0.4]])
    (gradient,) = torch.autograd.grad(losses.soft_target_kl(student, teacher, temperature=100.0), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 3, atol=5e-3, rtol=0)


def test_sample_weights_are_a_weighted_mean():
    student, teacher = pair((3, 5))
    each = [losses.soft_target_kl(student[i : i + 1], teacher[i : i + 1]).item() for i in range(3)]
    weighted = losses.soft_target_kl(student, teacher, sample_weights=torch.tensor([1.0, 0.0, 3.0]))
    assert weighted.item() == pytest.approx((each[0] + 3 * each[2]) / 4, rel=1e-5)
    same = losses.soft_target_kl(student, teacher, sample_weights=torch.full((3,), 7.0))
    assert same.item() == pytest.approx(sum(each) / 3, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_zero_weights_give_zero_loss_and_zero_gradient(temperature):
    student, teacher = pair((3, 5))
    loss = losses.soft_target_kl(student, teacher, temperature, sample_weights=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "positive"),
        ({"temperature": -1.0}, "positive"),
        ({"teacher_temperature": 0.0}, "positive"),
        ({"direction": "backward"}, "'backward'"),
        ({"sample_weights": torch.ones(3, 1)}, r"\(3,\) and \(3, 1\)"),
        ({"sample_weights": torch.ones(2)}, r"\(3,\) and \(2,\)"),
    ],
)
def test_soft_target_kl_errors(options, message):
    with pytest.raises(ValueError, match=message):
        losses.soft_target_kl(torch.zeros(3, 5), torch.zeros(3, 5), **options)


def test_hard_targets_by_hand():
    student = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    teacher = torch.tensor([[-50.0, -40.0], [0.1, 0.2]])  # Q-values: only the place of the largest counts
    assert losses.hard_targets(student, teacher).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses.hard_targets(student, 100 * teacher + 7).item() == losses.hard_targets(student, teacher).item()


def gaussians(shape=(16, 3)):
    """Means of student and teacher, log_std of student and teacher."""
    return *pair(shape, 0), *pair(shape, 1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("log_std_shape", [(16, 3), (16, 1), (3,), (1,), ()])
def test_gaussian_kl_is_that_of_torch(direction, log_std_shape):
    (student_mean, teacher_mean), (student_log_std, teacher_log_std) = pair((16, 3)), pair(log_std_shape, 1)
    student = Independent(Normal(student_mean, student_log_std.exp()), 1)
    teacher = Independent(Normal(teacher_mean, teacher_log_std.exp()), 1)
    expected = kl_divergence(teacher, student) if direction == "forward" else kl_divergence(student, teacher)
    loss = losses.gaussian_kl(student_mean, student_log_std, teacher_mean, teacher_log_std, direction)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_gaussian_kl_by_hand():
    # Student N(0, 1), teacher N(3, 2^2) in both of two actions.
    zero, log_std = torch.zeros(1, 2), torch.tensor([math.log(2)])
    forward = losses.gaussian_kl(zero, torch.zeros(2), zero + 3, log_std)
    assert forward.item() == pytest.approx(2 * (-math.log(2) + (4 + 9) / 2 - 1 / 2))
    reverse = losses.gaussian_kl(zero, torch.zeros(2), zero + 3, log_std, direction="reverse")
    assert reverse.item() == pytest.approx(2 * (math.log(2) + (1 + 9) / 8 - 1 / 2))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gaussian_kl_is_zero_at_equality_and_above_zero_where_mean_or_std_differ(direction):
    mean, other_mean, log_std, other_log_std = gaussians()
    assert losses.gaussian_kl(mean, log_std, mean, log_std, direction).item() == 0
    assert losses.gaussian_kl(mean, log_std, other_mean, log_std, direction) > 1e-3
    assert losses.gaussian_kl(mean, log_std, mean, other_log_std, direction) > 1e-3


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gaussian_kl_keeps_its_digits_near_equality(direction):
    mean, step = torch.zeros(1, 1), 3e-4
    value = losses.gaussian_kl(mean, torch.tensor(step), mean, torch.tensor(0.0), direction)
    assert value.item() == pytest.approx(step**2, rel=2e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gaussian_kl_trains_only_mean_and_std_of_the_student(direction):
    student_mean, teacher_mean, student_log_std, teacher_log_std = gaussians()
    losses.gaussian_kl(student_mean, student_log_std, teacher_mean, teacher_log_std, direction).backward()
    assert student_mean.grad.abs().sum() > 0
    assert student_log_std.grad.abs().sum() > 0
    assert teacher_mean.grad is None
    assert teacher_log_std.grad is None


def test_gaussian_kl_is_a_weighted_mean_over_the_batch():
    student_mean, teacher_mean, student_log_std, teacher_log_std = gaussians((3, 2))
    ordered = (student_mean, student_log_std, teacher_mean, teacher_log_std)
    each = [losses.gaussian_kl(*(t[i : i + 1] for t in ordered)).item() for i in range(3)]
    assert losses.gaussian_kl(*ordered).item() == pytest.approx(sum(each) / 3, rel=1e-5)
    assert losses.gaussian_kl(*(t.repeat(4, 1) for t in ordered)).item() == pytest.approx(sum(each) / 3, rel=1e-5)
    weighted = losses.gaussian_kl(*ordered, sample_weights=torch.tensor([1.0, 0.0, 3.0]))
    assert weighted.item() == pytest.approx((each[0] + 3 * each[2]) / 4, rel=1e-5)
    nothing = losses.gaussian_kl(*ordered, sample_weights=torch.zeros(3))
    nothing.backward()
    assert nothing.item() == 0
    assert student_log_std.grad.abs().sum() == 0


def test_gaussian_kl_is_invariant_under_tanh():
    student, teacher = torch.tensor([0.2, -0.7]), torch.tensor([-0.4, -0.3])  # mean, log_std
    actions = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    log_q, log_p = (
        TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(actions)
        for mean, log_std in (student.double(), teacher.double())
    )
    integral = torch.trapezoid(log_p.exp() * (log_p - log_q), actions)
    loss = losses.gaussian_kl(*student.view(2, 1, 1), *teacher.view(2, 1, 1))
    assert loss.item() == pytest.approx(integral.item(), rel=1e-4)


def test_forward_gaussian_kl_has_its_minimum_at_the_moments_of_the_teacher():
    # A teacher that is N(-1, 1) or N(3, 1) with equal chance has mean 1 and variance 1 + 4.
    mean, log_std = torch.tensor([[1.0]], requires_grad=True), torch.tensor([math.log(5) / 2], requires_grad=True)
    loss = losses.gaussian_kl(mean.expand(2, 1), log_std, torch.tensor([[-1.0], [3.0]]), torch.zeros(1))
    loss.backward()
    assert mean.grad.item() == pytest.approx(0, abs=1e-6)
    assert log_std.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gaussian_kl_is_finite_where_policies_clip_the_std(direction, dtype):
    for pred, target in [(-20.0, 2.0), (2.0, -20.0)]:
        log_std = torch.full((2, 3), pred, dtype=dtype, requires_grad=True)
        mean, teacher_log_std = torch.zeros(2, 3, dtype=dtype), torch.tensor(target, dtype=dtype)
        loss = losses.gaussian_kl(mean, log_std, mean + 1, teacher_log_std, direction)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert log_std.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "backward"}, "'backward'"),
        ({"student_mean": torch.zeros(4, 1)}, r"\(4, 1\) and \(4, 3\)"),
        ({"student_mean": torch.zeros(4), "teacher_mean": torch.zeros(4)}, r"\(batch, actions\), got \(4,\)"),
        ({"student_log_std": torch.zeros(4)}, r"\(4,\) does not expand to means \(4, 3\)"),
        ({"teacher_log_std": torch.zeros(2, 4, 3)}, r"\(2, 4, 3\) does not expand to means \(4, 3\)"),
        ({"sample_weights": torch.ones(4, 1)}, r"\(4,\) and \(4, 1\)"),
    ],
)
def test_gaussian_kl_errors(changes, message):
    mean, log_std = torch.zeros(4, 3), torch.zeros(3)
    usual = {"student_mean": mean, "student_log_std": log_std, "teacher_mean": mean, "teacher_log_std": log_std}
    with pytest.raises(ValueError, match=message):
        losses.gaussian_kl(**(usual | changes))


@pytest.mark.parametrize("loss", [losses.channel_kl, losses.spatial_kl])
def test_map_divergences_need_a_positive_temperature(loss):
    with pytest.raises(ValueError, match="positive"):
        loss(torch.zeros(MAPS), torch.zeros(MAPS), temperature=0.0)


def test_features_by_hand():
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])  # (1 sample, 2 positions, 2 channels)
    teacher = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert losses.feature_l2(student, teacher).item() == pytest.approx((0 + 16 + 1 + 1) / 4)
    assert losses.feature_cosine(student, teacher).item() == pytest.approx((1 - 0.6 + 1) / 2)
    assert losses.feature_cosine(student, -student).item() == pytest.approx(2)
    # Along the positions: channel 0 is (3, 1) and (3, 0), channel 1 is (4, 0) and (0, 1).
    assert losses.feature_cosine(student, teacher, dim=1).item() == pytest.approx((1 - 3 / math.sqrt(10) + 1) / 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("loss", [losses.feature_l2, losses.feature_cosine])
def test_masked_positions_have_no_effect(loss, dtype):
    student, teacher = pair((2, 3, 4))  # (batch, positions, channels)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    value = loss(student, teacher, mask)
    value.backward()
    noise = 100 * torch.randn(2, 3, 4) * (mask == 0)[..., None]
    assert loss(student + noise, teacher - noise, mask).item() == pytest.approx(value.item(), rel=1e-6)
    assert student.grad[mask == 0].abs().sum() == 0
    real = mask.bool()
    assert value.item() == pytest.approx(loss(student[real], teacher[real]).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [losses.feature_l2, losses.feature_cosine])
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(loss):
    student, teacher = pair((2, 3, 4))
    value = loss(student, teacher, torch.zeros(2, 3))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("loss", [losses.feature_l2, losses.feature_cosine])
def test_a_mask_of_another_shape_does_not_broadcast(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        loss(*pair((2, 3, 4)), torch.ones(2, 1))


def test_mask_of_whole_samples():
    student, teacher = pair(MAPS)
    kept = losses.feature_l2(student, teacher, torch.tensor([0, 1]))
    assert kept.item() == pytest.approx(losses.feature_l2(student[1], teacher[1]).item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("loss", "axis"), [(losses.channel_kl, "channels"), (losses.spatial_kl, "places")])
def test_map_divergences_are_mean_entropies_of_scipy(loss, axis, temperature):
    student, teacher = pair(MAPS, scale=2.0)

    def distributions(maps):
        flat = maps.detach().double().flatten(2)  # (batch, channels, places)
        rows = flat.transpose(1, 2) if axis == "channels" else flat
        return (rows / temperature).softmax(-1).flatten(0, 1).numpy()  # (distributions, outcomes)

    expected = temperature**2 * entropy(distributions(teacher), distributions(student), axis=1).mean()
    assert loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_map_divergences_use_different_axes():
    per_channel = torch.randn(2, 3, 1, 1).expand(MAPS)  # constant over places
    zeros = torch.zeros(MAPS)
    assert losses.spatial_kl(zeros, per_channel).item() == pytest.approx(0, abs=1e-6)
    assert losses.channel_kl(zeros, per_channel) > 1e-3


def test_transposed_map_sizes_are_an_error():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\) and \(2, 3, 5, 4\)"):
        losses.spatial_kl(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5, 4))


# Differences 0.5, -1 and 3.
PREDICTIONS, TARGETS = torch.tensor([1.5, 2.0, 5.0]), torch.tensor([1.0, 3.0, 2.0])


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 1), (3,)), ((3,), (3, 1)), ((3, 1), (3, 1))])
def test_regression_by_hand_without_broadcasting(shapes):
    prediction, target = PREDICTIONS.reshape(shapes[0]), TARGETS.reshape(shapes[1])
    assert losses.regression_mse(prediction, target).item() == pytest.approx((0.25 + 1 + 9) / 3)
    assert losses.regression_huber(prediction, target).item() == pytest.approx((0.125 + 0.5 + 2.5) / 3)
    assert losses.regression_huber(prediction, target, delta=2.0).item() == pytest.approx((0.125 + 0.5 + 4) / 3)


@pytest.mark.parametrize("loss", [losses.regression_mse, losses.regression_huber])
def test_regression_of_one_sample_and_of_integer_labels(loss):
    assert loss(torch.tensor([[2.0]]), torch.tensor([1])).item() == pytest.approx(loss(torch.ones(1), torch.zeros(1)))


def test_regression_errors_for_other_shapes_of_equal_size():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        losses.regression_mse(torch.zeros(2, 3), torch.zeros(3, 2))


# ---- tokens ----


def test_jensen_shannon_is_that_of_scipy_symmetric_and_bounded():
    from scipy.spatial.distance import jensenshannon

    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    p, q = (F.softmax(logits / 2, -1).numpy() for logits in (teacher, student))
    expected = 4 * np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)])
    assert losses.jensen_shannon(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.jensen_shannon(teacher, student, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.jensen_shannon(student, student).item() == pytest.approx(0, abs=1e-7)
    apart = torch.eye(2) * 1000
    assert losses.jensen_shannon(apart, apart.flip(0)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_generalised_jensen_shannon_by_hand(beta):
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.1, 0.8]])
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    assert losses.jensen_shannon(q.log(), p.log(), beta=beta).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="beta"):
        losses.jensen_shannon(q, p, beta=1.0)


@pytest.mark.parametrize("skew", [0.1, 0.6])
def test_skewed_divergences_are_those_of_scipy(skew):
    """scipy's `entropy` of two distributions is their KL divergence."""
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    q, p = (softmax(logits.double().numpy() / 2, axis=1) for logits in (student, teacher))
    forward = 4 * entropy(p, skew * p + (1 - skew) * q, axis=1)
    reverse = 4 * entropy(q, skew * q + (1 - skew) * p, axis=1)
    for direction, expected in (("forward", forward), ("reverse", reverse)):
        found = losses.skew_kl(student, teacher, 2.0, skew, direction, reduction="none")
        assert found.numpy() == pytest.approx(expected, rel=1e-4)
    assert losses.skew_kl(student, teacher, 2.0, skew).item() == pytest.approx(forward.mean(), rel=1e-4)


def test_skewed_divergences_are_bounded_and_approach_the_kl_divergence():
    apart = torch.eye(2) * 1000
    for direction in ("forward", "reverse"):
        assert losses.skew_kl(apart, apart.flip(0), direction=direction).item() == pytest.approx(-math.log(0.1))
        student, teacher = torch.randn(6, 11), torch.randn(6, 11)
        expected = losses.soft_target_kl(student, teacher, direction=direction).item()
        assert losses.skew_kl(student, teacher, 1.0, 1e-5, direction).item() == pytest.approx(expected, rel=1e-3)
    for skew in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < skew < 1"):
            losses.skew_kl(apart, apart, skew=skew)


def test_total_variation_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([[0.1, 0.1, 0.8], [0.2, 0.3, 0.5]])
    each = losses.total_variation(q.log(), p.log(), reduction="none")
    torch.testing.assert_close(each, torch.tensor([0.6, 0.1]))
    assert losses.total_variation(3 * q.log(), 3 * p.log(), 3.0).item() == pytest.approx(3 * 0.35)
    weights = torch.tensor([1.0, 3.0])
    assert losses.total_variation(q.log(), p.log(), sample_weights=weights).item() == pytest.approx(0.225)
    found = losses.total_variation(q.log(), p.log(), sample_weights=weights, reduction="none")
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3]))
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        losses.total_variation(q, p, reduction="sum")


@pytest.mark.parametrize(
    "loss", [losses.soft_target_kl, losses.skew_kl, losses.jensen_shannon, losses.total_variation]
)
def test_scales_keep_gradients_comparable_across_temperatures(loss):
    """For large temperatures, the softmax is linear in the logits, and the temperature no longer matters."""
    student, teacher = pair((4, 9))
    first, second = (torch.autograd.grad(loss(student, teacher.detach(), t), student)[0] for t in (50.0, 100.0))
    torch.testing.assert_close(first, second, rtol=0.1, atol=0.02 * first.abs().max().item())


def test_soft_targets_of_tokens_ignore_masked_positions():
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    flat = mask.bool().flatten()
    expected = losses.soft_target_kl(student.flatten(0, 1)[flat], teacher.flatten(0, 1)[flat], 3.0)
    assert losses.soft_target_kl(student, teacher, 3.0, sample_weights=mask).item() == pytest.approx(expected.item())


# ---- attention ----


def test_attention_kl_is_that_of_the_probabilities_of_a_bert_layer():
    """Compares with the attention probabilities that BERT returns for padded texts."""
    from transformers import BertConfig, BertModel

    shape = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    models = [BertModel(BertConfig(hidden_size=16, **shape)).eval() for _ in range(2)]
    ids, mask = torch.randint(50, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    probabilities, parts = [], []
    for bert in models:
        bert.set_attn_implementation("eager")
        attention = bert.encoder.layer[0].attention.self
        for projection in (attention.query, attention.key):
            torch.nn.init.normal_(projection.weight)  # by default, attention is almost uniform
        probabilities.append(bert(ids, mask, output_attentions=True).attentions[0])
        embedded = bert.embeddings(ids)
        parts += [attention.query(embedded), attention.key(embedded)]
    student, teacher = probabilities
    divergence = (teacher * (teacher.clamp(min=1e-30).log() - student.clamp(min=1e-30).log())).sum(-1)
    expected = divergence.mean(1)[mask.bool()].mean()
    assert losses.attention_kl(*parts, 4, mask).item() == pytest.approx(expected.item(), rel=1e-4)


def test_attention_kl_ignores_padding_and_accepts_other_widths():
    pred, target = torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    mask = torch.ones(2, 3)
    loss = losses.attention_kl(pred, pred, target, target, 4, mask)
    padded = [F.pad(x, (0, 0, 0, 2), value=7.0) for x in (pred, pred, target, target)]
    assert losses.attention_kl(*padded, 4, F.pad(mask, (0, 2))).item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses.attention_kl(pred, pred, pred, pred, 2, mask).item() == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="3 heads"):
        losses.attention_kl(pred, pred, target, target, 3)


# ---- independent labels ----


def test_binary_losses_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])
    expected = (math.log(2) + math.log(4)) / 2  # probabilities 1/2 and 3/4
    assert losses.binary_cross_entropy(logits, labels).item() == pytest.approx(expected)
    smooth = (math.log(2) + 0.1 * -math.log(0.75) + 0.9 * math.log(4)) / 2  # targets 0.9 and 0.1
    assert losses.binary_cross_entropy(logits, labels, smoothing=0.2).item() == pytest.approx(smooth)
    teacher = torch.tensor([[math.log(3), math.log(3)]])
    divergence = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert losses.binary_soft_target_kl(logits, teacher).item() == pytest.approx(divergence)
    tempered = losses.binary_soft_target_kl(2 * logits, 2 * teacher, temperature=2.0)
    assert tempered.item() == pytest.approx(4 * divergence)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_soft_targets_are_those_of_two_classes_per_label(temperature):
    student, teacher = (x.detach() for x in pair((5, 4)))
    two = [torch.stack([torch.zeros_like(x), x], dim=-1).reshape(-1, 2) for x in (student, teacher)]
    expected = losses.soft_target_kl(*two, temperature)
    torch.testing.assert_close(losses.binary_soft_target_kl(student, teacher, temperature), expected)


def test_binary_losses_are_finite_for_confident_logits_and_check_shapes():
    far = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = losses.binary_soft_target_kl(far, -far) + losses.binary_cross_entropy(far, torch.tensor([[0.0, 1.0]]))
    value.backward()
    assert value.item() == pytest.approx(400) and far.grad.isfinite().all()
    for loss in (losses.binary_cross_entropy, losses.binary_soft_target_kl):
        with pytest.raises(ValueError, match="shapes differ"):
            loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="positive"):
        losses.binary_soft_target_kl(far, far, temperature=0)
