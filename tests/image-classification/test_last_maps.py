"""The maps that methods match: losses recomputed on the maps of the distillation toolboxes."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.image_classification.student_model.arguments import SimKDArguments
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.simkd import simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd_testing.image_networks import randomize_norms
from kd_testing.image_pairs import Pair, copied, forward_both, noise

FAMILIES = [("resnet8", "resnet14x2"), ("shufflenetv2", "wrn_16_2"), ("mobilenetv2", "vgg8"), ("wrn_16_1", "resnet50")]
FOUR_STAGES = ["attention", "nst", "vid", "ofd", "reviewkd", "fitnet"]
LABELS = torch.arange(8) % 5


@copied
def new_pair(student, teacher, size=32):
    networks = [new_classifier(name, noise(size).config) for name in (student, teacher)]
    for network in networks:
        randomize_norms(network)
    return Pair(*networks, noise(size))


def toolbox_maps(model, images):
    """feat[1:-1] of RepDistiller and feats[1:] of mdistiller, the last of which is `the` last map, written out by
    family: the outputs of the stages, of wide ResNets before the next batch norm, of VGG without its first group.
    """
    b = model.backbone
    if model.config.architecture.startswith("vgg"):
        x, maps = F.max_pool2d(b.stem(images), 2), []
        for stage, pooled in ((b.layer1, True), (b.layer2, True), (b.layer3, False), (b.layer4, False)):
            maps.append(stage(x))
            x = F.max_pool2d(maps[-1], 2) if pooled else maps[-1]
    else:
        if hasattr(b, "stem"):
            x = b.stem(images)
        else:
            x = b.conv1(images) if model.config.architecture.startswith("wrn") else b.bn1(b.conv1(images)).relu()
        maps = []
        for stage in b.stages:
            x = b.get_submodule(stage)(x)
            maps.append(x)
    return [m.detach().double().numpy() for m in maps]


def both_maps(pair):
    with torch.no_grad():
        return toolbox_maps(pair.student.train(), pair.images), toolbox_maps(pair.teacher.eval(), pair.images)


def parts_of(name, pair):
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    return {part: value.item() for part, value in method.objective(student_outputs, teacher_outputs, LABELS).items()}


def shrunk(x, size):
    """Averages maps down to `size` pixels."""
    step = x.shape[-1] // size
    return x.reshape(*x.shape[:2], size, step, size, step).mean((3, 5))


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True).clip(1e-12)


def similarity_loss(s, t):
    grams = [unit(x.reshape(len(x), -1) @ x.reshape(len(x), -1).T, 1) for x in (s, t)]
    return np.square(grams[0] - grams[1]).sum() / len(s) ** 2


def attention_loss(s, t):
    maps = [unit(np.square(x).mean(1).reshape(len(x), -1), 1) for x in (s, t)]
    return np.square(maps[0] - maps[1]).mean()


def nst_loss(s, t):
    s, t = (unit(x.reshape(*x.shape[:2], -1), 2) for x in (s, t))

    def kernel(a, b):
        return np.square(np.einsum("bcp,bdp->bcd", a, b)).mean((1, 2))

    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


@pytest.mark.parametrize(("student", "teacher"), FAMILIES)
def test_similarities_use_the_last_maps_of_the_toolboxes(student, teacher):
    pair = new_pair(student, teacher)
    expected = 3000 * similarity_loss(*(maps[-1] for maps in both_maps(pair)))
    assert parts_of("sp", pair)["similarities"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("pair", FAMILIES[:1])
def test_the_last_map_of_residual_networks_is_the_input_of_the_head(pair):
    pair = new_pair(*pair)
    with torch.no_grad():
        before_head = [
            m(pair.images).features["map"].double().numpy() for m in (pair.student.train(), pair.teacher.eval())
        ]
    expected = 3000 * similarity_loss(*before_head)
    assert parts_of("sp", pair)["similarities"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [FAMILIES[0], FAMILIES[1], FAMILIES[2], ("vgg8", "vgg11")])
@pytest.mark.parametrize(
    ("name", "weight", "loss"), [("attention", 1000, attention_loss), ("nst", 50, nst_loss)], ids=["at", "nst"]
)
def test_stages_are_those_of_the_toolboxes(name, weight, loss, student, teacher):
    """VGG and MobileNetV2 have four stages, the others three."""
    pair = new_pair(student, teacher)
    pred, target = both_maps(pair)
    assert len(pred) == len(target) == (4 if "vgg" in teacher else 3)
    expected = []
    for s, t in zip(pred, target, strict=True):
        size = min(s.shape[-1], t.shape[-1])
        expected.append(weight * loss(shrunk(s, size), shrunk(t, size)))
    found = parts_of(name, pair)
    del found["task"]
    assert list(found.values()) == pytest.approx(expected, rel=1e-3)


# SemCKD compares all stages with all, which of a ResNet-50 takes 15 seconds.
@pytest.mark.parametrize(
    ("student", "teacher", "name"),
    [
        *itertools.product(["mobilenetv2"], ["vgg13"], [*FOUR_STAGES, "semckd"]),
        *itertools.product(["vgg8"], ["resnet50"], FOUR_STAGES),
        pytest.param("vgg8", "resnet50", "semckd", marks=pytest.mark.slow),
    ],
)
def test_networks_with_four_stages_are_matched(name, student, teacher):
    parts = parts_of(name, new_pair(student, teacher, size=16))
    assert all(np.isfinite(value) for value in parts.values())


@pytest.mark.parametrize(
    ("student", "teacher", "student_channels", "teacher_channels"),
    [
        ("resnet8", "resnet14x2", 64, 128),
        ("mobilenetv2", "vgg8", 1280, 512),  # its expansion comes after the last convolution, in the authors' networks
        ("shufflenetv2", "wrn_16_2", 1024, 128),
        ("wrn_16_1", "wrn_16_2", 64, 128),
    ],
)
def test_maps_of_norm(student, teacher, student_channels, teacher_channels):
    pair = new_pair(student, teacher)
    method = METHODS["norm"](pair.spec, copies=2)
    conv = method.objective.terms["representations"].projector[0]
    assert (conv.in_channels, conv.out_channels) == (student_channels, 2 * teacher_channels)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    target = toolbox_maps(pair.teacher.eval(), pair.images)[-1]
    found = teacher_outputs.features[method.objective.terms["representations"].teacher_names[0]].double().numpy()
    np.testing.assert_allclose(found, target, rtol=1e-4, atol=1e-4)


# ---- the hint ----


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel", "stride"),
    [
        ("resnet8", "resnet14x2", nn.Conv2d, 1, 1),  # 16 pixels and 16
        ("resnet8", "vgg8", nn.Conv2d, 3, 2),  # 16 and 8
        ("vgg8", "resnet50", nn.ConvTranspose2d, 4, 2),  # 8 and 16
        ("shufflenetv2", "resnet8x4", nn.ConvTranspose2d, 4, 2),
    ],
)
def test_a_hint_has_the_size_of_the_teachers_map(student, teacher, kind, kernel, stride):
    pair = new_pair(student, teacher)
    method = METHODS["fitnet"](pair.spec)
    hint = method.objective.terms["hint"]
    conv = hint.projector[0]
    assert type(conv) is kind and conv.kernel_size == (kernel, kernel) and conv.stride == (stride, stride)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    mapped, target = (
        hint.projector(student_outputs.features[hint.student_names[0]]),
        teacher_outputs.features[hint.teacher_names[0]],
    )
    assert mapped.shape == target.shape
    loss = method.objective(student_outputs, teacher_outputs, LABELS)["hint"].item()
    assert loss == pytest.approx(100 * (mapped - target).square().mean().item(), rel=1e-4)


def test_a_hint_without_a_matching_convolution_averages_the_teachers_map_down():
    pair = new_pair("mobilenetv2", "resnet14x2", size=16)  # maps of 4 and 8 pixels: twice; of 2 and 8: four times
    hint = METHODS["fitnet"](pair.spec).objective.terms["hint"]
    assert type(hint.projector[0]) is nn.ConvTranspose2d
    far = new_pair("timm:resnet10t", "resnet8", size=64)
    method = METHODS["fitnet"](far.spec)
    student_outputs, teacher_outputs = forward_both(method, far, far.images)
    term = method.objective.terms["hint"]
    size, wanted = (
        x.features[n].shape[-1]
        for x, n in ((student_outputs, term.student_names[0]), (teacher_outputs, term.teacher_names[0]))
    )
    assert wanted > 2 * size and term.projector[0].kernel_size == (3, 3)
    expected = term.projector(student_outputs.features[term.student_names[0]]) - F.adaptive_avg_pool2d(
        teacher_outputs.features[term.teacher_names[0]], size
    )
    assert method.objective(student_outputs, teacher_outputs, LABELS)["hint"].item() == pytest.approx(
        100 * expected.square().mean().item(), rel=1e-4
    )


# ---- SimKD ----


@pytest.mark.parametrize(
    ("student", "parameters", "channels"),
    [("shufflenetv2x1.5", 271_360, 704), ("mobilenetv2", 201_728, 160), ("resnet8x4", 214_016, 256)],
)
def test_a_student_of_simkd_has_no_last_convolution(student, parameters, channels):
    """The projector's parameters, section by section: in -> 128, 3x3, 128 -> 256, each with a batch norm."""
    assert parameters == channels * 128 + 256 + 9 * 128**2 + 256 + 128 * 256 + 512
    data = noise(32, classes=100)
    teacher = new_classifier("resnet32x4", data.config)
    found = simkd_student(student, teacher, data, factor=2)
    control = simkd_student(student, teacher, data, factor=2, reuse_head=False)
    for model in (found, control):
        assert sum(p.numel() for p in model.projector.parameters()) == parameters
        assert not any(key.startswith("backbone.last") for key in model.state_dict())
    assert new_classifier(student, data.config).backbone.num_features != 160


@pytest.mark.parametrize(("teacher", "channels"), [("mobilenetv2", 1280), ("shufflenetv2", 1024), ("wrn_16_2", 128)])
def test_a_teacher_of_simkd_outputs_the_map_that_its_head_averages(teacher, channels, tmp_path):
    pair = new_pair("resnet8", teacher)
    student = simkd_student("resnet8", pair.teacher, pair.data, factor=2)
    method = simkd(student, pair.teacher, SimKDArguments(), temperature=4.0)
    _, teacher_outputs = forward_both(method, Pair(student, pair.teacher, pair.data), pair.images)
    target = teacher_outputs.features["map"]
    assert target.shape[1] == channels and student.config.projector["out_channels"] == channels
    torch.testing.assert_close(pair.teacher.head(target.mean((2, 3))), teacher_outputs.logits)


@pytest.mark.parametrize("student", ["mobilenetv2", "shufflenetv2"])
@pytest.mark.parametrize("projector", ["single", "multi", "all-layer"])
def test_a_student_without_its_last_convolution_trains_and_loads(student, projector, tmp_path):
    pair = new_pair("resnet8", "resnet14x2")
    model = simkd_student(student, pair.teacher, pair.data, factor=2)
    method = simkd(model, pair.teacher, SimKDArguments(projector=projector), temperature=4.0)
    student_outputs, teacher_outputs = forward_both(method, Pair(model, pair.teacher, pair.data), pair.images)
    sum(method.objective(student_outputs, teacher_outputs, LABELS).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            ImageClassifier.from_pretrained(tmp_path).eval()(pair.images).logits, model(pair.images).logits
        )


# ---- CAT-KD ----


def test_normalized_class_maps_have_length_one():
    pair = new_pair("resnet8", "resnet14x2")
    method = METHODS["catkd"](pair.spec, weight=2.0, size=4, normalized=True)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)

    def class_maps(outputs, head):
        weight = head.weight.detach().double().numpy()
        maps = np.einsum("kc,bchw->bkhw", weight, outputs.features["map"].detach().double().numpy())
        return unit(shrunk(maps, 4).reshape(*maps.shape[:2], -1), 2)

    gap = class_maps(student_outputs, pair.student.head) - class_maps(teacher_outputs, pair.teacher.head)
    found = method.objective(student_outputs, teacher_outputs, LABELS)["class_maps"].item()
    assert found == pytest.approx(2 * np.square(gap).mean(), rel=1e-4)
