"""Losses of logits against independent computations, and the methods that use them."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from scipy.special import softmax
from scipy.stats import pearsonr, zscore

from kd.common import losses
from kd.common.methods import TaskSpec
from kd.common.methods.classification import LOGIT_METHODS, AdversarialTemperature
from kd.common.objective import cosine_decay
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError

LABELS = torch.tensor([0, 2, 1, 4])
CLASSES = 5
FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)), torch.arange(50) % CLASSES
COST = 1 - (losses.class_similarity(*FEATURES, CLASSES) - 1).exp()
UNLABELLED: dict[str, Callable[..., torch.Tensor]] = {
    "dist": losses.correlation_loss,
    "class_relations": losses.class_relations,
    "sample_relations": losses.sample_relations,
    "lskd": lambda s, t: losses.soft_target_kl(losses.standardized(s), losses.standardized(t), 2.0),
    "abkd": losses.alpha_beta,
    "sample_directions": losses.sample_directions,
    "class_directions": losses.class_directions,
}
LABELLED: dict[str, Callable[..., torch.Tensor]] = {
    "dkd": losses.decoupled_kd,
    "label_probability": losses.label_probability,
    "transport": partial(losses.transport, cost=COST),
    "rld": losses.refined_kd,
}
NAMES = [*UNLABELLED, *LABELLED]


def value_of(name: str, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return LABELLED[name](student, teacher, labels) if name in LABELLED else UNLABELLED[name](student, teacher)


def pair(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(4, CLASSES, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def task_of(classes: int, views: int = 1) -> TaskSpec:
    def never(*_):
        raise AssertionError("logits are all that these methods need")

    return TaskSpec(classes, None, None, never, never, never, LABELS, lambda: FEATURES, views)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_and_reaches_only_the_student(name):
    student, teacher = pair()
    value = value_of(name, student, teacher)
    value.backward()
    assert value.shape == () and teacher.grad is None
    direction, step = torch.randn(student.shape, generator=torch.Generator().manual_seed(1)), 1e-2
    with torch.no_grad():
        above, below = (value_of(name, student + sign * step * direction, teacher) for sign in (1, -1))
    slope = ((above - below) / (2 * step)).item()
    assert slope == pytest.approx((student.grad * direction).sum().item(), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", ["dkd", *UNLABELLED])
def test_zero_at_equality_and_above_zero_elsewhere(name):
    student, _ = pair()
    assert value_of(name, student, student).item() == pytest.approx(0, abs=1e-5)
    for seed in range(10):
        assert value_of(name, *pair(seed)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_with_confident_logits(name, dtype):
    student, teacher = (t.detach().to(dtype) for t in pair(scale=1e3))
    student.requires_grad_()
    value = value_of(name, student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_batch_has_no_effect_and_shapes_must_match(name):
    student, teacher = (t.detach() for t in pair())
    order = torch.tensor([2, 0, 3, 1])
    moved = value_of(name, student[order], teacher[order], LABELS[order])
    assert moved.item() == pytest.approx(value_of(name, student, teacher).item(), rel=1e-5)
    if name != "lskd":
        with pytest.raises(ValueError, match=r"shapes differ: \("):
            value_of(name, student, torch.zeros(4, CLASSES + 1))


def test_decoupled_kd_by_hand():
    student, teacher = (t.detach() for t in pair())
    pred, target = softmax(student.double().numpy() / 3, 1), softmax(teacher.double().numpy() / 3, 1)
    total = 0.0
    for s, t, label in zip(pred, target, LABELS.tolist(), strict=True):
        binary = t[label] * math.log(t[label] / s[label]) + (1 - t[label]) * math.log((1 - t[label]) / (1 - s[label]))
        q, p = np.delete(t, label) / (1 - t[label]), np.delete(s, label) / (1 - s[label])
        total += 9 * (0.5 * binary + 2.0 * (q * np.log(q / p)).sum()) / 4
    found = losses.decoupled_kd(student, teacher, LABELS, alpha=0.5, beta=2.0, temperature=3.0)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_decoupled_kd_generalizes_hintons_kd():
    student, teacher = (t[:1] for t in pair())
    rest = 1 - F.softmax(teacher / 4, dim=1)[0, LABELS[0]].item()
    found = losses.decoupled_kd(student, teacher, LABELS[:1], alpha=1.0, beta=rest, temperature=4.0)
    assert found.item() == pytest.approx(losses.soft_target_kl(student, teacher, 4.0).item(), rel=1e-5)


def test_decoupled_methods_need_three_classes():
    two = torch.zeros(4, 2)
    for loss in (losses.decoupled_kd, partial(losses.transport, cost=torch.eye(2))):
        with pytest.raises(ValueError, match="at least 3 classes, got 2"):
            loss(two, two, torch.tensor([0, 1, 1, 0]))
    for name in ("dkd", "dkd_ls", "wkd"):
        with pytest.raises(UserError, match=f"method {name} needs at least 3 classes"):
            LOGIT_METHODS[name](task_of(2))


def test_standardized_and_refined_methods_need_two_classes():
    one = torch.zeros(4, 1)
    for loss in (partial(losses.refined_kd, labels=torch.zeros(4).long()), losses.sample_directions):
        with pytest.raises(ValueError, match="at least 2 classes, got 1"):
            loss(one, one)
    for name in ("lskd", "mlkd_ls", "rld", "vrm"):
        with pytest.raises(UserError, match=f"method {name} needs at least 2 classes"):
            LOGIT_METHODS[name](task_of(1))


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_a_batch_of_one_with_the_fewest_classes_is_finite(name):
    classes = {"dkd": 3, "dkd_ls": 3, "wkd": 3, "lskd": 2, "mlkd_ls": 2, "rld": 2, "vrm": 2}.get(name, 1)
    student, teacher = torch.randn(1, classes, requires_grad=True), torch.randn(1, classes)
    task = replace(task_of(classes), teacher_samples=lambda: (torch.randn(9, 6), torch.arange(9) % classes))
    objective = LOGIT_METHODS[name](task).objective
    parts = objective(Outputs(logits=student), Outputs(logits=teacher), torch.zeros(1).long())
    sum(parts.values()).backward()
    assert all(part.isfinite() for part in parts.values()) and student.grad.isfinite().all()


def test_dist_is_one_minus_pearsons_correlations():
    student, teacher = (t.detach() for t in pair())
    pred, target = softmax(student.numpy() / 4, 1), softmax(teacher.numpy() / 4, 1)
    between = 1 - np.mean([pearsonr(s, t).statistic for s, t in zip(pred, target, strict=True)])
    within = 1 - np.mean([pearsonr(s, t).statistic for s, t in zip(pred.T, target.T, strict=True)])
    found = losses.correlation_loss(student, teacher, beta=1.5, gamma=0.5)
    assert found.item() == pytest.approx(16 * (1.5 * between + 0.5 * within), rel=1e-4)
    for beta, gamma in ((1.0, 0.0), (0.0, 1.0)):  # one of the terms alone
        nearer = [torch.lerp(-teacher, teacher, x) for x in (0.0, 0.7, 1.0)]
        values = [losses.correlation_loss(logits, teacher, beta, gamma) for logits in nearer]
        assert values[0] > values[1] > values[2], "the loss falls as the correlation rises"


def test_standardized_logits_are_z_scores_invariant_to_shift_and_scale():
    student, teacher = (t.detach() for t in pair())
    np.testing.assert_allclose(losses.standardized(student), zscore(student.numpy(), 1, ddof=1), rtol=1e-4, atol=1e-5)
    changed = student * torch.tensor([[2.0], [3.0], [0.5], [9.0]]) + torch.tensor([[1.0], [-5.0], [0.0], [7.0]])
    expected = value_of("lskd", student, teacher).item()
    assert value_of("lskd", changed, teacher).item() == pytest.approx(expected, rel=1e-4)
    assert losses.standardized(torch.ones(2, 3)).isfinite().all()


def test_relations_by_hand():
    student, teacher = (t.detach() for t in pair())
    pred, target = softmax(student.numpy() / 2, 1), softmax(teacher.numpy() / 2, 1)
    classes = np.square(target.T @ target - pred.T @ pred).sum() / CLASSES
    samples = np.square(target @ target.T - pred @ pred.T).sum() / 4
    assert losses.class_relations(student, teacher, 2.0).item() == pytest.approx(classes, rel=1e-4)
    assert losses.sample_relations(student, teacher, 2.0).item() == pytest.approx(samples, rel=1e-4)


def test_transport_with_little_entropy_is_the_optimal_plan():
    student, teacher = (2 * t.detach() for t in pair())
    found = losses.transport(student, teacher, LABELS, COST, temperature=1.0, regularization=0.003, iterations=3000)
    expected = 0.0
    for s, t, label in zip(student.numpy(), teacher.numpy(), LABELS.tolist(), strict=True):
        pred, target = (softmax(np.delete(x, label).astype(np.float64)) for x in (s, t))
        cost, n = np.delete(np.delete(COST.numpy(), label, 0), label, 1), CLASSES - 1
        sums = np.vstack([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
        expected += linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([pred, target])).fun / 4
    assert found.item() == pytest.approx(expected, rel=0.02, abs=1e-3)


def sinkhorn_without_the_label(student, teacher, labels, cost, temperature):
    """WKD-L as in the authors' code: without row and column of the label, and not in log space."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        rest = [i for i in range(len(s)) if i != label]
        pred, target = ((logits[rest] / temperature).softmax(0) for logits in (s, t))
        among = cost[rest][:, rest]
        kernel, u = (-among / 0.05).exp(), torch.full_like(pred, 1 / len(rest))
        for _ in range(10):
            v = target / (kernel.T @ u)
            u = pred / (kernel @ v)
        total = total + (u[:, None] * kernel * v * among).sum() / len(student)
    return total


@pytest.mark.parametrize("classes", [4, 10])
def test_transport_and_its_gradient_are_those_of_the_published_iterations(classes):
    """After ten iterations the plan still depends on the initialization, which excludes the label."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    features = torch.randn(20 * classes, 6, generator=generator), torch.arange(20 * classes) % classes
    cost = 1 - (losses.class_similarity(*features, classes) - 1).exp()
    labels = torch.arange(6) % classes
    pred, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = losses.transport(pred, teacher, labels, cost, temperature=2.0)
    expected = sinkhorn_without_the_label(reference, teacher, labels, cost.double(), 2.0)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(pred.grad, reference.grad, rtol=1e-3, atol=1e-7)


def test_transport_ignores_the_label_and_falls_as_the_student_approaches():
    student, teacher = (t.detach() for t in pair())
    other = student.scatter(1, LABELS[:, None], 50.0)
    loss = partial(losses.transport, labels=LABELS, cost=COST, temperature=2.0)
    assert loss(other, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)
    assert loss(teacher, teacher) < loss(torch.lerp(student, teacher, 0.5), teacher) < loss(student, teacher)


def test_the_labels_probability_by_hand():
    student, teacher = (t.detach() for t in pair())
    pred, target = softmax(student.numpy(), 1), softmax(teacher.numpy(), 1)
    expected = np.mean([-t[i] * math.log(s[i]) for s, t, i in zip(pred, target, LABELS.tolist(), strict=True)])
    assert losses.label_probability(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_classes_with_equal_covariance_are_similar():
    labels = torch.arange(40) % 4
    spread = torch.tensor([[5.0, 0, 0], [5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]])
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    features = labels[:, None] + spread[labels] * noise[:, 3:] + 0.1 * noise[:, :3]
    similarity = losses.class_similarity(features, labels, 5)
    assert similarity.shape == (5, 5) and torch.equal(similarity.diagonal(), torch.ones(5))
    assert similarity[0, 1] > 0.95 > 0.6 > similarity[0, 2] and torch.allclose(similarity, similarity.T)
    assert similarity[4, :4].eq(0).all(), "a class without samples is like itself alone"
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(losses.class_similarity(features[order], labels[order], 5), similarity)
    for i in range(4):
        for j in range(4):
            x, y = (np.cov(features[labels == c].numpy().T) for c in (i, j))
            expected = np.trace(x @ y) / math.sqrt(np.trace(x @ x) * np.trace(y @ y))
            assert similarity[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_a_trained_temperature_is_adversarial():
    student, teacher = pair()
    term = AdversarialTemperature(curriculum=0.5)
    sigmoid = term.parameter.detach().sigmoid()
    for progress, strength in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        term.progress = progress
        loss = term(Outputs(logits=student), Outputs(logits=teacher), None)
        (gradient,) = torch.autograd.grad(loss, term.parameter)
        temperature = (1 + 20 * sigmoid).requires_grad_()
        plain = losses.soft_target_kl(student, teacher, temperature)
        (slope,) = torch.autograd.grad(plain, temperature)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        assert gradient.item() == pytest.approx(-strength * (slope * 20 * sigmoid * (1 - sigmoid)).item(), abs=1e-7)


def test_the_weight_of_transport_decays_at_the_end():
    weight = cosine_decay(600.0, 0.5)
    assert callable(weight)
    assert [weight(p) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([600, 600, 300, 0], abs=1e-6)
    assert cosine_decay(0.0, 0.5) == 0.0


def over_temperatures(loss, student, teacher, first):
    return sum(loss(student, teacher, temperature=t) for t in (first, 2.0, 3.0, 5.0, 6.0))


@pytest.mark.parametrize(("batch", "classes"), [(20, 10), (40, 10), (30, 3)])
def test_relations_of_confident_predictions_grow_with_the_images_per_class(batch, classes):
    """A confident teacher and a uniform student, computed by hand for equally many images of each class. The Gram
    matrix of classes is batch / classes on the diagonal for the teacher, and batch / classes^2 everywhere for the
    student. That of samples is 1 between images of one class for the teacher, and 1 / classes everywhere for the
    student.
    """
    teacher = 100 * F.one_hot(torch.arange(batch) % classes, classes).float()
    of_a_class, unlike = batch / classes, 1 - 1 / classes
    for loss, size in ((losses.class_relations, of_a_class**2), (losses.sample_relations, of_a_class)):
        assert loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(size * unlike, rel=1e-5)


@pytest.mark.parametrize("name", ["mlkd", "mlkd_ls"])
def test_relations_have_factors_and_drop_out_at_zero(name):
    def parts_of(**factors):
        student, teacher = (t.detach() for t in pair())
        objective = LOGIT_METHODS[name](task_of(CLASSES), **factors).objective
        return objective(Outputs(logits=student), Outputs(logits=teacher), LABELS)

    plain, less = parts_of(), parts_of(class_relations=0.5, sample_relations=0.25)
    factors = {"task": 1.0, "soft_targets": 1.0, "class_relations": 0.5, "sample_relations": 0.25}
    assert {part: (less[part] / value).item() for part, value in plain.items()} == pytest.approx(factors)
    assert parts_of(class_relations=0, sample_relations=0).keys() == {"task", "soft_targets"}


@pytest.mark.parametrize(("name", "weight", "first"), [("mlkd", 0.9, 4.0), ("mlkd_ls", 9.0, 2.0)])
def test_mlkd_sums_losses_over_two_views_and_relates_the_weak_ones(name, weight, first):
    """By numpy, as in the authors' code: CE and KL of both views, Gram matrices of the weak view."""
    (weak, weak_t), (strong, strong_t) = ([t.detach().double().numpy() for t in pair(seed)] for seed in (0, 1))
    labels = LABELS.numpy()
    expected = dict.fromkeys(("task", "soft_targets", "class_relations", "sample_relations"), 0.0)
    for s, t in ((weak, weak_t), (strong, strong_t)):
        expected["task"] -= 0.1 * np.log(softmax(s, 1)[range(4), labels]).mean()
        if name == "mlkd_ls":
            s, t = (zscore(x, 1, ddof=1) for x in (s, t))
        for temperature in (first, 2, 3, 5, 6):
            p, q = softmax(t / temperature, 1), softmax(s / temperature, 1)
            expected["soft_targets"] += weight * temperature**2 * (p * np.log(p / q)).sum(1).mean()
    for temperature in (first, 2, 3, 5, 6):
        p, q = softmax(weak_t / temperature, 1), softmax(weak / temperature, 1)
        expected["class_relations"] += weight * np.square(p.T @ p - q.T @ q).sum() / CLASSES
        expected["sample_relations"] += weight * np.square(p @ p.T - q @ q.T).sum() / 4
    batch = [torch.from_numpy(np.concatenate(x)).float() for x in ((weak, strong), (weak_t, strong_t))]
    objective = LOGIT_METHODS[name](task_of(CLASSES, views=2)).objective
    parts = objective(Outputs(logits=batch[0]), Outputs(logits=batch[1]), LABELS.repeat(2))
    assert {part: value.item() for part, value in parts.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_a_method_is_the_weighted_sum_of_its_losses(name):
    student, teacher = (t.detach() for t in pair())
    objective = LOGIT_METHODS[name](task_of(CLASSES)).objective
    objective.set_progress(0.2)
    parts = objective(Outputs(logits=student), Outputs(logits=teacher), LABELS)
    alpha = 0.1 if name in ("kd", "lskd", "mlkd", "mlkd_ls", "ctkd") else 1.0
    assert parts.pop("task").item() == pytest.approx(alpha * F.cross_entropy(student, LABELS).item(), rel=1e-5)
    pred, target = losses.standardized(student), losses.standardized(teacher)
    relations = losses.class_relations, losses.sample_relations
    expected = {
        "kd": [0.9 * losses.soft_target_kl(student, teacher, 4.0)],
        "dkd": [losses.decoupled_kd(student, teacher, LABELS, 1.0, 8.0, 4.0)],
        "dist": [2 * losses.correlation_loss(student, teacher)],
        "lskd": [9 * losses.soft_target_kl(pred, target, 2.0)],
        "dkd_ls": [losses.decoupled_kd(pred, target, LABELS, 9.0, 72.0, 2.0)],
        "mlkd": [0.9 * over_temperatures(loss, student, teacher, 4.0) for loss in (losses.soft_target_kl, *relations)],
        "mlkd_ls": [
            9 * over_temperatures(losses.soft_target_kl, pred, target, 2.0),
            *(9 * over_temperatures(loss, student, teacher, 2.0) for loss in relations),
        ],
        "ctkd": [0.9 * losses.soft_target_kl(student, teacher, 1 + 20 / (1 + math.exp(-1)))],
        "wkd": [
            losses.label_probability(student, teacher, LABELS),
            600 * losses.transport(student, teacher, LABELS, COST),
        ],
        "rld": [losses.refined_kd(student, teacher, LABELS, 1.0, 8.0, 4.0)],
        "abkd": [2 * losses.alpha_beta(student, teacher, 4.0, 0.8, 0.3)],
        "vrm": [4 * losses.sample_directions(student, teacher), 4 * losses.class_directions(student, teacher)],
    }[name]
    assert [part.item() for part in parts.values()] == pytest.approx([float(x) for x in expected], rel=1e-4)
