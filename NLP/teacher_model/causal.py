"""Causal language models: loaded by name, or a GPT-2 of random weights with a vocabulary of its own."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.utils.errors import UserError

SCRATCH = "scratch"
END_OF_TEXT = "<|endoftext|>"
HEAD_WIDTH = 32  # channels of an attention head
SMALLEST_VOCABULARY = 257  # every byte, and the end of text


class LanguageModel(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def speaks_like(self, other: "LanguageModel") -> bool:
        """Whether a logit of one stands for the same token as that of the other."""
        same_size = self.model.config.vocab_size == other.model.config.vocab_size
        return same_size and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def load_language_model(name: str, block_size: int) -> LanguageModel:
    """The causal model NAME (Hub name or folder). Raises UserError where it cannot be had, or is too short-sighted."""
    with reading(name, "a causal language model", f"pass a local folder, or {SCRATCH}, which needs no download"):
        model, tokenizer = load_model(AutoModelForCausalLM, name), load_tokenizer(AutoTokenizer, name)
    positions = getattr(model.config, "max_position_embeddings", block_size)
    if positions < block_size:
        raise UserError(f"{name} sees {positions} tokens: pass a --block_size of at most {positions}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token), which separates documents")
    return LanguageModel(model, tokenizer)


def random_gpt2(vocabulary: int, end: int, layers: int, width: int, positions: int, dropout: float) -> GPT2LMHeadModel:
    """A GPT-2 of random weights, for `vocabulary` tokens of which `end` ends a text."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_embd=width,
        n_head=width // HEAD_WIDTH,
        n_positions=positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def byte_level_bpe(texts: Iterable[str], size: int, positions: int) -> GPT2Tokenizer:
    """GPT-2's tokenizer with a vocabulary of `size` tokens learned from `texts`; it can write any text. `positions` is
    what its model sees.
    """
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, size, show_progress=False, special_tokens=[END_OF_TEXT])
    model = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # as it takes them, whatever its annotation says
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=positions)
