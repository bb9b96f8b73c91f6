"""Text students for `python -m kd.common.export`: classifiers of texts and tokens, sentence encoders, language models
and translators.

Exports are compared with the students on the embedded intents.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kd.common.export.exportable import Exportable
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.utils.errors import UserError
from kd.nlp.data.intents import load_intents
from kd.nlp.student_model import bottleneck_classifier  # noqa: F401 - registers the architecture with AutoModel...
from kd.nlp.student_model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from kd.nlp.student_model.sentence_evaluation import is_sentence_encoder
from kd.nlp.teacher_model.teacher import MULTI_LABEL, architecture_of, encoder_of, is_tagger, read_config

CLASSIFY = """import json

import numpy as np
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(f"{{folder}}/tokenizer.json")
labels = json.load(open(f"{{folder}}/config.json"))["id2label"]

text = tokenizer.encode("move fifty dollars to my savings")  # for text pairs: encode(first, second)
columns = {{"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}}
inputs = {{name: np.array([columns[name]], dtype=np.int64) for name in {names}}}
logits = model(inputs)
print({prediction})"""

EMBED = """import numpy as np
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(f"{{folder}}/tokenizer.json")
embeddings = []
for text in ("cancel my meeting", "call off the meeting", "how far is the moon"):
    found = tokenizer.encode(text)
    columns = {{"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}}
    embeddings.append(model({{name: np.array([columns[name]], dtype=np.int64) for name in {names}}})[0])
print(np.array(embeddings) @ np.array(embeddings).T)  # cosine similarities"""

CONTINUE = """import numpy as np
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
ids = tokenizer.encode("The").ids
for _ in range(10):  # greedy; shorter texts of a batch may be padded on the right, with any token
    logits = model({"input_ids": np.array([ids], dtype=np.int64)})
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids))"""

TRANSLATE = """import numpy as np
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
source = tokenizer(["{sentence}"], return_tensors="np")
ids = [{start}]
while len(ids) < 100 and (len(ids) == 1 or ids[-1] != tokenizer.eos_token_id):  # greedy
    target = np.array([ids], dtype=np.int64)
    logits = model({{"input_ids": source["input_ids"], "attention_mask": source["attention_mask"],
                    "decoder_input_ids": target}})
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids, skip_special_tokens=True))"""


def load(name: str, task: str | None) -> Exportable:
    """Loads the student in a folder or on the Hub; `task` is not used. Raises UserError if there is none."""
    config = read_config(name)
    if is_sentence_encoder(config):
        return _sentence_encoder(load_sentence_encoder(name))
    kind, describe = _kind(name, config)
    with reading(name, "a text model"):
        model, tokenizer = load_model(kind, name), load_tokenizer(AutoTokenizer, name)
    return describe(model.eval(), tokenizer)


def _kind(name: str, config: Any) -> tuple[Any, Callable[[PreTrainedModel, PreTrainedTokenizerBase], Exportable]]:
    """Returns the class that loads a student, and the function that makes it exportable."""
    architecture = architecture_of(config)
    if is_tagger(config):
        return AutoModelForTokenClassification, _classifier
    if "Classif" in architecture:
        return AutoModelForSequenceClassification, _classifier
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM, _translator
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForCausalLM, _language_model
    raise UserError(
        f"{name} is a {architecture or config.model_type}: pass a classifier, a sentence encoder, a translator or a "
        "language model"
    )


def classifier_usage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns code that classifies a text with `folder` and `model(inputs)`."""
    if is_tagger(model.config):
        prediction = "[(token, labels[str(i)]) for token, i in zip(text.tokens, logits[0].argmax(-1))]"
    elif model.config.problem_type == MULTI_LABEL:
        prediction = "[labels[str(i)] for i, logit in enumerate(logits[0]) if logit >= 0]"
    else:
        prediction = "logits[0, 0]" if model.config.num_labels == 1 else "labels[str(logits.argmax())]"
    return CLASSIFY.format(names=json.dumps(_inputs_of(model, tokenizer)), prediction=prediction)


def _classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Exportable:
    names = _inputs_of(model, tokenizer)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in names}

    texts = _texts()
    return Exportable(
        model,
        inputs=encode(texts[40:42]),
        test_inputs=[encode(texts[:1]), encode(texts[-1:]), encode(texts)],
        axes={0: "batch", 1: "position"},
        usage=classifier_usage(model, tokenizer),
        write_files=_files(model, tokenizer),
    )


class _Embedding(nn.Module):
    """The embeddings (batch, width) of an encoder, of length 1."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.model, self.embedding = encoder.model.eval(), encoder.embedding

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.embedding(**inputs)


def _sentence_encoder(encoder: SentenceEncoder) -> Exportable:
    model, tokenizer = encoder.model, encoder.tokenizer
    return replace(
        _classifier(model, tokenizer),
        model=_Embedding(encoder),
        usage=EMBED.format(names=json.dumps(_inputs_of(model, tokenizer))),
        output="sentence_embedding",
    )


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Exportable:
    """Needs no attention mask, because logits do not depend on later positions."""
    ids = torch.tensor([id for text in _texts() for id in tokenizer(text)["input_ids"]])

    def blocks(rows: int, positions: int) -> dict[str, Tensor]:
        return {"input_ids": ids[: rows * positions].view(rows, positions)}

    model.config.use_cache = False
    return Exportable(
        model,
        inputs=blocks(2, 8),
        test_inputs=[blocks(1, 1), blocks(1, 16), blocks(20, 11)],
        axes={0: "batch", 1: "position"},
        usage=CONTINUE,
        write_files=_files(model, tokenizer),
    )


def _translator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Exportable:
    start, texts = model.config.decoder_start_token_id, _texts()

    def encode(sources: list[str], targets: list[str]) -> dict[str, Tensor]:
        source = tokenizer(sources, padding=True, truncation=True, return_tensors="pt")
        target = tokenizer(text_target=targets, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        started = torch.cat([torch.full((len(target), 1), start), target[:, :-1]], dim=1)
        columns = {key: source[key] for key in ("input_ids", "attention_mask")}
        return columns | {"decoder_input_ids": started}

    model.config.use_cache = False
    source_axes, target_axes = {0: "batch", 1: "source position"}, {0: "batch", 1: "target position"}
    return Exportable(
        model,
        inputs=encode(texts[10:12], texts[40:42]),
        test_inputs=[encode(texts[:1], texts[-1:]), encode(texts[-1:], texts[:1]), encode(texts, texts[::-1])],
        axes={"input_ids": source_axes, "attention_mask": source_axes, "decoder_input_ids": target_axes},
        usage=TRANSLATE.format(sentence=texts[40], start=start),
        write_files=_files(model, tokenizer),
    )


@cache
def _texts() -> list[str]:
    """Texts, sorted by length."""
    return sorted(load_intents()["validation"]["text"][:100], key=len)


def _inputs_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    accepted: Any = inspect.signature(encoder_of(model).forward).parameters  # DistilBERT takes no token_type_ids
    return [name for name in tokenizer.model_input_names if name in accepted]


def _files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Returns a function that writes tokenizer.json, which includes truncation, and config.json with the labels."""

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)

    return write
