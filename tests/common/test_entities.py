"""Entities of IOB2 tags and their scores, against seqeval 1.2.2 and values by hand."""

import numpy as np
import pytest

from kd.common.metrics.entities import Entity, begin_entities, entities, entity_metrics, is_iob

ACTUAL = [
    "I-PER B-PER B-LOC B-ORG O O I-ORG I-LOC",
    "O I-PER I-LOC O I-LOC B-PER O O",
    "B-LOC B-LOC O B-PER O I-LOC B-LOC O",
    "I-ORG I-LOC O B-PER B-ORG B-ORG I-LOC O",
    "I-LOC I-LOC B-LOC O B-PER O I-LOC I-ORG",
    "B-PER I-PER B-LOC B-PER I-LOC O I-LOC I-PER",
]
PREDICTED = [
    "I-PER B-PER B-LOC B-ORG O O I-LOC I-LOC",
    "O I-PER I-LOC O I-LOC B-PER O B-ORG",
    "O B-LOC O B-ORG O I-LOC B-LOC O",
    "I-ORG I-LOC B-LOC B-PER B-ORG I-LOC I-ORG O",
    "I-LOC I-LOC B-LOC O I-PER O I-LOC I-ORG",
    "B-ORG I-PER B-LOC B-PER B-ORG O I-PER I-PER",
]
# f1_score(..., mode="strict", scheme=IOB2) of seqeval 1.2.2, also with average="macro"; f1_conll: its default mode.
SEQEVAL = {
    "f1": 0.6875,
    "precision": 0.6875,
    "recall": 0.6875,
    "f1_macro": 0.6683501683501684,
    "f1_conll": 0.6875,
    "accuracy": 0.7708333333333334,
}


def split(sentences):
    return [sentence.split() for sentence in sentences]


def test_scores_equal_those_of_seqeval():
    assert entity_metrics(split(PREDICTED), split(ACTUAL)) == pytest.approx(SEQEVAL)


def test_scores_by_hand():
    """Two of three entities exist in the labels; one has a wrong last word, one is right."""
    actual = split(["B-PER I-PER O B-LOC", "O B-LOC O"])
    predicted = split(["B-PER O O B-LOC", "O I-LOC O"])
    found = entity_metrics(predicted, actual)
    assert found["precision"] == 1 / 2 and found["recall"] == 1 / 3 and found["f1"] == pytest.approx(2 / 5)
    assert found["f1_macro"] == pytest.approx((0 + 2 / 3) / 2)  # PER: 0 of 1 and 1; LOC: 1 right, 1 found, 2 exist
    assert found["f1_conll"] == pytest.approx(2 * 2 / (3 + 3))  # the lone I-LOC begins an entity
    assert found["accuracy"] == 5 / 7


def test_entities_begin_with_b_and_end_before_another_tag():
    tags = "B-PER I-PER B-PER I-LOC I-LOC O I-ORG B-ORG".split()
    assert entities(tags) == {Entity("PER", 0, 2), Entity("PER", 2, 3), Entity("ORG", 7, 8)}
    assert entities([]) == entities(["O", "O"]) == set()


def test_iob1_becomes_iob2():
    assert begin_entities("I-PER I-PER O I-LOC B-LOC I-ORG".split()) == "B-PER I-PER O B-LOC B-LOC B-ORG".split()
    already = "O B-PER I-PER B-PER O".split()
    assert begin_entities(already) == already


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["O", "B-PER", "I-PER"], True), (["B-X", "I-X", "out"], True), (["NOUN", "VERB"], False), (["O", "PER"], False)],
)
def test_tags_without_b_describe_no_entities(names, expected):
    assert is_iob(names) == expected


def test_no_entity_at_all_has_a_score_of_zero():
    found = entity_metrics([["O", "O"]], [["O", "O"]])
    assert found["f1"] == found["f1_macro"] == found["precision"] == 0 and np.isfinite(list(found.values())).all()
