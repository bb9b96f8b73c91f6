"""Metrics of language models, by hand and against torch's cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kd.common import token_terms
from kd.common.metrics.quality import language_metrics, token_counts
from kd.common.utils.tasks import IGNORED


def test_by_hand():
    """Two sequences: the labels' probabilities are 1/2 (the largest), 1/4 and 1/8."""
    probabilities = torch.tensor(
        [[[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]], [[0.5, 0.25, 0.125, 0.125]] * 2]
    )
    labels = torch.tensor([[0, 1], [IGNORED, 2]])
    found = language_metrics(token_counts(probabilities.log(), labels).numpy(), size=3)
    assert found["perplexity"] == pytest.approx(2 ** ((1 + 2 + 3) / 3))
    assert found["bits_per_byte"] == pytest.approx((1 + 2 + 3) / 3)
    assert found["token_accuracy"] == pytest.approx(1 / 3)


def test_perplexity_equals_cross_entropy_over_all_tokens():
    logits, labels = torch.randn(5, 7, 11), torch.randint(0, 11, (5, 7))
    labels[0, 2:] = IGNORED
    labels[3] = IGNORED
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = language_metrics(token_counts(logits, labels).numpy(), size=100)
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
    number = (labels != IGNORED).sum().item()
    assert found["bits_per_byte"] == pytest.approx(expected.item() * number / math.log(2) / 100, rel=1e-5)


def test_a_uniform_model_needs_eight_bits_per_byte():
    labels = torch.randint(0, 256, (4, 9))
    found = language_metrics(token_counts(torch.zeros(4, 9, 256), labels).numpy(), size=labels.numel())
    assert found["perplexity"] == pytest.approx(256, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_in_chunks_are_those_of_all_positions_at_once(monkeypatch, dtype):
    logits, labels = torch.randn(5, 7, 11).to(dtype), torch.randint(0, 11, (5, 7))
    labels[0, 2:] = labels[3] = IGNORED
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    expected = torch.stack([each.sum(1), (logits.argmax(-1) == labels).sum(1), (labels != IGNORED).sum(1)], dim=1)
    for chunk in (1, 2 * 11, 3 * 11 + 1, 2**21):
        monkeypatch.setattr(token_terms, "CHUNK", chunk)
        torch.testing.assert_close(token_counts(logits, labels), expected)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest new tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "view" not in function.name():
            self.elements = max(self.elements, result.numel())
        return result


def test_the_memory_of_counts_is_that_of_a_chunk(monkeypatch):
    monkeypatch.setattr(token_terms, "CHUNK", 4 * 1000)
    logits, labels = torch.randn(3, 20, 1000), torch.randint(0, 1000, (3, 20))
    with Largest() as largest:
        token_counts(logits, labels)
    assert 0 < largest.elements <= 4 * 1000
