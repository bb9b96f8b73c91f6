"""Metrics of multi-label and token classification through the interface of all tasks."""

import numpy as np
import pytest
from scipy.special import logit
from sklearn.metrics import average_precision_score, f1_score, log_loss

from kd.common.metrics.label_sets import choose_label_threshold, constant_label_score, multi_label_metrics
from kd.common.metrics.tasks import task_metrics
from kd.common.metrics.verdict import f1_of_counts
from kd.common.utils.tasks import IGNORED

RNG = np.random.default_rng(0)
LABELS = (RNG.random((60, 5)) < [0.5, 0.3, 0.3, 0.1, 0.0]).astype(np.float32)  # the last label never occurs
LOGITS = 2 * LABELS - 1 + RNG.normal(0, 1.5, LABELS.shape)
MULTI = task_metrics("multi_label", "abcde")
NAMES = ["O", "B-X", "I-X"]
TOKENS = task_metrics("token_classification", NAMES)
TAGS = np.array([[1, 2, 0, 1], [0, 0, 1, IGNORED], [1, IGNORED, IGNORED, IGNORED]])


def one_hot(tags: np.ndarray) -> np.ndarray:
    return np.eye(3)[np.where(tags == IGNORED, 2, tags)]  # a model predicts something after the last word, too


# ---- several labels ----


def test_multi_label_metrics_equal_those_of_scikit_learn():
    predicted, occurring = LOGITS >= 0, slice(0, 4)
    found = multi_label_metrics(LOGITS, LABELS)
    assert found["f1_micro"] == pytest.approx(f1_score(LABELS, predicted, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(LABELS, predicted, average="macro", zero_division=0))
    precisions = [average_precision_score(LABELS[:, i], LOGITS[:, i]) for i in range(4)]
    assert found["map"] == pytest.approx(np.mean(precisions)) and LABELS[:, occurring].any(axis=0).all()
    assert found["exact_match"] == (LABELS == predicted).all(axis=1).mean()


def test_multi_label_metrics_by_hand():
    """Two samples: one label right and one superfluous, one missed."""
    found = multi_label_metrics(np.array([[1.0, 1.0], [-1.0, -1.0]]), np.array([[1, 0], [0, 1]]))
    assert found["f1_micro"] == 2 * 1 / (2 + 2) and found["f1_macro"] == (1 + 0) / 2 and found["exact_match"] == 0


def test_the_threshold_is_the_best_of_all():
    threshold = choose_label_threshold(LOGITS, LABELS)
    scores = [f1_score(LABELS, LOGITS >= logit(t), average="micro") for t in np.linspace(0.001, 0.999, 999)]
    found = MULTI.threshold_metrics(LOGITS, LABELS, threshold)
    assert found["f1_micro_threshold"] >= max(scores) - 1e-12 and found["label_threshold"] == threshold
    assert found["f1_micro_threshold"] == pytest.approx(multi_label_metrics(LOGITS, LABELS, threshold)["f1_micro"])
    assert choose_label_threshold(LOGITS, np.zeros_like(LABELS)) is None


def test_equal_probabilities_are_on_one_side_of_the_threshold():
    logits, labels = np.array([[0.0, 0.0, 0.0, -1.0]]), np.array([[1, 0, 0, 1]])
    assert choose_label_threshold(logits, labels) == pytest.approx(1 / (1 + np.e))  # 2 of 4 right; at 0.5 only 1 of 3


def test_calibration_is_that_of_all_decisions():
    found = MULTI.calibration(LOGITS, LABELS)
    assert found["nll"] == pytest.approx(log_loss(LABELS.reshape(-1), 1 / (1 + np.exp(-LOGITS.reshape(-1)))))


def test_chance_is_the_best_constant_set_of_labels():
    rows = [f1_score(LABELS, np.tile(choice, (60, 1)), average="micro") for choice in np.eye(5)]
    pair = f1_score(LABELS, np.tile([1, 1, 0, 0, 0], (60, 1)), average="micro")
    assert constant_label_score(LABELS) >= max(*rows, pair)
    assert MULTI.warning("T", {"f1_micro": constant_label_score(LABELS)}, LABELS, "f1_micro", "validation")
    assert MULTI.warning("T", {"f1_micro": 0.99}, LABELS, "f1_micro", "validation") is None


def test_agreement_is_of_whole_sets():
    other = LOGITS.copy()
    other[:6, 0] *= -1
    assert MULTI.agreement(LOGITS, other) == pytest.approx(54 / 60)


@pytest.mark.parametrize(
    ("task", "logits", "labels", "metric"),
    [
        (MULTI, LOGITS, LABELS, "f1_micro"),
        (TOKENS, one_hot(np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]])), TAGS, "f1"),
        (task_metrics("token_classification", ["N", "V", "A"]), one_hot(TAGS[::-1]), TAGS, "accuracy"),
    ],
    ids=["labels", "entities", "tags"],
)
def test_a_measurement_of_some_samples_is_the_metric_of_these_samples(task, logits, labels, metric):
    assert task.primary == metric
    measured = task.measure(logits, labels, metric)
    for rows in (np.arange(len(labels)), np.array([0, 1, 1]), np.array([2, 0])):
        expected = task.metrics(logits[rows], labels[rows])[metric]
        assert measured.score(rows) == pytest.approx(expected) and not measured.constant


def test_f1_of_nothing_is_zero():
    assert f1_of_counts(np.zeros((3, 3))) == 0


# ---- words ----


def test_words_after_the_last_do_not_count():
    predicted = np.array([[1, 2, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
    found = TOKENS.metrics(one_hot(predicted), TAGS)
    assert found["precision"] == 1 and found["recall"] == 2 / 4 and found["accuracy"] == 6 / 8
    assert TOKENS.agreement(one_hot(predicted), one_hot(TAGS), TAGS) == 6 / 8
    assert TOKENS.calibration(100 * one_hot(TAGS), TAGS)["ece"] == pytest.approx(0)


def test_a_constant_tag_is_chance():
    """B-X for each of the 8 words: entities at 8 words, of which 4 exist, 3 of one word."""
    assert TOKENS.chance(TAGS, "f1") == pytest.approx(2 * 3 / (8 + 4))
    assert TOKENS.measure(one_hot(np.zeros((3, 4), int)), TAGS, "f1").constant
    assert TOKENS.warning("T", {"f1": 0.5}, TAGS, "f1", "validation")


def test_tags_that_describe_no_entities_have_an_accuracy():
    words = task_metrics("token_classification", ["NOUN", "VERB", "DET"])
    assert words.metrics(one_hot(TAGS), TAGS)["accuracy"] == 1 and "f1" not in words.metrics(one_hot(TAGS), TAGS)
    assert words.chance(TAGS, "accuracy") == 4 / 8
