"""Causal language models and encoder-decoder translators as teachers: loaded by name, or with random weights."""

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
from kd.nlp.teacher_model import HEAD_WIDTH, SCRATCH

NO_DOWNLOAD = f"pass a local folder, or {SCRATCH}, which needs no download"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
MIN_POSITIONS = 256  # minimum number of positions of a translator with random weights


class Generator(NamedTuple):
    """A model that generates tokens, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def has_vocabulary_of(self, other: "Generator") -> bool:
        """Whether the logits of both models belong to the same tokens."""
        config, other_config = self.model.config, other.model.config
        return (
            config.vocab_size == other_config.vocab_size
            and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
            and (not config.is_encoder_decoder or special_ids_of(self.model) == special_ids_of(other.model))
        )


# ---- causal language models ----


def load_language_model(name: str, block_size: int) -> Generator:
    """The causal language model NAME (Hub name or folder).

    Raises UserError if it cannot be loaded, or if its context length is smaller than `block_size`.
    """
    with reading(name, "a causal language model", NO_DOWNLOAD):
        model, tokenizer = load_model(AutoModelForCausalLM, name), load_tokenizer(AutoTokenizer, name)
    positions = getattr(model.config, "max_position_embeddings", block_size)
    if positions < block_size:
        raise UserError(f"the context length of {name} is {positions}: pass a --block_size of at most {positions}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token), which separates documents")
    return Generator(model, tokenizer)


def random_gpt2(vocabulary: int, end: int, layers: int, width: int, positions: int, dropout: float) -> GPT2LMHeadModel:
    """A GPT-2 with random weights. `vocabulary` is the number of tokens, `end` the id of the end-of-text token."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_embd=width,
        n_head=width // HEAD_WIDTH,
        n_positions=positions,
        activation_function="gelu_pytorch_tanh",  # GPT-2's function in one kernel
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def byte_level_bpe(texts: Iterable[str], size: int, positions: int) -> GPT2Tokenizer:
    """GPT-2's tokenizer with `size` tokens learned from `texts`, for a model with this number of positions."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, size, show_progress=False, special_tokens=[END_OF_TEXT])
    model = json.loads(learned.to_str())["model"]
    merges: Any = [
        tuple(pair) for pair in model["merges"]
    ]  # transformers requires tuples, although it annotates strings
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=positions)


# ---- encoder-decoder translators ----


def load_translator(name: str, max_length: int) -> Generator:
    """The encoder-decoder NAME (Hub name or folder). By default it generates greedily, at most `max_length` tokens.

    Raises UserError if it cannot be loaded, or if it is not an encoder-decoder.
    """
    with reading(name, "an encoder-decoder", NO_DOWNLOAD):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{name} ({config.model_type}) is not an encoder-decoder: use a model such as Marian or T5"
            )
        tokenizer = load_tokenizer(AutoTokenizer, name)
        model = load_model(AutoModelForSeq2SeqLM, name)
    tokenizer.model_max_length = max_length  # saved with the tokenizer
    return Generator(_with_greedy_decoding(model, max_length), tokenizer)


def _with_greedy_decoding(model: PreTrainedModel, max_length: int) -> PreTrainedModel:
    """Makes greedy decoding the default of a model, in place; it is saved with the model. Arguments of beam search are
    unset, because a configuration of greedy decoding cannot be saved with them.
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
    """A Marian model with random weights, as in Vaswani et al. (arXiv:1706.03762): feed-forward layers four times as
    wide as the model, and one embedding matrix for source, target and output. `special_ids` has a value for each of
    SPECIAL_IDS.
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
        max_position_embeddings=max(MIN_POSITIONS, max_length),
        forced_eos_token_id=special_ids["eos_token_id"],
        **special_ids,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(forced_eos_token_id=config.forced_eos_token_id, **special_ids)
    return _with_greedy_decoding(model, max_length)


def special_ids_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in SPECIAL_IDS}


def joint_bpe(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-pair encoding (arXiv:1508.07909) with one vocabulary, learned from both languages."""
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
    """Token ids of the translation of each row, the end-of-sequence token alone if it is empty. `rows` has the columns
    input_ids, attention_mask and length.
    """
    model, tokenizer = translator
    sources = rows.select_columns(["input_ids", "attention_mask", "length"])
    call = beam_search(model, beams)
    outputs = run_inference(model, call, sources, Collator(tokenizer), precision, batch_size, description)
    return [tokens.tolist() or [tokenizer.eos_token_id] for tokens in outputs["tokens"]]


def beam_search(model: PreTrainedModel, beams: int) -> Callable[..., dict[str, list[Tensor]]]:
    """A function of a batch that returns `tokens`: the translation of each sample, with the end-of-sequence token but
    without start token and padding. One beam is greedy decoding.
    """

    def call(**batch: Tensor) -> dict[str, list[Tensor]]:
        ids = model.generate(**batch, num_beams=beams)[:, 1:]  # type: ignore[operator]
        return {"tokens": [row[row != model.config.pad_token_id] for row in ids]}

    return call
