"""Losses between relations of samples: closed forms, loops over triplets, and coinciding points."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from kd.common import losses
from kd.common.methods import Feature, ModelFeatures, TaskSpec
from kd.common.methods.classification import RELATION_METHODS, cc
from kd.common.outputs import Outputs

RELATIONS = {  # losses that do not depend on the scale of the features
    "similarity_preserving": losses.similarity_preserving,
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "pkt": losses.pkt,
    "similarity_l2": losses.similarity_l2,
}
ALL = RELATIONS | {"correlation_congruence": losses.correlation_congruence}


def each(which):
    return pytest.mark.parametrize("loss", which.values(), ids=which.keys())


def features(batch=6, width=5, seed=0):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


# ---- values ----


def test_similarities_by_hand():
    pred = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # Q is the identity
    target = torch.tensor(
        [[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]
    )  # F F^T = [[2, 4], [4, 8]]: both rows are (1, 2) / sqrt 5
    a, b = 5**-0.5, 2 * 5**-0.5
    expected = ((1 - a) ** 2 + b**2 + a**2 + (1 - b) ** 2) / 4
    assert losses.similarity_preserving(pred, target).item() == pytest.approx(expected, rel=1e-6)


def test_cosine_similarities_by_hand():
    pred = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # cosine 0
    target = torch.tensor([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])  # cosine 3/5
    assert losses.similarity_l2(pred, target).item() == pytest.approx(2 * 0.6**2 / 4)


def test_info_nce_is_the_cross_entropy_of_cosines():
    first, second = features().requires_grad_(), features(seed=1).requires_grad_()
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    loss = losses.info_nce(first, second, temperature=0.5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(cosines / 0.5, torch.arange(len(first))))
    loss.backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0
    assert losses.info_nce(first, first, temperature=1e-3).item() == pytest.approx(0)
    for temperature, other in ((0, second), (1, second[:3])):
        with pytest.raises(ValueError):
            losses.info_nce(first, other, temperature)


def test_relative_distances_by_hand():
    pred, target = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    # Distances 1, 2, 3 over their mean 2, and 1, 1, 2 over 4/3: two pairs of three differ by 1/4, each counted twice.
    assert losses.rkd_distance(pred, target).item() == pytest.approx(4 * 0.5 * 0.25**2 / 9, rel=1e-6)
    # The mean of the nonzero distances is 1, so 1, 1, 0 are compared with 3/4, 3/4, 3/2.
    coinciding = torch.tensor([[0.0], [1.0], [0.0]])
    expected = 2 * (2 * 0.5 * 0.25**2 + (1.5 - 0.5)) / 9
    assert losses.rkd_distance(coinciding, target).item() == pytest.approx(expected, rel=1e-6)


def test_angles_against_a_loop_over_triplets():
    pred, target = features(), features(width=7, seed=1)

    def angles(x):
        x, size = x.double().numpy(), len(x)
        found = np.zeros((size, size, size))
        for i, j, k in np.ndindex(found.shape):
            if i not in (j, k):
                a, b = x[j] - x[i], x[k] - x[i]
                found[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return found

    gap = np.abs(angles(pred) - angles(target))
    expected = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    assert losses.rkd_angle(pred, target).item() == pytest.approx(expected, rel=1e-5)


def test_neighbours_against_scipys_entropy():
    pred, target = features(), features(width=7, seed=1)

    def neighbours(x):
        x = x.double().numpy()
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdims=True)

    expected = entropy(neighbours(target), neighbours(pred), axis=1).sum() / 6**2
    assert losses.pkt(pred, target).item() == pytest.approx(expected, rel=1e-4)


def test_congruence_by_hand():
    pred, target = torch.tensor([[1.0, -2.0], [0.0, 3.0], [1.0, 1.0]]), torch.zeros(3, 2)
    assert losses.correlation_congruence(pred, target).item() == pytest.approx(((1 * 0 + 2 * 3) + (0 * 1 + 3 * 1)) / 2)
    assert losses.correlation_congruence(pred[[1, 0, 2]], target).item() == pytest.approx((6 + (1 + 2)) / 2)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.correlation_congruence(pred, torch.zeros(3, 3))


# ---- properties of all losses ----


@each(RELATIONS)
def test_widths_may_differ_but_batch_sizes_may_not(loss):
    assert loss(features(), features(width=9, seed=1)) > 1e-4
    with pytest.raises(ValueError, match="shapes differ"):
        loss(features(), features(batch=5))


@each(ALL)
def test_zero_at_equality_and_above_zero_elsewhere(loss):
    for seed in range(10):
        assert loss(features(seed=seed), features(seed=seed)).item() == pytest.approx(0, abs=1e-7)
        assert loss(features(seed=seed), features(seed=seed + 10)) > 1e-4


@each(RELATIONS)
def test_scale_and_rotation_have_no_effect(loss):
    rotation = torch.linalg.qr(features(5, 5, seed=2)).Q
    assert loss(3 * features() @ rotation, features()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_distances_and_angles_do_not_depend_on_the_origin(loss):
    target = features(seed=1)
    assert loss(features() + 1.0, target).item() == pytest.approx(loss(features(), target).item(), rel=1e-4)


@each(RELATIONS)
def test_the_order_of_the_batch_has_no_effect(loss):
    pred, target, order = features(), features(seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss(pred[order], target[order]).item() == pytest.approx(loss(pred, target).item(), rel=1e-5)


@each(ALL)
def test_gradient_is_the_slope_and_reaches_only_the_student(loss):
    pred, target = features().requires_grad_(), features(seed=1).requires_grad_()
    loss(pred, target).backward()
    assert target.grad is None
    direction, step = features(seed=2), 1e-3  # small, for the corners of absolute values
    with torch.no_grad():
        slope = (loss(pred + step * direction, target) - loss(pred - step * direction, target)) / (2 * step)
    assert slope.abs() > 1e-4
    assert slope == pytest.approx((pred.grad * direction).sum().item(), rel=2e-2)


@each(ALL)
def test_low_precision_is_computed_in_fp32(loss):
    pred, target = features().bfloat16(), features(seed=1).bfloat16()
    expected = loss(pred.float(), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(pred, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@each(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coinciding_points_and_dead_features_are_finite(loss, dtype):
    batches = {
        "twice the same": features()[[0, 1, 2, 2, 1, 0]],
        "all the same": features()[[0, 0, 0, 0, 0, 0]],
        "all zero": torch.zeros(6, 5),
        "some zero": features() * torch.tensor([1.0, 0, 1, 0, 1, 1])[:, None],
        "huge": 1e4 * features(),
        "opposite": torch.cat([features()[:3], -features()[:3]]),
    }
    for name, batch in batches.items():
        for other in (features(seed=1), batch):
            pred = batch.to(dtype).requires_grad_()
            value = loss(pred, other.to(dtype))
            value.backward()
            assert value.isfinite() and pred.grad.isfinite().all(), name
            if loss is not losses.correlation_congruence and name != "huge":
                assert pred.grad.abs().max() < 100, name  # no division by a length of zero


@each(ALL)
def test_a_batch_of_one_has_no_relations(loss):
    pred = features(1).requires_grad_()
    value = loss(pred, features(1, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and pred.grad.isfinite().all()


# ---- methods ----


def task(width=4, teacher_width=6):
    def features_of(width):
        feature = Feature("pooled", width)
        return ModelFeatures([feature], feature, feature)

    def identity(feature, mask):
        return feature

    none = torch.zeros(0, teacher_width), torch.zeros(0)
    return TaskSpec(3, width, teacher_width, features_of, identity, identity, none[1], lambda: none)


def test_published_weights():
    weights = {
        name: {term: w for term, (w, _) in method(task()).terms.items()} for name, method in RELATION_METHODS.items()
    }
    assert weights == {
        "rkd": {"task": 1.0, "distances": 25.0, "angles": 50.0},
        "sp": {"task": 1.0, "similarities": 3000.0},
        "pkt": {"task": 1.0, "neighbours": 30000.0},
        "cc": {"task": 1.0, "congruence": 0.02},
    }


def test_embeddings_of_cc_cannot_shrink_to_zero():
    _, term = cc(task(), width=16).terms["congruence"]
    loss = term.loss
    assert {name for name, _ in loss.named_parameters()} == {"student_embedding.weight", "student_embedding.bias"}
    assert "teacher_embedding" in loss.state_dict(), "random, so it must be checkpointed"
    student, teacher = (Outputs(features={"pooled": x}) for x in (features(6, 4), features(6, 6, seed=1)))
    embedded = student.features["pooled"] @ loss.student_embedding.weight.T + loss.student_embedding.bias
    target = teacher.features["pooled"] @ loss.teacher_embedding.T
    expected = losses.correlation_congruence(embedded, target)
    assert term(student, teacher, None).item() == pytest.approx(expected.item(), rel=1e-5)
    before = loss.teacher_embedding.clone()
    optimizer = torch.optim.SGD(term.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        term(student, teacher, None).backward()
        optimizer.step()
    assert torch.equal(loss.teacher_embedding, before)
    assert loss.student_embedding(student.features["pooled"]).norm() > 0.5 * target.norm()
