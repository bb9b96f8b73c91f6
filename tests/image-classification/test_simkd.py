"""SimKD and its variants: matched maps, the saved student, and losses."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from kd.common import losses
from kd.common.cli import parse
from kd.common.methods import depth_map
from kd.common.objective import FeatureTerm
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.student_model import matching
from kd.image_classification.student_model.arguments import SimKDArguments
from kd.image_classification.student_model.matching import block_paths, image_features, stage_paths
from kd.image_classification.student_model.simkd import (
    FEATURE_LOSSES,
    share_masked,
    simkd,
    simkd_student,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier, Projector, frozen, new_classifier
from kd_testing.image_pairs import forward_with_features, noise, some_images

PAIRS = [
    ("resnet32x4", "resnet8x4"),
    ("resnet14x2", "resnet8"),
    ("resnet8", "resnet20"),
    ("resnet8x4", "timm:resnet10t"),
]


@pytest.mark.parametrize(("factor", "parameters"), [(1, 722_432), (2, 214_016), (4, 70_400), (8, 26_240)])
def test_projectors_have_the_published_number_of_parameters(factor, parameters):
    """Three convolutions, 1x1, 3x3 and 1x1, each with a batch norm."""
    assert sum(p.numel() for p in Projector(256, 256, factor).parameters()) == parameters


def test_the_deployed_student_has_the_published_size():
    data = noise(classes=100)
    teacher = new_classifier("resnet32x4", data.config)
    student = simkd_student("resnet8x4", teacher, data, factor=2)
    assert sum(p.numel() for p in teacher.parameters()) == 7_433_860
    assert sum(p.numel() for p in student.parameters()) == 1_447_556
    assert student.projector is not None and not any(p.requires_grad for p in student.head.parameters())
    torch.testing.assert_close(student.head.weight, teacher.head.weight)


@pytest.mark.parametrize("loss", sorted(FEATURE_LOSSES))
def test_a_student_with_the_teachers_weights_has_zero_loss_and_equal_logits(loss):
    data = noise()
    teacher = new_classifier("resnet14x2", data.config).eval()
    student = new_classifier("resnet14x2", data.config).eval()
    student.load_state_dict(teacher.state_dict())
    student.projector = nn.Identity()
    method = simkd(student, teacher, SimKDArguments(feature_loss=loss, kl_weight=0.0), temperature=4.0)
    images = some_images(data)
    with torch.no_grad():
        student_outputs, teacher_outputs = (
            forward_with_features(student, method.features, images),
            forward_with_features(teacher, method.teacher_features, images),
        )
    parts = method.objective(student_outputs, teacher_outputs, None)
    assert set(parts) == {"feature_0"}
    assert parts["feature_0"].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student_outputs.logits, teacher_outputs.logits)


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
@pytest.mark.parametrize("projector", ["single", "multi", "all-layer"])
def test_every_variant_trains_student_and_all_projectors(projector, teacher_name, student_name):
    data = noise(32 if "timm" in student_name else 16)
    teacher = new_classifier(teacher_name, data.config)
    student = simkd_student(student_name, teacher, data, factor=2).train()
    method = simkd(student, teacher, SimKDArguments(projector=projector), temperature=4.0)
    images, labels = some_images(data), data.splits["validation"].labels[:8]
    answering = frozen(teacher, "fp32")
    with torch.no_grad():
        teacher_outputs = forward_with_features(answering, method.teacher_features, images)
    parts = method.objective(forward_with_features(student, method.features, images), teacher_outputs, labels)
    sum(parts.values()).backward()
    expected = {"single": 1, "multi": 2, "all-layer": len(block_paths(student))}[projector]
    assert len(parts) == expected + 1 and all(part.item() > 0 for part in parts.values())
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "every part of the student learns"
    assert all(p.grad is not None for p in method.objective.parameters())
    assert all(p.grad is None for p in answering.parameters())
    assert not any(
        "objective" in name for name in student.state_dict()
    )  # auxiliary parameters are not saved with the student


def test_each_architecture_is_probed_once(monkeypatch):
    """A script builds student and method several times, but probes teacher and student only once."""
    data, probed = noise(), []
    monkeypatch.setattr(matching, "_CACHE", {})
    monkeypatch.setattr(ImageClassifier, "forward", counting(ImageClassifier.forward, probed))
    teacher = new_classifier("resnet14x2", data.config)
    for reuse_head in (True, False, True):
        student = simkd_student("resnet8", teacher, data, 2, reuse_head)
        simkd(student, teacher, SimKDArguments(projector="all-layer"), 4.0)
    assert probed == ["resnet14x2", "resnet8"]


def counting(forward, calls):
    def counted(self, *args, **kwargs):
        calls.append(self.config.architecture)
        return forward(self, *args, **kwargs)

    return counted


def test_weights_of_the_projectors():
    data = noise()
    teacher = new_classifier("resnet14x2", data.config)
    student = simkd_student("resnet14", teacher, data, factor=2)
    multi = simkd(
        student, teacher, SimKDArguments(projector="multi", feature_weight=1.0, kl_weight=0.0), 4.0
    ).objective
    assert multi.weights == pytest.approx({"feature_0": 2 / 3, "feature_1": 1 / 3})
    layers = simkd(
        student, teacher, SimKDArguments(projector="all-layer", feature_weight=3.0, kl_weight=0.0), 4.0
    ).objective
    assert layers.weights == pytest.approx({f"feature_{i}": 3.0 / 6 for i in range(6)})
    mixed = SimKDArguments(cls_weight=0.5, kl_weight=2.0, feature_weight=0.0)
    assert simkd(student, teacher, mixed, 4.0).objective.weights == {"task": 0.5, "soft_targets": 2.0}


@pytest.mark.parametrize(
    ("blocks", "teacher_blocks", "expected"),
    [(3, 15, [4, 9, 14]), (3, 3, [0, 1, 2]), (4, 6, [1, 2, 4, 5]), (5, 3, [0, 1, 1, 2, 2]), (1, 7, [6])],
)
def test_blocks_are_matched_at_the_same_relative_depth(blocks, teacher_blocks, expected):
    assert depth_map(blocks, teacher_blocks, "up") == list(enumerate(expected))


def test_the_larger_map_is_averaged_down():
    """A larger student map is averaged down before its projector, in training and in deployment."""
    data = noise(32)
    large, small = new_classifier("resnet8", data.config), new_classifier("timm:resnet10t", data.config)
    images = some_images(data)
    assert (image_features(large).head.size, image_features(small).head.size) == (8, 1)
    student = simkd_student("resnet8", small, data, factor=2).eval()
    assert student.config.projector["max_size"] == 1
    assert student(images).features["map"].shape == (8, 512, 1, 1)
    other = simkd_student("timm:resnet10t", large, data, factor=2)
    match = FeatureTerm("map", "map", losses.feature_l2)
    pred, target = torch.rand(2, 3, 1, 1), torch.rand(2, 3, 8, 8)
    expected = (pred - target.mean((2, 3), keepdim=True)).square().mean()
    teacher_outputs = Outputs(logits=None, features={"map": target})
    torch.testing.assert_close(match(Outputs(logits=None, features={"map": pred}), teacher_outputs, None), expected)
    assert other.config.projector["max_size"] == 8, "the size of the teacher's map, which the student's never exceeds"


def test_with_labels_the_loss_averages_over_samples_that_the_teacher_classifies_correctly():
    pred, target = torch.rand(4, 6, 3, 3), torch.rand(4, 6, 3, 3)
    before = target.clone()
    logits = torch.eye(3)[[0, 1, 2, 0]]
    labels = torch.tensor([0, 2, 2, 1])  # right, wrong, right, wrong
    teacher_outputs, student = (
        Outputs(logits=logits, features={"t": target}),
        Outputs(logits=None, features={"s": pred}),
    )
    for name, loss in FEATURE_LOSSES.items():
        masked = FeatureTerm("s", "t", loss, only_where_right=True)(student, teacher_outputs, labels)
        kept = FeatureTerm("s", "t", loss)(
            Outputs(logits=None, features={"s": pred[[0, 2]]}),
            Outputs(logits=None, features={"t": target[[0, 2]]}),
            None,
        )
        torch.testing.assert_close(masked, kept, msg=name)
        assert FeatureTerm("s", "t", loss, only_where_right=True)(
            student, teacher_outputs, (labels + 1) % 3
        ).isfinite()
    assert share_masked(student, teacher_outputs, labels).item() == 0.5
    assert torch.equal(target, before)


@pytest.mark.parametrize("loss", sorted(FEATURE_LOSSES))
def test_feature_losses_are_never_negative_and_zero_only_for_the_same_maps(loss):
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 1.0, 30.0):
        pred, target = (scale * torch.randn(3, 5, 4, 4, generator=generator) for _ in range(2))
        assert FEATURE_LOSSES[loss](pred, target).item() > 0
        assert FEATURE_LOSSES[loss](pred.clone(), pred).item() == pytest.approx(0, abs=1e-6)
        assert FEATURE_LOSSES[loss](pred.bfloat16(), target.bfloat16()).isfinite()


def test_attention_transfer_by_hand():
    pred, target = torch.rand(2, 3, 2, 2), torch.rand(2, 7, 2, 2)
    expected = 0.0
    for i in range(2):
        a, b = (np.square(x[i].numpy().astype(np.float64)).mean(0).ravel() for x in (pred, target))
        expected += np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).mean() / 2
    assert losses.attention_transfer(pred, target).item() == pytest.approx(expected, rel=1e-5)
    assert losses.attention_transfer(pred, 3 * pred).item() == pytest.approx(0, abs=1e-10)  # the scale has no effect


def test_stages_and_blocks_have_names():
    model = new_classifier("resnet8x4", noise().config)
    assert stage_paths(model) == ["backbone.layer1", "backbone.layer2", "backbone.layer3"]
    assert block_paths(model) == ["backbone.layer1.0", "backbone.layer2.0", "backbone.layer3.0"]
    assert len(block_paths(new_classifier("resnet32x4", noise().config))) == 15


def test_networks_that_do_not_match_are_errors(capsys):
    data = noise()
    teacher = new_classifier("resnet8", data.config)
    with pytest.raises(UserError, match="factor 3 does not divide the teacher's 64 channels"):
        simkd_student("resnet8", teacher, data, factor=3)
    cases = (("projector_factor", 0), ("projector_ratio", 0.0), ("feature_weight", 0.0), ("cls_weight", -1))
    for flag, value in cases:
        with pytest.raises(SystemExit):
            parse(SimKDArguments, argv=[f"--{flag}", str(value), "--kl_weight", "0"])
        assert re.search(rf"--{flag}.* must (not all )?be", capsys.readouterr().err)


def test_a_saved_student_loads_alone_with_equal_logits(tmp_path):
    data = noise()
    teacher = new_classifier("resnet14x2", data.config)
    student = simkd_student("resnet8", teacher, data, factor=2).to(memory_format=torch.channels_last)
    images = some_images(data)
    student.train()(images)  # updates the running statistics of the batch norms
    student.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ImageClassifier.from_pretrained(tmp_path).eval()(images).logits, student(images).logits)
