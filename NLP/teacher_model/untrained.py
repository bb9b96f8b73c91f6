"""Classifiers with random weights: from a config.json without weights, or from a type of model and its sizes.

--student FOLDER                                                     # a folder with config.json alone
--student bert:num_hidden_layers=2:hidden_size=128:num_attention_heads=4:intermediate_size=256
"""

import ast
import copy
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from kd.common.data.sources import shorten
from kd.common.pretrained import reading
from kd.common.utils.errors import UserError, reason_of
from kd.nlp.data.loading import TextData
from kd.nlp.teacher_model.teacher import (
    Pretrained,
    auto_class,
    fitted,
    label_config,
    load_classifier,
    read_config,
    read_tokenizer,
)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.h5", "*.msgpack", "*.pt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
TOKEN_IDS = ("pad", "bos", "eos", "cls", "sep", "mask")
STANDARD_WIDTH = 768  # transformers' standard deviation of random weights, 0.02, is that of BERT of this width


def has_no_weights(name: str) -> bool:
    """Whether NAME is a folder with config.json and without weights, or a type of model with sizes."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / "config.json").exists() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    return name.partition(":")[0] in CONFIG_MAPPING and ":" in name


def load_student(name: str, data: TextData, teacher: Pretrained | None) -> Pretrained:
    """The model NAME as of `load_classifier`, or with random weights if it `has_no_weights`.

    A model with random weights has the tokenizer of its folder, or that of the teacher. Its labels, the size of its
    vocabulary and the ids of its special tokens are set to match. Raises UserError for settings that do not fit.
    """
    if not has_no_weights(name):
        return load_classifier(name, data)
    own_tokenizer = any((Path(name) / file).exists() for file in TOKENIZER_FILES)
    if own_tokenizer:
        with reading(name, "a tokenizer"):
            tokenizer = read_tokenizer(name, data)
    elif teacher is None:
        raise UserError(f"--student {shorten(name)} has no tokenizer, and no teacher has one: save one in its folder")
    else:
        tokenizer = copy.deepcopy(teacher.tokenizer)
    try:
        config = read_config(name) if Path(name).is_dir() else config_of(name)
        set_vocabulary(config, tokenizer, shrink=not own_tokenizer)
        for setting, value in label_config(data).items():
            setattr(config, setting, value)
        model = auto_class(data).from_config(config)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"--student {shorten(name)}: {reason_of(error)}") from error
    origin = "the tokenizer of its folder" if own_tokenizer else "the tokenizer of the teacher"
    note = (
        f"student {shorten(name)} starts from random weights: {config.model_type}, {config.num_hidden_layers} layers "
        f"of width {config.hidden_size}, with {origin}"
    )
    print(f"note: {note}")
    return fitted(name, Pretrained(model, tokenizer, from_scratch=True, notes=[note]))


def config_of(spec: str) -> Any:
    """The config of TYPE:key=value[:key=value]... Raises UserError for an unknown key.

    Unless it is named, the standard deviation of the random weights is scaled with the width, such that the outputs of
    layers have the same variance: small models train several times as long with the one of large models.
    """
    kind, *settings = spec.split(":")
    config, named = CONFIG_MAPPING[kind](), {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not hasattr(config, key):
            known = [name for name, default in config.to_dict().items() if isinstance(default, int | float)]
            raise UserError(
                f"--student {spec}: {kind} has no setting {key!r}: use KEY=VALUE with one of {', '.join(known)}"
            )
        named[key] = _value(value)
    config = CONFIG_MAPPING[kind](**named)
    if "initializer_range" not in named and hasattr(config, "initializer_range"):
        config.initializer_range = config.initializer_range * math.sqrt(STANDARD_WIDTH / config.hidden_size)
    return config


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase, shrink: bool) -> None:
    """Sets the ids of special tokens to the tokenizer's, and the size of the vocabulary if that is smaller than the
    tokenizer's, or should `shrink`.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    config.vocab_size = size if shrink else max(size, config.vocab_size)
    for token in TOKEN_IDS:
        if hasattr(config, f"{token}_token_id"):
            setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
