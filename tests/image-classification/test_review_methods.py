"""Methods that match many maps at once (OFD, knowledge review, SemCKD): their maps, layers and losses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from kd.common.losses import hierarchical_l2, mean_below_zero
from kd.common.methods import Feature, depth_map
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.matching import (
    maps_before_relu,
    pre_activations,
    stage_paths,
)
from kd.image_classification.student_model.methods import METHODS, image_method
from kd.image_classification.student_model.methods.all_stages import Calibration, Fusion, Review
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier
from kd_testing.image_networks import assert_close_features, randomize_norms
from kd_testing.image_pairs import Pair, copied, forward_both, forward_with_features, noise
from kd_testing.image_training import train

# families that expose their maps before the last ReLU of a stage, and families that do not
SHOWING = ["resnet20", "resnet50", "wrn_16_2", "vgg11", "shufflenetv1"]
HIDING = ["mobilenetv2", "shufflenetv2x0.5", "timm:resnet10t"]


def network(name: str, size: int = 16) -> ImageClassifier:
    """A network with random batch norms, as after training."""
    model = new_classifier(name, noise(size).config)
    randomize_norms(model)
    return model.eval()


@copied
def new_pair(student: str = "resnet8", teacher: str = "resnet14x2", size: int = 16) -> Pair:
    return Pair(network(student, size), network(teacher, size), noise(size))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def features(outputs: Outputs) -> dict[str, Tensor]:
    assert outputs.features
    return outputs.features


# ---- maps before a ReLU ----


@torch.no_grad()
def recorded(model: ImageClassifier, paths: list[str], images: Tensor) -> dict[str, Tensor]:
    return features(forward_with_features(model, {path: path for path in paths}, images))


@pytest.mark.parametrize("name", SHOWING)
def test_hooked_maps_are_the_inputs_of_the_last_relus(name):
    model = network(name)
    found, stages = pre_activations(model), stage_paths(model)
    assert len(found) == len(stages)
    maps = recorded(model, [*stages, *(path for path, _ in found)], torch.randn(2, 3, 16, 16))
    for (path, norm_path), stage in zip(found, stages, strict=True):
        norm = model.get_submodule(norm_path)
        assert isinstance(norm, nn.BatchNorm2d) and norm.num_features == maps[path].shape[1]
        assert maps[path].min() < 0
        after = norm(maps[stage]) if name == "wrn_16_2" else maps[path].relu()  # whose stages end in a sum
        torch.testing.assert_close(after, maps[path] if name == "wrn_16_2" else maps[stage])
    torch.testing.assert_close(maps[found[-1].path].relu(), maps["map"])
    assert not any("before_relu" in key for key in model.state_dict())


@pytest.mark.parametrize("name", SHOWING)
def test_a_folded_teacher_has_the_same_maps(name):
    model = network(name)
    images, paths = torch.randn(2, 3, 16, 16), [path for path, _ in pre_activations(model)]
    whole, fast = recorded(model, paths, images), recorded(frozen(model, "fp32"), paths, images)
    for path in paths:
        assert_close_features(fast[path], whole[path])


@pytest.mark.parametrize("name", HIDING)
def test_only_ofd_needs_a_teacher_with_maps_before_its_relus(name):
    size = 64 if "timm" in name else 16
    model = network(name, size)
    assert [map.path for map in maps_before_relu(model)] == stage_paths(model)
    with pytest.raises(UserError, match=f"{name} does not expose the maps before the last ReLU") as caught:
        METHODS["ofd"](new_pair("resnet8", name, size).spec)
    assert "\n" not in str(caught.value)
    if "timm" not in name:
        METHODS["ofd"](new_pair(name, "resnet8").spec)
        METHODS["reviewkd"](new_pair("resnet8", name).spec)


@pytest.mark.parametrize(
    ("student", "teacher", "names"),
    [
        ("mobilenetv2", "vgg8", ("ofd", "reviewkd")),
        ("shufflenetv2x0.5", "resnet8x4", ("ofd", "reviewkd", "semckd")),
        ("vgg8", "wrn_16_1", ("ofd", "reviewkd", "semckd")),
        ("resnet8", "mobilenetv2", ("reviewkd", "semckd")),
    ],
)
def test_networks_of_different_families_are_matched(student, teacher, names):
    pair = new_pair(student, teacher)
    for name in names:
        method = METHODS[name](pair.spec)
        method.objective.set_progress(0.5)
        student_outputs, teacher_outputs = forward_both(method, pair, pair.images[:3])
        parts = method.objective(student_outputs, teacher_outputs, torch.arange(3))
        torch.stack(list(parts.values())).sum().backward()
        assert all(part.item() > 0 for part in parts.values()), name
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.objective.parameters()), name


def test_stages_are_matched_from_the_last_one():
    assert depth_map(4, 3, "last") == [(1, 0), (2, 1), (3, 2)]
    assert depth_map(1, 3, "last") == [(0, 2)]


# ---- OFD ----


def test_ofd_by_numpy():
    """Margins come from the teacher's batch norms, although the teacher that runs has folded them."""
    pair = new_pair()
    method = METHODS["ofd"](pair.spec)
    student_outputs, _ = forward_both(method, pair, pair.images)
    with torch.no_grad():
        teacher_outputs = forward_with_features(frozen(pair.teacher, "fp32"), method.teacher_features, pair.images)
    parts = method.objective(student_outputs, teacher_outputs, torch.arange(8) % 5)
    pairs = zip(maps_before_relu(pair.student), pre_activations(pair.teacher), strict=True)
    for number, (stage, wanted) in enumerate(pairs):
        connector = method.objective.terms[f"overhaul_{number}"].projector[0]
        s = np.einsum(
            "oc,bchw->bohw", array(connector.weight)[:, :, 0, 0], array(features(student_outputs)[stage.path])
        )
        s = (s - s.mean((0, 2, 3), keepdims=True)) / np.sqrt(s.var((0, 2, 3), keepdims=True) + 1e-5)
        norm = pair.teacher.get_submodule(wanted.norm)
        margin = array(mean_below_zero(norm.bias, norm.weight))[:, None, None]
        t = np.maximum(array(features(teacher_outputs)[wanted.path]), margin)
        expected = 1e-3 * 0.5 ** (2 - number) * np.where((s > t) | (t > 0), (s - t) ** 2, 0).sum() / 8
        assert parts[f"overhaul_{number}"].item() == pytest.approx(expected, rel=1e-3)


def test_the_teacher_of_ofd_stays_in_eval_mode(tmp_path):
    pair = new_pair()
    pair.teacher.train()  # the trainer must switch it to eval mode
    before = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
    method = METHODS["ofd"](pair.spec)
    margins = [method.objective.terms[f"overhaul_{i}"].loss.margin.clone() for i in range(3)]
    weights = [p.detach().clone() for p in method.objective.parameters()]
    trainer = train(tmp_path, pair, method, max_steps=3)
    assert trainer.teacher is not None and not any(module.training for module in trainer.teacher.modules())
    assert trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.state_dict().items())
    assert all(torch.equal(method.objective.terms[f"overhaul_{i}"].loss.margin, m) for i, m in enumerate(margins))
    assert all(not torch.equal(p, w) for p, w in zip(method.objective.parameters(), weights, strict=True))


# ---- knowledge review ----


def test_knowledge_review_has_the_published_levels():
    """VGG13 -> MobileNetV2 and ResNet32x4 -> ResNet8x4, as in the authors' code."""
    for student, teacher, levels in (
        ("mobilenetv2", "vgg13", [(12, 128), (16, 256), (48, 512), (160, 512), (1280, 512)]),
        ("resnet8x4", "resnet32x4", [(64, 64), (128, 128), (256, 256), (256, 256)]),
    ):
        review = METHODS["reviewkd"](new_pair(student, teacher).spec).objective.terms["review"]
        assert [(level.enter[0].in_channels, level.leave[0].out_channels) for level in review.levels] == levels
        assert {level.enter[0].out_channels for level in review.levels} == {min(512, levels[-1][0])}
        assert [level.attention is None for level in review.levels] == [False] * (len(levels) - 1) + [True]


def test_the_weight_of_knowledge_review_rises_over_20_of_240_epochs():
    objective = METHODS["reviewkd"](new_pair().spec).objective
    for epoch, share in ((0, 0.0), (5, 0.25), (20, 1.0), (240, 1.0)):
        objective.set_progress(epoch / 240)
        assert objective.current_weights()["review"] == pytest.approx(5 * share)


def test_fusion_adds_maps_weighted_by_attention():
    torch.manual_seed(0)
    fusion = Fusion(3, middle=4, target_channels=5, fuses=True).eval()
    pred, deeper = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    reviewed, fused = fusion(pred, deeper, size=8)
    entered = F.conv2d(pred, fusion.enter[0].weight) / (1 + 1e-5) ** 0.5
    below = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    conv = fusion.attention[0]
    shares = F.conv2d(torch.cat([entered, below], 1), conv.weight, conv.bias).sigmoid()
    expected = (shares[:, [0]] * entered + shares[:, [1]] * below).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(reviewed, F.conv2d(expected, fusion.leave[0].weight, padding=1) / (1 + 1e-5) ** 0.5)


def test_knowledge_review_starts_at_the_deepest_level():
    torch.manual_seed(0)
    review = Review([(Feature("a", 3), Feature("x", 4)), (Feature("map", 5), Feature("map", 6))]).eval()
    student_outputs = Outputs(features={"a": torch.randn(2, 3, 8, 8), "map": torch.randn(2, 5, 1, 1)})
    teacher_outputs = Outputs(features={"x": torch.randn(2, 4, 4, 4), "map": torch.randn(2, 6, 1, 1)})
    upper, lower = review.levels
    pooled, deeper = lower(features(student_outputs)["map"], None, 1)
    reviewed, _ = upper(features(student_outputs)["a"], deeper, 4)
    expected = hierarchical_l2(reviewed, features(teacher_outputs)["x"])
    expected = expected + (pooled - features(teacher_outputs)["map"]).square().mean()
    torch.testing.assert_close(review(student_outputs, teacher_outputs, None), expected)


# ---- SemCKD ----


def calibration(batch: int = 4) -> tuple[Calibration, Outputs, Outputs]:
    """A student of two stages, 2x2 and 1x1, and a teacher of two, 4x4 and 1x1, with four images."""
    torch.manual_seed(0)
    term = Calibration([Feature("a", 2), Feature("b", 3)], [Feature("x", 2), Feature("y", 4)], batch).eval()
    student_outputs = Outputs(features={"a": torch.randn(4, 2, 2, 2), "b": torch.randn(4, 3, 1, 1)})
    return term, student_outputs, Outputs(features={"x": torch.randn(4, 2, 4, 4), "y": torch.randn(4, 4, 1, 1)})


def embedded(layers, maps):
    """Unit vectors of rows of similarities, as in the authors' code for a full batch."""
    first, _, last = layers
    flat = array(maps).reshape(len(maps), -1)
    hidden = np.maximum(flat @ flat.T @ array(first.weight).T + array(first.bias), 0)
    rows = hidden @ array(last.weight).T + array(last.bias)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_semckd_by_numpy():
    term, student_outputs, teacher_outputs = calibration()
    queries = np.stack(
        [embedded(layers, features(student_outputs)[n]) for layers, n in zip(term.queries, "ab", strict=True)], 1
    )
    keys = np.stack(
        [embedded(layers, features(teacher_outputs)[n]) for layers, n in zip(term.keys, "xy", strict=True)], 1
    )
    attention = softmax(np.einsum("bsd,btd->bst", queries, keys), axis=2)
    found = term.attention(list(features(student_outputs).values()), list(features(teacher_outputs).values()))
    np.testing.assert_allclose(array(found), attention, rtol=1e-4)
    np.testing.assert_allclose(array(found).sum(-1), 1, rtol=1e-6)
    loss = 0.0
    for i, stage in enumerate("ab"):
        for j, wanted in enumerate("xy"):
            s, t = features(student_outputs)[stage], features(teacher_outputs)[wanted]
            size = min(s.shape[-1], t.shape[-1])
            projected = term.projections[i][j](F.adaptive_avg_pool2d(s, size))
            squares = np.square(array(projected) - array(F.adaptive_avg_pool2d(t, size)))
            loss += (attention[:, i, j] * squares.mean((1, 2, 3))).sum() / (4 * 2)
    assert term(student_outputs, teacher_outputs, None).item() == pytest.approx(loss, rel=1e-4)


def test_missing_images_of_a_smaller_batch_have_similarity_zero():
    """They are treated as images whose maps are zero."""
    term, student_outputs, teacher_outputs = calibration(batch=6)
    small = term.attention(list(features(student_outputs).values()), list(features(teacher_outputs).values()))
    filled = [
        [torch.cat([maps, torch.zeros(2, *maps.shape[1:])]) for maps in features(outputs).values()]
        for outputs in (student_outputs, teacher_outputs)
    ]
    torch.testing.assert_close(term.attention(*filled)[:4], small)


def test_a_larger_batch_is_an_error_and_scripts_set_the_batch_size():
    term, student_outputs, teacher_outputs = calibration(batch=3)
    with pytest.raises(UserError, match="batches of 3, this one has 4 images: pass --method semckd:batch=4") as caught:
        term(student_outputs, teacher_outputs, None)
    assert "\n" not in str(caught.value)
    for spec, strong, expected in (("semckd", False, 24), ("semckd", True, 48), ("semckd:batch=100", False, 100)):
        args = ImageTrainingArguments(per_device_train_batch_size=24, strong_augmentation=strong, use_cpu=True)
        term = image_method(spec, args)(new_pair().spec).objective.terms["calibration"]
        assert isinstance(term, Calibration) and term.batch == expected


@pytest.mark.parametrize("name", ["reviewkd", "semckd"])
def test_training_changes_student_and_auxiliary_parameters(name, tmp_path):
    pair = new_pair()
    method = METHODS[name](pair.spec, weight=1.0)
    before = [p.detach().clone() for p in [*pair.student.parameters(), *method.objective.parameters()]]
    train(tmp_path, pair, method, max_steps=3, learning_rate=0.01)
    after = [*pair.student.parameters(), *method.objective.parameters()]
    moved = [not torch.equal(p, w) for p, w in zip(after, before, strict=True)]
    assert all(moved) and all(p.isfinite().all() for p in after)
    assert set(pair.student.state_dict()) == set(network("resnet8").state_dict())
