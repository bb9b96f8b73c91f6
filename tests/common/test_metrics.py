"""Metrics of classifiers and regressors, and costs of models, against numbers computed by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from kd.common.metrics.cost import cost, flops, latency, megabytes, parameters
from kd.common.metrics.quality import (
    agreement,
    calibration_metrics,
    classification_metrics,
    regression_metrics,
    top_k_accuracy,
)


def logits_of(predicted, classes):
    return np.eye(classes, dtype=np.float32)[predicted]


def test_two_classes_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    metrics = classification_metrics(logits_of(predicted, 2), labels)
    assert metrics == pytest.approx(
        {
            "accuracy": 7 / 10,
            "f1": 6 / 9,
            "f1_macro": (6 / 9 + 8 / 11) / 2,
            "matthews": (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_three_classes_by_hand():
    labels, predicted = np.array([0, 0, 1, 1, 2, 2]), [0, 1, 1, 1, 2, 0]
    # F1: class 0 has 1 of 2 predicted and 1 of 2 true, class 1 has 2 of 3 and 2 of 2, class 2 has 1 of 1 and 1 of 2.
    # Matthews (Gorodkin): (correct * n - sum t*p) / sqrt((n^2 - sum p^2) * (n^2 - sum t^2)), t = 2, 2, 2, p = 2, 3, 1.
    expected = {
        "accuracy": 4 / 6,
        "f1_macro": (1 / 2 + 4 / 5 + 2 / 3) / 3,
        "matthews": (4 * 6 - 12) / ((36 - 14) * (36 - 12)) ** 0.5,
    }
    assert classification_metrics(logits_of(predicted, 3), labels) == pytest.approx(expected)  # and no binary f1


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_give_numbers(label):
    metrics = classification_metrics(logits_of([0, 0, 0], 2), np.full(3, label))
    assert metrics["accuracy"] == 1 - label
    assert metrics["matthews"] == metrics["f1"] == 0
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((3,), (3,)), ((3, 2, 2), (3,)), ((3, 2), (4,)), ((3, 2), (3, 1))],
)
def test_wrong_shapes_are_an_error_with_both_shapes(logits, labels):
    for metric in (classification_metrics, calibration_metrics, lambda x, y: top_k_accuracy(x, y, 1)):
        with pytest.raises(ValueError) as error:
            metric(np.zeros(logits), np.zeros(labels, dtype=int))
        assert str(logits) in str(error.value)
        assert str(labels) in str(error.value)


def test_calibration_by_hand():
    # Confidences 0.9, 0.9, 0.9 (two of three right), 0.6 (right), 1 / 2 (right): the bins have gaps of
    # |2 - 2.7|, |1 - 0.6| and |1 - 0.5|, over five samples.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.4, 0.6], [0.5, 0.5]])
    labels = np.array([0, 1, 1, 1, 0])
    metrics = calibration_metrics(np.log(probabilities) + 3.0, labels)
    assert metrics["ece"] == pytest.approx((0.7 + 0.4 + 0.5) / 5)
    likelihoods = [0.9, 0.1, 0.9, 0.6, 0.5]
    assert metrics["nll"] == pytest.approx(-np.log(likelihoods).mean())
    # Confidences of one bin cancel: (0.9 and wrong, 0.92 and right) in (0.867, 0.933].
    same_bin = np.log([[0.9, 0.1], [0.08, 0.92]])
    assert calibration_metrics(same_bin, np.array([1, 1]))["ece"] == pytest.approx(abs(1 - 1.82) / 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_calibration_is_left_out_if_logits_are_not_finite(value: float):
    assert calibration_metrics(np.array([[0.0, value], [0.0, 1.0]]), np.array([0, 1])) == {}


def test_calibration_of_a_sure_classifier_is_finite():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    assert calibration_metrics(logits, np.array([0, 1])) == {"nll": 0.0, "ece": 0.0}
    assert calibration_metrics(logits, np.array([1, 0])) == {"nll": 1e4, "ece": 1.0}


@pytest.mark.parametrize(("k", "expected"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0)])
def test_top_k_by_hand(k, expected):
    logits = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert top_k_accuracy(logits, np.array([0, 1, 2]), k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 5, 9])
def test_top_k_equals_sklearn(k):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 10)), rng.integers(10, size=200)
    expected = top_k_accuracy_score(labels, logits, k=k, labels=range(10))
    assert top_k_accuracy(logits, labels, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_checks_the_number_of_classes(k):
    with pytest.raises(ValueError, match="between 1 and the 3 classes"):
        top_k_accuracy(np.zeros((2, 3)), np.zeros(2, dtype=int), k)


def test_agreement_compares_predictions_and_not_logits():
    student = np.array([[1.0, 2.0], [5.0, 1.0], [0.0, 1.0], [0.0, 9.0]])
    teacher = np.array([[0.0, 9.0], [1.0, 5.0], [3.0, 4.0], [7.0, 8.0]])
    assert agreement(student, teacher) == 3 / 4


@pytest.mark.parametrize("shapes", [((4, 2), (3, 2)), ((4, 2), (4, 3)), ((4,), (4,))])
def test_agreement_checks_shapes(shapes):
    with pytest.raises(ValueError, match="logits"):
        agreement(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_regression_by_hand():
    # Deviations from the means: (-2, -1, 0, 3) and (-1, -2, 1, 2); products 2 + 2 + 0 + 6, squares 14 and 10.
    metrics = regression_metrics(np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 1.0, 4.0, 5.0]))
    expected = {
        "pearson": 10 / (14 * 10) ** 0.5,
        "spearman": 1 - 6 * 2 / (4 * 15),  # ranks 1 2 3 4 and 2 1 3 4
        "mse": (1 + 1 + 1 + 1) / 4,
    }
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())


def test_regression_with_ties_equals_numpy_on_ranks():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 6, size=50) * 1.0
    predictions = np.round(targets + rng.normal(size=50))
    metrics = regression_metrics(predictions, targets)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(predictions, targets)[0, 1])
    assert metrics["spearman"] == pytest.approx(np.corrcoef(rankdata(predictions), rankdata(targets))[0, 1])


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([1.0], [3.0])],
)
def test_correlation_with_a_constant_is_zero(predictions, targets):
    metrics = regression_metrics(np.array(predictions), np.array(targets))
    assert metrics["pearson"] == metrics["spearman"] == 0
    assert metrics["mse"] == pytest.approx(
        sum((p - t) ** 2 for p, t in zip(predictions, targets, strict=True)) / len(targets)
    )
    json.dumps(metrics, allow_nan=False)


def test_regression_in_half_precision_does_not_overflow():
    metrics = regression_metrics(np.array([0, 1000], dtype=np.float16), np.array([1000, 0], dtype=np.float16))
    assert metrics["mse"] == 1e6


@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((3,), (4,)), ((3, 1), (3, 1))])
def test_regression_checks_for_columns_which_would_broadcast(shapes):
    with pytest.raises(ValueError, match="samples"):
        regression_metrics(np.zeros(shapes[0]), np.zeros(shapes[1]))


class Tied(nn.Module):
    """Shares its embedding matrix with the classifier, as language models do, and has buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.register_buffer("cache", torch.ones(1000), persistent=False)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_size_counts_shared_tensors_once_and_buffers_only_in_megabytes():
    assert parameters(Tied()) == 10 * 4 + 10
    assert megabytes(Tied()) == (50 * 4 + 3 * 8) / 2**20
    assert megabytes(Tied().to(torch.bfloat16)) == 53 * 2 / 2**20
    with torch.device("meta"):  # tensors on the meta device have no addresses
        assert megabytes(Tied()) == (50 * 4 + 3 * 8) / 2**20


class Attention(nn.Module):
    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


HEADS = torch.zeros(2, 3, 5, 8)  # (batch, heads, positions, channels of a head)
TWO_PRODUCTS = 2 * (2 * 2 * 3 * 5 * 5 * 8)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(7, 11), {"input": torch.zeros(1, 7)}, 2 * 7 * 11),
        (nn.Linear(7, 11), {"input": torch.zeros(3, 7)}, 3 * 2 * 7 * 11),
        (nn.Conv2d(3, 4, 5, padding=2), {"input": torch.zeros(2, 3, 8, 8)}, 2 * 2 * (8 * 8) * (3 * 5 * 5) * 4),
        (Attention(), {"x": HEADS}, TWO_PRODUCTS),
        (Attention(), {"x": HEADS, "mask": torch.ones(2, 1, 5, 5, dtype=torch.bool)}, TWO_PRODUCTS),
        # Four projections of 24 channels at 2 * 5 positions, and the products of 3 heads of 8 channels.
        (
            nn.MultiheadAttention(24, 3, batch_first=True),
            dict.fromkeys(("query", "key", "value"), torch.zeros(2, 5, 24)),
            4 * (2 * 2 * 5 * 24 * 24) + TWO_PRODUCTS,
        ),
        (nn.ReLU(), {"input": torch.zeros(1, 7)}, None),
    ],
    ids=["linear", "linear_batch", "convolution", "attention", "masked_attention", "multihead_attention", "none"],
)
def test_flops_by_hand(model, inputs, expected):
    assert flops(model, inputs) == expected


class Watcher(nn.Module):
    """Records the modes of its forward passes. Its normalization is frozen, as in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(), nn.BatchNorm1d(4).eval()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.dropout.training, self.frozen.training, torch.is_grad_enabled()))
        if x.isnan().any():
            raise RuntimeError("bad input")
        return self.frozen(self.dropout(x))


@pytest.mark.parametrize("measure", [flops, latency, cost])
def test_costs_are_measured_in_eval_mode_and_restore_the_mode(measure):
    model = Watcher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, {"x": torch.randn(2, 4)})
    assert set(model.modes) == {(False, False, False)}
    assert model.training and model.dropout.training and not model.frozen.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    measure(model.eval(), {"x": torch.randn(2, 4)})
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("measure", [flops, latency])
def test_errors_are_raised_and_restore_the_mode(measure):
    model = Watcher()
    with pytest.raises(RuntimeError, match="bad input"):
        measure(model, {"x": torch.full((2, 4), torch.nan)})
    assert model.training and torch.is_grad_enabled()


def test_latency_repeats_after_a_warmup():
    model = Watcher()
    result = latency(model, {"x": torch.randn(3, 4)}, repeats=7, warmup=2)
    assert len(model.modes) == 9
    assert result.keys() == {"batch", "median", "p90"}
    assert result["batch"] == 3
    assert 0 < result["median"] <= result["p90"]


def test_latency_is_milliseconds_without_the_warmup(monkeypatch):
    # A pass takes 9 s while warming up, then 1, 2, ... 11 ms: the median is 6 and nine tenths lie at or below 10.
    durations = [9.0] + [i / 1000 for i in range(1, 12)]
    clock = iter([moment for i, d in enumerate(durations) for moment in (100.0 * i, 100.0 * i + d)])
    monkeypatch.setattr("kd.common.metrics.cost.time.perf_counter", lambda: next(clock))
    result = latency(nn.Identity(), {"input": torch.zeros(1)}, repeats=11, warmup=1)
    assert result == pytest.approx({"batch": 1, "median": 6.0, "p90": 10.0})


def test_cost_has_the_keys_of_results_json():
    result = cost(Tied(), {"ids": torch.zeros(2, 5, dtype=torch.int64)})
    assert list(result) == ["parameters", "megabytes", "flops", "latency_ms"]
    assert list(result["latency_ms"]) == ["batch", "median", "p90"]
    assert (result["parameters"], result["flops"]) == (50, 2 * 2 * 5 * 4 * 10)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
