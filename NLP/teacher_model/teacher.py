"""Where a text teacher comes from: the Hub, a folder, or the embedded tiny BERT, which starts from random weights."""

import inspect
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.hub import no_retries_when_unreachable
from common.utils.errors import UserError
from nlp.data.loading import TextData
from nlp.student_model.bottleneck_classifier import BottleneckClassifier  # also registers it with AutoModel...

TINY_BERT = "tiny-bert"


@dataclass
class Pretrained:
    """A classifier for the data at hand and its tokenizer.

    from_scratch: the weights are random; trained: it is a classifier of these very labels already.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    from_scratch: bool = False
    trained: bool = False

    @property
    def encoder(self) -> PreTrainedModel:
        return encoder_of(self.model)

    def cut_texts(self, max_length: int) -> None:
        """Has the tokenizer cut texts to `max_length` tokens, also once it is saved, so that evaluation cuts alike.
        Raises UserError where the encoder cannot see as many.
        """
        if max_length > (most := positions(self.encoder)):
            raise UserError(f"--max_length {max_length}: the {type(self.model).__name__} sees at most {most} tokens")
        self.tokenizer.model_max_length = max_length


def load_classifier(name: str, data: TextData) -> Pretrained:
    """The model NAME (Hub name, folder, or `tiny-bert`) with a head for the labels of `data`.

    Raises UserError where the model cannot be had, or has been trained for other labels or another label order.
    """
    if name == TINY_BERT:
        return tiny_bert(data)
    try:
        with no_retries_when_unreachable(name):
            config = AutoConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
            trained = is_trained(name, config, data)
            labels = {} if trained else label_config(data)
            model = AutoModelForSequenceClassification.from_pretrained(name, **labels)
    except (OSError, ValueError) as error:
        raise UserError(unreachable(name, error)) from error
    accepted = inspect.signature(encoder_of(model).forward).parameters  # DistilBERT takes no token_type_ids
    tokenizer.model_input_names = [column for column in tokenizer.model_input_names if column in accepted]
    return Pretrained(model, tokenizer, trained=trained)


def load_trained(name: str, data: TextData) -> Pretrained:
    """The classifier NAME, which must have been trained for the labels of `data`. Raises UserError else."""
    classifier = load_classifier(name, data)
    if not classifier.trained:
        raise UserError(f"{name} is no trained classifier: it has no head for the labels of {data.name}")
    return classifier


def encoder_of(classifier: PreTrainedModel) -> Any:
    """What stands before a classifier's head or bottleneck."""
    return classifier.encoder if isinstance(classifier, BottleneckClassifier) else classifier.base_model


def positions(encoder: nn.Module) -> float:
    """How many tokens an encoder can see: the rows of its table of positions, less those that RoBERTa has for padding;
    infinite where there is no such table.
    """
    for path, module in encoder.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return math.inf


def label_config(data: TextData) -> dict:
    """id2label, label2id and, for regression, the single unnamed output."""
    if data.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {label: i for i, label in enumerate(data.label_names)},
    }


def is_trained(name: str, config: Any, data: TextData) -> bool:
    """Whether a checkpoint is a classifier of the data's labels, in the data's order; others are refused."""
    architecture = (config.architectures or [""])[0]
    if "Classif" not in architecture:
        return False
    if data.regression or config.num_labels == 1:
        if data.regression and config.num_labels == 1:
            return True
        raise UserError(f"{name} has {config.num_labels} outputs, {data.name} needs {data.num_labels}")
    own = [config.id2label[i] for i in range(config.num_labels)]
    same = [a.lower() for a in own] == [b.lower() for b in data.label_names]
    if same:
        return True
    if sorted(map(str.lower, own)) == sorted(map(str.lower, data.label_names)):
        first = next(i for i, (a, b) in enumerate(zip(own, data.label_names, strict=True)) if a.lower() != b.lower())
        raise UserError(
            f"the label order of {name} differs from that of {data.name}: label {first} is {own[first]!r} for "
            f"this model and {data.label_names[first]!r} in the data; reorder its head or the data's labels"
        )
    raise UserError(
        f"{name} classifies {len(own)} labels ({', '.join(own[:3])}, ...), {data.name} has "
        f"{len(data.label_names)} ({', '.join(data.label_names[:3])}, ...): name a classifier of the same labels, or "
        "an encoder without a head"
    )


def tiny_bert(data: TextData) -> Pretrained:
    """A 4-layer BERT of width 128 with random weights, and a vocabulary from the training texts."""
    train = data.splits["train"]
    texts = [text for column in ("text", "text_pair") if column in train.column_names for text in train[column]]
    tokenizer = BertTokenizer(vocab=vocabulary(texts), do_lower_case=True, model_max_length=512)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        **label_config(data),
    )
    return Pretrained(BertForSequenceClassification(config), tokenizer, from_scratch=True)


def vocabulary(texts: Iterable[str], most: int = 4000) -> dict[str, int]:
    """WordPiece vocabulary of the most frequent words that occur twice, and of all letters for the rest.

    Not learned with the tokenizers library: its result differs from process to process, and a run that is continued
    must find the vocabulary that it started with.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(word for t in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word, n in counts.items() if n > 1), key=lambda word: (-counts[word], word))[:most]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    return {piece: i for i, piece in enumerate(pieces)}


def unreachable(name: str, error: Exception) -> str:
    return (
        f"no model {name}: it is no folder with config.json, tokenizer and weights of a text encoder, and the Hugging "
        f"Face Hub has no such model or cannot be reached; pass a local folder, or --teacher {TINY_BERT}, which needs "
        f"no download ({type(error).__name__})"
    )
