"""Text encoders and classifiers as teachers: from the Hub, from a folder, or the embedded tiny BERT."""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from kd.common.data.label_names import match_names
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import TaskType
from kd.nlp.data.loading import TextData, with_label_order
from kd.nlp.teacher_model import TINY_BERT
from kd.nlp.teacher_model.heads import reorder_outputs

TINY_SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256
}  # fmt: skip
NO_DOWNLOAD = f"pass a local folder, or --teacher {TINY_BERT}, which needs no download"
POSITION_TABLES = ("position_embeddings", "wpe")  # names in BERT and similar encoders, and in GPT-2
PADDED_LEFT = ("xlnet",)  # its head reads the last position, padding included
TAGGER = "ForTokenClassification"
CLASSIFIERS = (
    "ForSequenceClassification",
    "BottleneckClassifier",
    TAGGER,
)  # architectures of classifiers end in these
MULTI_LABEL = "multi_label_classification"  # transformers' problem_type
UNNAMED = "LABEL_"  # transformers names the classes LABEL_0, LABEL_1, ... by default


@dataclass
class Pretrained:
    """A classifier for the labels of a dataset, and its tokenizer.

    from_scratch: The weights are random.
    trained: The model is already a classifier of these labels.
    notes: Changes that were needed so that weights, config and tokenizer fit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    from_scratch: bool = False
    trained: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> Any:
        return encoder_of(self.model)

    def set_max_length(self, max_length: int) -> None:
        """Sets the number of tokens to which the tokenizer truncates texts. It is saved with the tokenizer.

        Raises UserError if the encoder has fewer positions.
        """
        if max_length > (most := max_positions(self.encoder)):
            raise UserError(f"--max_length {max_length}: the {type(self.model).__name__} takes at most {most} tokens")
        self.tokenizer.model_max_length = max_length


def models_and_tokenizers(loaded: Mapping[str, Any]) -> dict[str, PreTrainedModel | PreTrainedTokenizerBase]:
    """The arguments of `Run.check_inputs`. `loaded`, by role, are objects with a model and a tokenizer, or None."""
    present = {role: one for role, one in loaded.items() if one is not None}
    models = {role: one.model for role, one in present.items()}
    return models | {f"{role}_tokenizer": one.tokenizer for role, one in present.items()}


def encoder_of(classifier: PreTrainedModel) -> Any:
    """The encoder of a classifier, without its head or bottleneck."""
    return classifier.base_model


def number_of_layers(pretrained: Pretrained) -> int:
    number: int = pretrained.encoder.config.num_hidden_layers
    return number


def is_decoder(config: Any) -> bool:
    """Whether a model attends to earlier positions alone (or is XLNet, whose classification token is the last)."""
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def max_positions(encoder: nn.Module) -> float:
    """The maximum number of tokens: the rows of the position table without RoBERTa's padding rows, or infinity if the
    encoder has no such table.
    """
    for path, module in encoder.named_modules():
        if path.endswith(POSITION_TABLES) and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return math.inf


# ---- loading ----


def load_classifier(name: str, data: TextData) -> Pretrained:
    """The model NAME (Hub name, folder, or `tiny-bert`) in fp32, with a head for the labels of `data`.

    The outputs of a classifier of these labels in another order are reordered; `in_label_order` makes the data follow
    the teacher instead. Raises UserError if the model cannot be read, if its weights do not fit its config, or if it
    is a classifier of other labels.
    """
    if name == TINY_BERT:
        return tiny_bert(data)
    notes: list[str] = []
    places = output_places(name, read_config(name), data)
    trained = places is not None
    with reading(name, "a text encoder", NO_DOWNLOAD):
        tokenizer = read_tokenizer(name, data)
        labels = {} if trained else label_config(data)
        model = load_model(auto_class(data), name, whole=trained, notes=notes, **labels)
    if places and places != sorted(places):
        reorder_outputs(name, model, places, data.label_names)
        notes.append(f"the outputs of {name} are reordered to the labels of the data: {_shortened(data.label_names)}")
        print(f"note: {notes[-1]}")
    return fitted(name, Pretrained(model, tokenizer, trained=trained, notes=notes))


def read_tokenizer(name: str, data: TextData) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(AutoTokenizer, name)
    if data.task == "token_classification" and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = load_tokenizer(AutoTokenizer, name, add_prefix_space=True)  # words of a list have a space
    return tokenizer


def fitted(name: str, pretrained: Pretrained) -> Pretrained:
    """The model NAME with a tokenizer of the columns that it takes, and with padding."""
    model, tokenizer = pretrained.model, pretrained.tokenizer
    accepted = inspect.signature(encoder_of(model).forward).parameters  # DistilBERT takes no token_type_ids
    tokenizer.model_input_names = [column for column in tokenizer.model_input_names if column in accepted]
    set_padding(name, model, tokenizer, pretrained.notes)
    return pretrained


def auto_class(data: TextData) -> Any:
    """The class of transformers that loads a classifier of the data."""
    is_tagger = data.task == "token_classification"
    return AutoModelForTokenClassification if is_tagger else AutoModelForSequenceClassification


def load_trained(name: str, data: TextData) -> Pretrained:
    """Loads the classifier NAME, trained on the labels of `data`. Raises UserError as `load_classifier` does, and for
    an encoder without a head.
    """
    classifier = load_classifier(name, data)
    if not classifier.trained:
        raise UserError(f"{name} is not a trained classifier: it has no head for the labels of {data.name}")
    return classifier


def read_config(name: str) -> Any:
    with reading(name, "a text encoder", NO_DOWNLOAD):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def set_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> None:
    """Pads the texts of a decoder on the right, with its end-of-text token if it has no padding token. A classifier
    with a decoder classifies the last token that is not the padding token of its config.
    """
    found = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {name} has neither a padding token nor an end-of-text token: set pad_token in its "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        found.append(f"{name} has no padding token: texts are padded with its end-of-text token {tokenizer.eos_token}")
    config = model.config.get_text_config()
    if is_decoder(config) and getattr(config, "pad_token_id", None) not in (None, tokenizer.pad_token_id):
        found.append(
            f"the padding token of {name} is that of its tokenizer ({tokenizer.pad_token_id}), not that of its "
            f"config.json ({config.pad_token_id})"
        )
        config.pad_token_id = tokenizer.pad_token_id
    elif getattr(config, "pad_token_id", tokenizer.pad_token_id) is None:
        config.pad_token_id = tokenizer.pad_token_id
    if is_decoder(config) and config.model_type not in PADDED_LEFT and tokenizer.padding_side == "left":
        tokenizer.padding_side = "right"  # on the left, the absolute positions of GPT-2's tokens would change
        found.append(f"the texts of {name} are padded on the right instead of the left")
    for note in found:
        print(f"note: {note}")
    notes += found


# ---- labels ----


def label_config(data: TextData) -> dict:
    """id2label and label2id, also with the type of a multi-label task, or a single unnamed output for regression."""
    if data.task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {label: i for i, label in enumerate(data.label_names)},
    } | ({"problem_type": MULTI_LABEL} if data.task == "multi_label" else {})


def output_places(name: str, config: Any, data: TextData) -> list[int] | None:
    """The output of the checkpoint NAME for each label of `data`; None if it is not a classifier of their task.

    Raises UserError if it is a classifier of other labels.
    """
    if not is_classifier(config) or is_tagger(config) != (data.task == "token_classification"):
        return None
    if data.task == "regression" or config.num_labels == 1:
        if data.task == "regression" and config.num_labels == 1:
            return [0]
        raise UserError(f"{name} has {config.num_labels} outputs, {data.name} needs {data.num_labels}")
    if config.problem_type == MULTI_LABEL and data.task == "classification":
        raise UserError(f"{name} assigns several labels to a text, {data.name} has one per text: use another model")
    if config.problem_type != MULTI_LABEL and data.task == "multi_label":
        raise UserError(
            f"{name} assigns one label to a text, {data.name} has any number per text: use another model, or set "
            f'"problem_type": "{MULTI_LABEL}" in its config.json if it was trained on them'
        )
    labels = _checked_labels(name, config, data)
    ids = match_names(data.label_names, labels)
    if sorted(ids) == list(range(len(labels))):
        return ids
    raise UserError(
        f"{name} classifies {len(labels)} labels ({_shortened(labels)}), {data.name} has {len(data.label_names)} "
        f"({_shortened(data.label_names)}): pass a classifier of the same labels, or an encoder without a head, as "
        "--teacher or --student"
    )


def in_label_order(name: str, data: TextData) -> TextData:
    """The data with the class ids of NAME, if that is a classifier of the same labels in another order; otherwise the
    data unchanged.

    F1 counts label 1 as positive, so data whose primary metric it is keep their order.
    """
    if name == TINY_BERT or data.task == "regression" or not is_classifier(config := read_config(name)):
        return data
    if is_tagger(config) != (data.task == "token_classification"):
        return data
    if config.num_labels == 1:
        return data
    labels = _checked_labels(name, config, data)
    ids = match_names(data.label_names, labels)  # the model may have more labels than the data
    if -1 in ids or labels == data.label_names or ids == list(range(len(labels))):
        return data
    if data.primary_metric == "f1" and data.task == "classification":
        return data
    note = f"class ids follow {name}: {_shortened(labels)}"
    if len(labels) > len(data.label_names):
        note += f"; {len(labels) - len(data.label_names)} of its classes have no rows"
    print(f"note: {note}")
    return replace(with_label_order(data, labels), notes=[*data.notes, note])


def labels_of(model: str) -> tuple[TaskType | None, list[str] | None]:
    """The task and the class names, in the order of the outputs, of a saved classifier. The task is None for a model
    without a head. The names are None for such a model, for regression, and for classes LABEL_0, LABEL_1, ...
    """
    config = read_config(model)
    if not is_classifier(config):
        return None, None
    if config.num_labels == 1:
        return "regression", None
    task: TaskType = "multi_label" if config.problem_type == MULTI_LABEL else "classification"
    return "token_classification" if is_tagger(config) else task, named_labels(model, config)


def architecture_of(config: Any) -> str:
    """The name of the class that was saved; empty if it is not known."""
    return str((config.architectures or [""])[0])


def is_classifier(config: Any) -> bool:
    return architecture_of(config).endswith(CLASSIFIERS)


def is_tagger(config: Any) -> bool:
    """Whether a checkpoint classifies tokens."""
    return architecture_of(config).endswith(TAGGER)


def named_labels(name: str, config: Any) -> list[str] | None:
    """The labels of the classifier NAME by class id; None for LABEL_0, LABEL_1, ..."""
    names = {int(i): str(label) for i, label in config.id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"id2label in the config.json of {name} must name the labels 0 to {len(names) - 1}, one by one"
        )
    labels = [names[i] for i in range(len(names))]
    return None if labels == [f"{UNNAMED}{i}" for i in range(len(labels))] else labels


def _checked_labels(name: str, config: Any, data: TextData) -> list[str]:
    """`named_labels`. Raises UserError for unnamed labels, unless the labels of `data` are the same numbers."""
    labels = named_labels(name, config)
    if labels is not None:
        return labels
    number = len(config.id2label)
    if data.model_labels is not None:
        if len(data.model_labels) != number:
            raise UserError(
                f"{name} has {number} labels, and --label_names or the data have {len(data.model_labels)} "
                f"({_shortened(data.model_labels)}): pass its labels, by id, as --label_names"
            )
        return data.model_labels
    if data.label_names in ([str(i) for i in range(number)], [f"{UNNAMED}{i}" for i in range(number)]):
        return data.label_names
    raise UserError(
        f"{name} does not name its {number} labels ({UNNAMED}0, ...), so they cannot be matched with the "
        f"{len(data.label_names)} of {data.name} ({_shortened(data.label_names)}): pass them by id as --label_names, "
        "or --trust_label_order if they are those of the data in this order"
    )


def _shortened(labels: list[str], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")


# ---- the embedded model ----


def tiny_bert(data: TextData) -> Pretrained:
    """A 4-layer BERT of width 128 with random weights, and a vocabulary from the training texts."""
    train = data.splits["train"]
    texts = [text for column in ("text", "text_pair") if column in train.column_names for text in train[column]]
    is_words = data.task == "token_classification"
    texts = [" ".join(words) for words in texts] if is_words else texts
    tokenizer = BertTokenizer(vocab=vocabulary(texts), do_lower_case=True, model_max_length=512)
    config = tiny_config(tokenizer, **label_config(data))
    kind = BertForTokenClassification if is_words else BertForSequenceClassification
    return Pretrained(kind(config), tokenizer, from_scratch=True)


def tiny_config(tokenizer: PreTrainedTokenizerBase, **others: Any) -> BertConfig:
    """The configuration of a small BERT with random weights; `others` are further entries."""
    return BertConfig(
        vocab_size=len(tokenizer),
        # BERT's 0.02, scaled from its width of 768 such that the outputs of layers have the same variance. With 0.02,
        # this model needs several times as many epochs.
        initializer_range=0.02 * math.sqrt(768 / TINY_SIZES["hidden_size"]),
        hidden_dropout_prob=0.0,  # few epochs do not overfit, and dropout takes a fifth of a step on a CPU
        attention_probs_dropout_prob=0.0,
        **TINY_SIZES,
        **others,
    )


def vocabulary(texts: Iterable[str], most: int = 4000) -> dict[str, int]:
    """A WordPiece vocabulary: the most frequent words that occur at least twice, and all letters for other words.

    The tokenizers library would learn another vocabulary in each process, but a continued run needs the same one.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(word for t in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word, n in counts.items() if n > 1), key=lambda word: (-counts[word], word))[:most]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    return {piece: i for i, piece in enumerate(pieces)}
