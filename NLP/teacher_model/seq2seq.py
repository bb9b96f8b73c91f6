"""Encoder-decoder translators: loaded by name, made from random weights, cut out of a larger one; and translating."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
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
from kd.nlp.data.tokenized import Collator

SCRATCH = "scratch"
SPECIAL_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
HEAD_WIDTH = 32  # channels of an attention head
POSITIONS = 256  # fewest that a model from random weights has


class Translator(NamedTuple):
    """A model, and the tokenizer of both of its languages."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_translator(name: str, max_length: int) -> Translator:
    """The encoder-decoder NAME (Hub name or folder). Raises UserError where it cannot be had, or is no such thing."""
    with reading(name, "an encoder-decoder", f"pass a local folder, or {SCRATCH}, which needs no download"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UserError(f"{name} ({config.model_type}) is no encoder-decoder: give a model such as Marian or T5")
        tokenizer = load_tokenizer(AutoTokenizer, name)
        model = load_model(AutoModelForSeq2SeqLM, name)
    tokenizer.model_max_length = max_length  # saved with it
    return Translator(_greedy(model, max_length), tokenizer)


def _greedy(model: PreTrainedModel, max_length: int) -> PreTrainedModel:
    """The model with the decoding that is reported as its default, which is saved with it. What only beam search knows
    is unset: a configuration of greedy decoding that has it cannot be saved.
    """
    only_beams = {"early_stopping": None, "length_penalty": None}
    model.generation_config.update(max_length=max_length, num_beams=1, do_sample=False, use_cache=True, **only_beams)
    return model


# ---- from random weights ----


def joint_bpe(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding (arXiv:1508.07909) learned on both languages together, whose words share one vocabulary."""
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


def marian(
    vocabulary: int,
    special_ids: dict[str, Any],
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    dropout: float,
    max_length: int,
) -> PreTrainedModel:
    """A Marian model of random weights, after Vaswani et al. (arXiv:1706.03762): feed-forward layers of four times the
    width, one matrix for source, target and output tokens. `special_ids` are those of SPECIAL_IDS.
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
    return _greedy(model, max_length)


def special_ids_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in SPECIAL_IDS}


# ---- cut out of a larger one ----


def number_of_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Of encoder and decoder."""
    return len(_layers(model.get_encoder())), len(_layers(model.get_decoder()))


def cut_layers(model: PreTrainedModel, encoder_layers: int, decoder_layers: int) -> PreTrainedModel:
    """A smaller model of the same class with alternating layers of the larger one, from the first to the last, as in
    "shrink and fine-tune" (arXiv:2010.13002). The first stays the first: in T5 it holds the position biases.
    """
    numbers = dict(zip(_layer_attributes(model.config), (encoder_layers, decoder_layers), strict=True))
    config = copy.deepcopy(model.config)
    config.update(numbers)
    student = type(model)(config)
    student.load_state_dict(model.state_dict(), strict=False)  # all that is no layer, and the first layers
    for own, given in ((student.get_encoder(), model.get_encoder()), (student.get_decoder(), model.get_decoder())):
        chosen = spread(len(_layers(own)), len(_layers(given)))
        for layer, number in zip(_layers(own), chosen, strict=True):
            layer.load_state_dict(_layers(given)[number].state_dict())
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def spread(kept: int, layers: int) -> list[int]:
    """Evenly spaced numbers of layers (from 0), the first and the last among them: 3 of 6 gives 0, 2, 5."""
    return [round(i * (layers - 1) / max(kept - 1, 1)) for i in range(kept)]


def _layer_attributes(config: Any) -> tuple[str, str]:
    """What encoder's and decoder's numbers of layers are called: as in Marian and BART, or as in T5."""
    return ("encoder_layers", "decoder_layers") if hasattr(config, "encoder_layers") else (
        "num_layers", "num_decoder_layers")  # fmt: skip


def _layers(stack: Any) -> nn.ModuleList:
    for name in ("layers", "block"):
        if isinstance(getattr(stack, name, None), nn.ModuleList):
            return getattr(stack, name)
    raise UserError(f"{type(stack).__name__} has no list of layers; cutting a student from it is not supported")


# ---- translating ----


def translate(
    translator: Translator,
    rows: Dataset,
    beams: int,
    precision: str = "fp32",
    batch_size: int = 64,
    description: str = "",
) -> list[list[int]]:
    """The translation of each row as token ids, in the order of the rows, without start and padding but with its end.
    Rows have input_ids, attention_mask and length.
    """
    model, tokenizer = translator
    sources = rows.select_columns(["input_ids", "attention_mask", "length"])
    call = beam_search(model, beams)
    outputs = run_inference(model, call, sources, Collator(tokenizer), precision, batch_size, description)
    return [tokens.tolist() for tokens in outputs["tokens"]]


def beam_search(model: PreTrainedModel, beams: int) -> Callable[..., dict[str, list[Tensor]]]:
    """A function of a batch: `tokens`, the translation of each sample without start and padding but with its end. One
    beam is greedy decoding.
    """

    def call(**batch: Tensor) -> dict[str, list[Tensor]]:
        ids = model.generate(**batch, num_beams=beams)[:, 1:]  # type: ignore[operator]
        return {"tokens": [row[row != model.config.pad_token_id] for row in ids]}

    return call
