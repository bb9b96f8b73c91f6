"""Methods that match maps or use heads: recomputed losses, trained parameters, saved parameters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd.common import losses
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.methods.last_map import class_maps, n_to_one
from kd.image_classification.teacher_model.classifier import new_classifier
from kd_testing.image_pairs import Pair, copied, forward_both, noise

EVERY_STAGE = ("attention", "nst", "vid")
ANY_NETWORKS = ("fitnet", "srrl", "catkd", "norm", "rkd", "sp", "pkt", "cc")


@copied
def new_pair(student: str = "resnet8", teacher: str = "resnet14x2", size: int = 16) -> Pair:
    data = noise(size)
    return Pair(new_classifier(student, data.config), new_classifier(teacher, data.config), data)


def parts_of(name: str, pair: Pair):
    """A method, the outputs of both networks, and the terms of its loss."""
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    return (
        method,
        student_outputs,
        teacher_outputs,
        method.objective(student_outputs, teacher_outputs, pair.data.splits["validation"].labels[: len(pair.images)]),
    )


def array(tensor):
    return tensor.detach().double().numpy()


def batch_normed(x):
    """Normalizes as an untrained batch norm in train mode; the channels are the second dimension."""
    axes = tuple(i for i in range(x.ndim) if i != 1)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def convolved(x, weight):
    return np.einsum("oc,bchw->bohw", array(weight)[:, :, 0, 0], x)


# ---- losses, by numpy ----


def test_nst_against_a_loop_over_channels():
    pred, target = (torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(1)) for channels in (2, 4))

    def mean_kernel(a, b):
        found = 0.0
        for x, y in np.ndindex(len(a), len(b)):
            u, v = a[x].ravel(), b[y].ravel()
            found += (u @ v / np.linalg.norm(u) / np.linalg.norm(v)) ** 2 / (len(a) * len(b))
        return found

    gaps = [
        mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
        for s, t in zip(array(pred), array(target), strict=True)
    ]
    assert losses.nst(pred, target).item() == pytest.approx(np.mean(gaps), rel=1e-5)
    assert losses.nst(pred, target, torch.tensor([0, 1])).item() == pytest.approx(gaps[1], rel=1e-5)
    assert losses.nst(target, 3 * target).item() == pytest.approx(0, abs=1e-6)  # the scale has no effect
    assert losses.nst(target, target[:, [2, 0, 3, 1]]).item() == pytest.approx(
        0, abs=1e-6
    )  # nor does the order of the channels
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)
    losses.nst(dead, target).backward()
    assert dead.grad.isfinite().all()
    with pytest.raises(ValueError, match="shapes differ"):
        losses.nst(pred, target[..., :2])


def test_variational_is_a_gaussian_likelihood_with_its_minimum_at_the_true_variance():
    pred, target = (torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    variance = torch.tensor([0.5, 1.0, 4.0])
    expected = F.gaussian_nll_loss(pred, target, variance[:, None, None].expand_as(pred))
    assert losses.variational(pred, target, variance).item() == pytest.approx(expected.item(), rel=1e-6)
    right = (pred - target).square().mean((0, 2, 3))
    least = losses.variational(pred, target, right)
    assert least.item() == pytest.approx((1 + right.log().mean().item()) / 2, rel=1e-5)
    assert all(losses.variational(pred, target, right * factor) > least for factor in (0.9, 1.1))
    masked = losses.variational(pred, target, variance, torch.tensor([1, 0, 0, 0]))
    assert masked.item() == pytest.approx(losses.variational(pred[:1], target[:1], variance).item(), rel=1e-6)


def test_vid_against_numpy():
    method, student_outputs, teacher_outputs, parts = parts_of("vid", new_pair())
    assert set(parts) == {"task", "information_0", "information_1", "information_2"}
    for number, (path, teacher_path) in enumerate(zip(method.features, method.teacher_features, strict=True)):
        match = method.objective.terms[f"information_{number}"]
        x = array(student_outputs.features[path])
        for layer in match.projector[:-1:2]:
            x = np.maximum(convolved(x, layer.weight), 0)
        means, target = convolved(x, match.projector[-1].weight), array(teacher_outputs.features[teacher_path])
        expected = ((means - target) ** 2 / 5 + math.log(5)).mean() / 2  # the variance begins as 5
        assert parts[f"information_{number}"].item() == pytest.approx(expected, rel=1e-4)


def test_srrl_against_numpy():
    pair = new_pair()
    method, student_outputs, teacher_outputs, parts = parts_of("srrl", pair)
    x = array(student_outputs.features["pooled"])
    mapped = np.maximum(
        batch_normed(x @ array(method.objective.terms["regression"].regressor[0].weight)[:, :, 0, 0].T), 0
    )
    logits = mapped @ array(pair.teacher.head.weight).T + array(pair.teacher.head.bias)
    expected = ((mapped - array(teacher_outputs.features["pooled"])) ** 2).mean() + (
        (logits - array(teacher_outputs.logits)) ** 2
    ).mean()
    assert parts["regression"].item() == pytest.approx(expected, rel=1e-4)


def test_catkd_against_numpy():
    pair = new_pair(size=32)  # maps of 8 x 8, averaged over quarters
    _, student_outputs, teacher_outputs, parts = parts_of("catkd", pair)

    def class_activations(outputs, head):
        maps = np.einsum("kc,bchw->bkhw", array(head.weight), array(outputs.features["map"]))
        return maps.reshape(*maps.shape[:2], 2, 4, 2, 4).mean((3, 5))

    gap = class_activations(student_outputs, pair.student.head) - class_activations(teacher_outputs, pair.teacher.head)
    assert parts["class_maps"].item() == pytest.approx(15 * (gap**2).mean(), rel=1e-4)


def test_norm_against_numpy():
    method, student_outputs, teacher_outputs, parts = parts_of("norm", new_pair())
    match = method.objective.terms["representations"]
    expanded = batch_normed(convolved(array(student_outputs.features["map"]), match.projector[0].weight))
    target = array(teacher_outputs.features["map"])
    copies = [((expanded[:, 128 * i : 128 * (i + 1)] - target) ** 2).mean() for i in range(8)]
    assert expanded.shape[1] == 8 * 128 and (expanded < 0).any(), "linear, without a ReLU"
    assert parts["representations"].item() == pytest.approx(0.1 * sum(copies), rel=1e-4)  # a tenth at the beginning


def test_n_to_one_sums_over_whole_copies_of_the_teachers_map():
    target = torch.randn(2, 3, 4, 4)
    assert n_to_one(target.repeat(1, 5, 1, 1), target).item() == 0
    assert n_to_one(torch.cat([target, target + 2, target + 1], 1), target).item() == pytest.approx(4 + 1, rel=1e-5)


def test_the_weight_of_norm_has_the_phases_of_240_epochs():
    objective = METHODS["norm"](new_pair().spec, weight=2.0).objective
    found = {}
    for epoch in (0, 9, 10, 20, 179, 180, 210, 240):
        objective.set_progress(epoch / 240)
        found[epoch] = objective.current_weights()["representations"] / 2
    assert found == {0: 0.1, 9: 0.1, 10: 0.5, 20: 1.0, 179: 1.0, 180: 0.5, 210: 0.1, 240: 0.1}
    assert METHODS["norm"](new_pair().spec, weight=0.0).objective.weights == {"task": 0.1}


# ---- trained and saved parameters ----


def test_variances_of_vid_are_trained():
    method, student_outputs, teacher_outputs, _ = parts_of("vid", new_pair())
    variances = [match.loss.variance for name, match in method.objective.terms.items() if name != "task"]
    assert {id(v) for v in variances} <= {id(p) for p in method.objective.parameters()}
    assert sum("variance" in name for name in method.objective.state_dict()) == len(variances) == 3
    before = [v.detach().clone() for v in variances]
    target = {name: value.detach() for name, value in student_outputs.features.items()}
    optimizer = torch.optim.SGD(method.objective.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        parts = method.objective(
            Outputs(logits=student_outputs.logits.detach(), features=target), teacher_outputs, torch.zeros(8).long()
        )
        sum(parts.values()).backward()
        optimizer.step()
    for after, first in zip(variances, before, strict=True):
        torch.testing.assert_close(F.softplus(first), torch.full_like(first, 5.0), atol=1e-4, rtol=0)
        assert (after < first).all(), "the maps vary by less than 5"


def test_the_teachers_head_in_srrl_is_neither_trained_nor_saved():
    pair = new_pair()
    method, _, _, parts = parts_of("srrl", pair)
    before = pair.teacher.head.weight.detach().clone()
    parts["regression"].backward()
    assert all(".regressor." in name for name in method.objective.state_dict())
    assert all(".regressor." in name for name, _ in method.objective.named_parameters())
    assert pair.teacher.head.weight.grad is None and torch.equal(pair.teacher.head.weight, before)
    assert pair.student.head.weight.grad is None, "the labels train the student's head"
    # With the objective they go to its device and type, wherever the teacher is.
    term = method.objective.double().terms["regression"]
    assert term.weight.dtype == term.bias.dtype == torch.float64 != pair.teacher.head.weight.dtype


def test_class_maps_train_the_students_head_without_saving_it():
    pair = new_pair()
    method, student_outputs, _, parts = parts_of("catkd", pair)
    parts["class_maps"].backward()
    assert pair.student.head.weight.grad.abs().sum() > 0
    assert pair.teacher.head.weight.grad is None
    assert not list(method.objective.parameters()) and not method.objective.state_dict()
    maps = class_maps(student_outputs.features["map"], pair.student.head.weight, size=4)
    torch.testing.assert_close(maps.mean(2) + pair.student.head.bias, student_outputs.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["srrl", "catkd"])
def test_a_head_that_is_not_linear_is_an_error(name):
    pair = new_pair()
    shape = {"codebooks": 4, "codebook_size": 8}
    teacher = new_classifier("resnet14x2", pair.data.config, bottleneck=shape)
    with pytest.raises(UserError, match="linear head, but resnet14x2 has a DiscreteKeyValueBottleneck") as error:
        METHODS[name](Pair(pair.student, teacher, pair.data).spec)
    assert "\n" not in str(error.value)


# ---- different architectures ----


@pytest.mark.parametrize("name", EVERY_STAGE)
def test_stages_may_differ_in_size_but_not_in_number(name):
    _, _, _, parts = parts_of(name, new_pair("shufflenetv2", "resnet14x2", size=32))
    assert len(parts) == 4 and all(part.isfinite() for part in parts.values())
    _, _, _, parts = parts_of(name, new_pair("resnet8", "shufflenetv2", size=32))
    assert len(parts) == 4 and all(part.isfinite() for part in parts.values())
    with pytest.raises(UserError, match="resnet8 has 3 and vgg8 4: choose networks with equally many stages") as error:
        METHODS[name](new_pair("resnet8", "vgg8").spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ANY_NETWORKS)
@pytest.mark.parametrize("networks", [("resnet8", "vgg8"), ("vgg8", "resnet14x2"), ("timm:resnet10t", "resnet8")])
def test_other_methods_accept_any_two_networks(name, networks):
    pair = new_pair(*networks, size=32)
    method, _, _, parts = parts_of(name, pair)
    sum(parts.values()).backward()
    assert all(part.isfinite() and part > 0 for part in parts.values())
    assert all(p.grad is not None for p in method.objective.parameters())
    assert next(pair.student.parameters()).grad.abs().sum() > 0
