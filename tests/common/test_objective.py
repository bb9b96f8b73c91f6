"""Objectives, feature hooks, and inference over a dataset."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.common.losses import feature_cosine, feature_l2, soft_target_kl
from kd.common.methods import Method
from kd.common.methods import labels as labels_method
from kd.common.objective import FeatureTerm, Objective, logit_term, soft_targets, task_loss
from kd.common.outputs import FeatureHooks, Outputs
from kd.common.training.inference import run_inference
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd_testing.tiny import Rows, model


def pair() -> tuple[Outputs, Outputs, torch.Tensor]:
    features = {"hidden": torch.randn(4, 5, 6)}, {"hidden": torch.randn(4, 5, 6)}
    mask = torch.tensor([[1, 1, 1, 0, 0]]).repeat(4, 1)
    student = Outputs(logits=torch.randn(4, 3, requires_grad=True), features=features[0], mask=mask)
    return student, Outputs(logits=torch.randn(4, 3), features=features[1]), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_terms_sum_to_the_loss(alpha):
    student, teacher, labels = pair()
    objective = Objective(task=(alpha, task_loss()), soft_targets=(1 - alpha, soft_targets(3.0)))
    parts = objective(student, teacher, labels)
    hard = torch.nn.functional.cross_entropy(student.logits, labels)
    expected = alpha * hard + (1 - alpha) * soft_target_kl(student.logits, teacher.logits, 3.0)
    torch.testing.assert_close(sum(parts.values()), expected)


def test_a_term_of_weight_zero_needs_no_inputs():
    student, _, labels = pair()
    assert set(Objective(task=(1.0, task_loss()), soft_targets=(0.0, soft_targets(2.0)))(student, None, labels)) == {
        "task"
    }
    with pytest.raises(UserError, match="at least one term"):
        Objective(task=(0.0, task_loss()))


def test_regression_terms_by_hand():
    student = Outputs(logits=torch.tensor([[1.0], [3.0]]))
    teacher = Outputs(logits=torch.tensor([[2.0], [3.0]]))
    objective = Objective(task=(0.5, task_loss("regression")), soft_targets=(0.5, soft_targets(9.0, "regression")))
    parts = objective(student, teacher, torch.tensor([1.0, 5.0]))
    assert parts["task"].item() == pytest.approx(0.5 * (0 + 4) / 2)
    assert parts["soft_targets"].item() == pytest.approx(0.5 * (1 + 0) / 2)  # no softmax, no temperature


def test_rows_without_a_label_have_no_loss_and_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([2, IGNORED, 0, IGNORED])
    loss = task_loss()(Outputs(logits=logits), None, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    loss.backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]
    assert task_loss()(Outputs(logits=logits), None, torch.full((4,), IGNORED)).item() == 0
    scores, predicted = torch.tensor([1.0, math.nan, 5.0]), torch.tensor([[2.0], [9.0], [3.0]], requires_grad=True)
    loss = task_loss("regression")(Outputs(logits=predicted), None, scores)
    assert loss.item() == (1 + 4) / 2
    loss.backward()
    assert predicted.grad.flatten().tolist() == [1.0, 0.0, -2.0]


@pytest.mark.parametrize("task", ["classification", "regression", "multi_label"])
def test_each_label_has_the_same_weight_in_any_batch(task):
    """The mean over batches of any composition is the mean over all rows with a label."""
    logits = torch.randn(8, 1 if task == "regression" else 3)
    labels = torch.tensor([0.0, 1, 2, 1, math.nan, math.nan, 0, math.nan])
    if task == "classification":
        labels = labels.nan_to_num(IGNORED).long()
    elif task == "multi_label":
        labels = torch.stack([labels * 0 + i for i in (0, 1, 0)], dim=1)
    method = labels_method(task=task).for_labels(labels)
    term = method.terms["task"][1]
    parts = [term(Outputs(logits=logits[rows]), None, labels[rows]) for rows in torch.arange(8).split(4)]
    torch.testing.assert_close(sum(parts) / 2, task_loss(task)(Outputs(logits=logits), None, labels))
    assert labels_method().for_labels(torch.tensor([0, 1])).terms["task"][1].labelled_share is None
    nothing = task_loss(task)(Outputs(logits=logits[4:6]), None, labels[4:6])
    assert nothing == 0


def test_a_method_that_needs_every_label_is_rejected():
    term = logit_term(lambda student, teacher, labels: student.sum(), labels=True)
    needy = Method({"decoupled": (1.0, term)})
    assert needy.for_labels(torch.tensor([0, 1])) is needy
    with pytest.raises(UserError, match="decoupled.*--method kd, or --drop_unlabelled"):
        needy.for_labels(torch.tensor([0, IGNORED]))


@pytest.mark.parametrize("loss", [feature_l2, feature_cosine])
def test_match_ignores_padding(loss):
    student, teacher, _ = pair()
    expected = loss(student.features["hidden"][:, :3], teacher.features["hidden"][:, :3])
    torch.testing.assert_close(FeatureTerm("hidden", "hidden", loss)(student, teacher, None), expected)


def test_a_feature_term_trains_its_projector():
    student, teacher, _ = pair()
    student = Outputs(features={"small": torch.randn(4, 5, 2)}, mask=student.mask)
    hint = FeatureTerm("small", "hidden", feature_l2, nn.Linear(2, 6))
    loss = hint(student, teacher, None)
    mapped = student.features["small"] @ hint.projector.weight.T + hint.projector.bias
    torch.testing.assert_close(loss, feature_l2(mapped[:, :3], teacher.features["hidden"][:, :3]))
    loss.backward()
    assert hint.projector.weight.grad.abs().sum() > 0
    assert set(Objective(hint=(1.0, hint)).state_dict()) == {
        "modules_of_terms.hint.projector.weight",
        "modules_of_terms.hint.projector.bias",
    }


@pytest.mark.parametrize(
    ("term", "student", "missing"),
    [
        (
            FeatureTerm("layer_7", "layer_7", feature_l2),
            Outputs(features={"layer_1": torch.zeros(1, 2)}),
            "layer_7.*layer_1",
        ),
        (task_loss(), Outputs(logits=torch.zeros(1, 2)), "labels"),
        (soft_targets(1.0), Outputs(logits=torch.zeros(1, 2)), "teacher logits"),
    ],
)
def test_errors_name_the_missing_input(term, student, missing):
    with pytest.raises(UserError, match=missing):
        term(student, None, None)


def test_hooks_record_outputs_of_submodules_and_clear_them():
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    hooks = FeatureHooks(network, {"before": "0", "after": "1"})
    x = torch.randn(3, 6)
    network(x)
    features = hooks.take()
    torch.testing.assert_close(features["before"], F.linear(x, network[0].weight, network[0].bias))
    torch.testing.assert_close(features["after"], features["before"].relu())
    assert hooks.take() == {}
    hooks.remove()
    network(x)
    assert hooks.take() == {}
    with pytest.raises(ValueError, match="no submodule 7"):
        FeatureHooks(network, {"x": "7"})


class RowsWithLength(Rows):
    def __getitem__(self, rows):
        if rows == "length":
            return [int(n) for n in torch.randint(1, 9, (len(self),), generator=torch.Generator().manual_seed(1))]
        return {"x": self.x[rows].tolist(), "labels": self.labels[rows].tolist()}


def test_inference_keeps_the_order_of_the_dataset():
    network, rows = model(dropout=0.5).train(), RowsWithLength(37)

    def collate(samples):
        return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}

    logits = run_inference(network, lambda x: {"logits": network(x).logits}, rows, collate, batch_size=5)["logits"]
    network.eval()
    torch.testing.assert_close(torch.stack(logits), network(rows.x).logits.detach())
    network.train()
    run_inference(network, lambda x: {"logits": network(x).logits}, rows, collate)
    assert network.training  # left as it was found
