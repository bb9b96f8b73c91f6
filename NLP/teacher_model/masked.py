"""Masked language models as teachers: loaded by name, or with random weights."""

import math
from collections import Counter

from tokenizers import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.utils.errors import UserError
from kd.nlp.teacher_model import HEAD_WIDTH
from kd.nlp.teacher_model.generative import NO_DOWNLOAD, Generator
from kd.nlp.teacher_model.teacher import max_positions, read_config

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_LETTERS = 1000  # maximum number of different letters in a learned vocabulary
HEADS = ("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")  # ends of architectures with a head over the vocabulary


def load_masked_language_model(name: str, block_size: int, flag: str) -> Generator:
    """The masked language model NAME (Hub name or folder), the value of `flag`.

    Raises UserError if it cannot be loaded, if it has no head over the vocabulary, or if it takes fewer tokens than
    `block_size`.
    """
    config = read_config(name)
    architecture = (config.architectures or [type(config).__name__])[0]
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or not architecture.endswith(HEADS):
        raise UserError(
            f"{name} is a {architecture}, without a head that predicts masked tokens: pass the model that it was "
            f"fine-tuned from, such as bert-base-uncased, or the student of a distill_mlm.py run, as {flag}"
        )
    with reading(name, "a masked language model", NO_DOWNLOAD):
        tokenizer = load_tokenizer(AutoTokenizer, name)
        model = load_model(AutoModelForMaskedLM, name)
    if block_size > (most := max_positions(model)):
        raise UserError(f"{name} takes at most {most} tokens: pass a --block_size of at most {most}")
    return Generator(model, tokenizer)


def random_bert(
    vocabulary: int, padding: int, layers: int, width: int, positions: int, dropout: float
) -> PreTrainedModel:
    """A BERT with random weights. `vocabulary` is the number of tokens, `padding` the id of the padding token."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.02 * math.sqrt(768 / width),  # BERT's 0.02, scaled from its width
        pad_token_id=padding,
    )
    return BertForMaskedLM(config)


def word_pieces(texts: list[str], size: int, positions: int) -> BertTokenizer:
    """BERT's uncased tokenizer with `size` word pieces learned from `texts`, for a model with `positions`.

    The letters have fixed ids. Otherwise the library, which breaks ties by id, would learn other pieces in each
    process.
    """
    normalizer, counts = BertNormalizer(lowercase=True), Counter[str]()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    letters = sorted(letter for letter, _ in counts.most_common(MAX_LETTERS) if not letter.isspace())
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    learned = BertWordPieceTokenizer(lowercase=True)
    learned.train_from_iterator(texts, size, show_progress=False, special_tokens=first)
    pieces = [*first, *sorted(learned.get_vocab().keys() - set(first))]
    return BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=True, model_max_length=positions
    )
