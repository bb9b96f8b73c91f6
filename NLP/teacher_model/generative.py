"""Causal language models and encoder-decoder translators: loaded by name, or made from random weights."""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.training.inference import run_inference
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Collator

SCRATCH = "scratch"
NO_DOWNLOAD = f"pass a local folder, or {SCRATCH}, which needs no download"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
HEAD_WIDTH = 32  # channels of an attention head
SMALLEST_VOCABULARY = 257  # every byte, and the end of text
POSITIONS = 256  # the fewest of a translator from random weights


class Generator(NamedTuple):
    """A model that generates tokens, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def has_vocabulary_of(self, other: "Generator") -> bool:
        """Whether a logit of either model stands for the same token."""
        config, other_config = self.model.config, other.model.config
        return (
            config.vocab_size == other_config.vocab_size
            and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
            and (not config.is_encoder_decoder or special_ids_of(self.model) == special_ids_of(other.model))
        )


# ---- causal language models ----


def load_language_model(name: str, block_size: int) -> Generator:
    """The causal language model NAME (Hub name or folder).

    Raises UserError where it could not be loaded, or its context length is smaller than `block_size`.
    """
    with reading(name, "a causal language model", NO_DOWNLOAD):
        model, tokenizer = load_model(AutoModelForCausalLM, name), load_tokenizer(AutoTokenizer, name)
    positions = getattr(model.config, "max_position_embeddings", block_size)
    if positions < block_size:
        raise UserError(f"{name} sees {positions} tokens: pass a --block_size of at most {positions}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token), which separates documents")
    return Generator(model, tokenizer)


def random_gpt2(vocabulary: int, end: int, layers: int, width: int, positions: int, dropout: float) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, for `vocabulary` tokens of which `end` ends a text."""
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
    """GPT-2's tokenizer with a vocabulary of `size` tokens learned from `texts`, for a model of so many positions."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, size, show_progress=False, special_tokens=[END_OF_TEXT])
    model = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # tuples, although the annotation has strings
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=positions)


# ---- encoder-decoder translators ----


def load_translator(name: str, max_length: int) -> Generator:
    """The encoder-decoder NAME (Hub name or folder), which generates at most `max_length` tokens, greedily by default.

    Raises UserError where it could not be loaded, or is no encoder-decoder.
    """
    with reading(name, "an encoder-decoder", NO_DOWNLOAD):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UserError(f"{name} ({config.model_type}) is no encoder-decoder: give a model such as Marian or T5")
        tokenizer = load_tokenizer(AutoTokenizer, name)
        model = load_model(AutoModelForSeq2SeqLM, name)
    tokenizer.model_max_length = max_length  # saved with it
    return Generator(_with_greedy_decoding(model, max_length), tokenizer)


def _with_greedy_decoding(model: PreTrainedModel, max_length: int) -> PreTrainedModel:
    """The model with the decoding that is reported as its default, which is saved with it. Settings of beam search are
    unset: a configuration of greedy decoding that has them cannot be saved.
    """
    only_beams = {"early_stopping": None, "length_penalty": None}
    model.generation_config.update(max_length=max_length, num_beams=1, do_sample=False, use_cache=True, **only_beams)
    return model


def random_marian(
    vocabulary: int,
    special_ids: dict[str, Any],
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    dropout: float,
    max_length: int,
) -> PreTrainedModel:
    """A Marian model with random weights, after Vaswani et al. (arXiv:1706.03762): feed-forward layers of four times
    the width, one matrix for source, target and output tokens. `special_ids` are those of SPECIAL_IDS.
    """
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=width // HEAD_WIDTH,
        decoder_attention_heads=width // HEAD_WIDTH,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        activation_function="relu",
        dropout=dropout,
        scale_embedding=True,
        max_position_embeddings=max(POSITIONS, max_length),
        forced_eos_token_id=special_ids["eos_token_id"],
        **special_ids,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(forced_eos_token_id=config.forced_eos_token_id, **special_ids)
    return _with_greedy_decoding(model, max_length)


def special_ids_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in SPECIAL_IDS}


def joint_bpe(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding (arXiv:1508.07909) learned on both languages together, which share one vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def translate(
    translator: Generator,
    rows: Dataset,
    beams: int,
    precision: str = "fp32",
    batch_size: int = 64,
    description: str = "",
) -> list[list[int]]:
    """The translation of each row as token ids, in the order of the rows. Rows have input_ids, attention_mask and
    length.
    """
    model, tokenizer = translator
    sources = rows.select_columns(["input_ids", "attention_mask", "length"])
    call = beam_search(model, beams)
    outputs = run_inference(model, call, sources, Collator(tokenizer), precision, batch_size, description)
    return [tokens.tolist() for tokens in outputs["tokens"]]


def beam_search(model: PreTrainedModel, beams: int) -> Callable[..., dict[str, list[Tensor]]]:
    """A function of a batch that returns `tokens`: the translation of each sample without start and padding, with its
    end. One beam is greedy decoding.
    """

    def call(**batch: Tensor) -> dict[str, list[Tensor]]:
        ids = model.generate(**batch, num_beams=beams)[:, 1:]  # type: ignore[operator]
        return {"tokens": [row[row != model.config.pad_token_id] for row in ids]}

    return call
