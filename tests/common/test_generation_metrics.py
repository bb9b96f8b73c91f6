"""BLEU and chrF against sacreBLEU and by hand; token metrics by hand."""

import math

import numpy as np
import pytest
import sacrebleu
import torch

from kd.common.metrics.quality import token_counts, token_metrics, translation_metrics
from kd.common.utils.tasks import IGNORED

HYPOTHESES = ["Ein Hund läuft über die Wiese.", "Zwei Männer, die reden", "Das Haus"]
REFERENCES = ["Ein brauner Hund läuft über eine Wiese.", "Zwei Männer reden.", "Das kleine Haus steht dort."]


def test_scores_equal_sacrebleu():
    scores, signatures = translation_metrics(HYPOTHESES, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert 0 < scores["bleu"] < scores["chrf"] < 100
    assert signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_bleu_by_hand():
    # Precisions of 1- to 4-grams 5/6, 4/5, 3/4, 2/3, whose product is 1/3; as long as the reference, so no penalty.
    scores, _ = translation_metrics(["a b c d e x"], ["a b c d e f"])
    assert scores["bleu"] == pytest.approx(100 * (1 / 3) ** (1 / 4))
    shorter, _ = translation_metrics(["a b c d"], ["a b c d e f"])
    assert shorter["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))  # every n-gram is right: the penalty alone


def test_equal_texts_score_100():
    scores, _ = translation_metrics(REFERENCES, REFERENCES)
    assert scores == pytest.approx({"bleu": 100, "chrf": 100})


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_every_hypothesis_needs_a_reference(hypotheses, references):
    with pytest.raises(ValueError, match="reference"):
        translation_metrics(hypotheses, references)


def test_token_metrics_by_hand():
    """Three tokens count. Their probabilities are 1/2, 1/4 and 1/8, and only the first is the prediction."""
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.3, 0.45, 0.25], [0.875, 0.125, 0.0]]])
    labels = torch.tensor([[0, IGNORED], [2, 1]])
    counts = token_counts(probabilities.log().clamp(min=-1e4), labels)
    assert counts[:, 1:].tolist() == [[1, 1], [0, 2]]
    expected = (math.log(2) + math.log(4) + math.log(8)) / 3
    assert token_metrics(counts.numpy()) == pytest.approx({"token_accuracy": 1 / 3, "perplexity": math.exp(expected)})


def test_token_metrics_average_over_tokens_and_not_sentences():
    logits, labels = torch.randn(4, 7, 11), torch.randint(11, (4, 7))
    labels[0, 1:] = IGNORED
    found = token_metrics(token_counts(logits, labels).numpy())
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert found["perplexity"] == pytest.approx(math.exp(whole.item()), rel=1e-5)
    right = (logits.argmax(-1) == labels).sum() / (labels != IGNORED).sum()
    assert found["token_accuracy"] == pytest.approx(right.item())
    assert np.isfinite(list(found.values())).all()
