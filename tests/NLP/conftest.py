"""Fixtures of the tests of masked language models."""

import pytest
from transformers import PreTrainedTokenizerBase

from kd.nlp.data.intents import load_intents
from kd.nlp.teacher_model.masked import word_pieces


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return load_intents()["train"]["text"][:200]


@pytest.fixture(scope="session")
def tokenizer(sentences) -> PreTrainedTokenizerBase:
    return word_pieces(sentences, 200, 16)
