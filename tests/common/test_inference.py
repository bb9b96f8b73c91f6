"""Attention is eager while a model trains on short texts in bf16 on a CPU, and unchanged otherwise."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertModel

from kd.common.training.inference import SHORT, eager_attention_on_cpu


def encoder() -> BertModel:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return BertModel(BertConfig(vocab_size=50, **shape)).eval()


def texts(longest: int) -> Dataset:
    return Dataset.from_dict({"length": [3, longest, 5]})


def test_attention_is_eager_inside_and_fused_outside_with_the_same_outputs():
    model, ids = encoder(), torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    before = model(ids, mask).last_hidden_state
    with eager_attention_on_cpu(model, texts(SHORT), "bf16", "cpu"):
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(ids, mask).last_hidden_state[mask.bool()], before[mask.bool()])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dataset", "precision", "device"),
    [
        (texts(SHORT + 1), "bf16", "cpu"),
        (texts(9), "fp32", "cpu"),
        (texts(9), "bf16", "cuda"),
        (Dataset.from_dict({"x": [1]}), "bf16", "cpu"),
        ([1, 2], "bf16", "cpu"),
    ],
)
def test_the_kernel_stays_in_all_other_cases(dataset, precision, device):
    model = encoder()
    with eager_attention_on_cpu(model, dataset, precision, device):
        assert model.config._attn_implementation == "sdpa"
    with eager_attention_on_cpu(nn.Linear(2, 2), dataset, precision, device):
        pass


def test_the_kernel_is_restored_after_an_error():
    model = encoder()
    with pytest.raises(RuntimeError), eager_attention_on_cpu(model, texts(9), "bf16", "cpu"):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
