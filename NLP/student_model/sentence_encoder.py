"""Sentence encoders: text encoders whose pooled hidden states are the embedding of a text."""

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from kd.common.losses.shared import unit
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.training.inference import run_inference
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_json
from kd.nlp.data.loading import Collator
from kd.nlp.student_model.pooling import Pooling, pool
from kd.nlp.teacher_model import TINY_BERT
from kd.nlp.teacher_model.teacher import NO_DOWNLOAD, max_positions, tiny_config, vocabulary

MODULES, POOLING = "modules.json", "1_Pooling"  # the files of sentence-transformers
# The poolings of sentence-transformers, by the names that all of its versions read.
POOLINGS: dict[str, Pooling] = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
SHORT_NAMES = {"cls": "cls_token", "mean": "mean_tokens"}  # of newer versions
SUPPORTED = ("Transformer", "Pooling", "Normalize")  # modules of sentence-transformers
PACKAGE = "sentence_transformers.models"


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder, its tokenizer, and the pooling of its hidden states.

    notes: What was inferred when it was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling = "mean"
    notes: list[str] = field(default_factory=list)

    @property
    def collate(self) -> Collator:
        return Collator(self.tokenizer)

    def embedding(self, **batch: Tensor) -> Tensor:
        """The embeddings (batch, width) of a batch, of length 1."""
        return unit(pool(self.model(**batch).last_hidden_state, batch["attention_mask"], self.pooling))

    def embed(self, rows: Dataset) -> np.ndarray:
        """The embeddings (rows, width) of tokenized texts, in fp32, the precision of a model that a user loads."""
        outputs = run_inference(self.model, lambda **batch: {"embedding": self.embedding(**batch)}, rows, self.collate,
                                description="evaluating")  # fmt: skip
        return torch.stack(outputs["embedding"]).numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that transformers loads with AutoModel and AutoTokenizer, and sentence-transformers loads
        with SentenceTransformer.
        """
        folder, width = Path(folder), int(self.model.config.hidden_size)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        places = {"Transformer": "", "Pooling": POOLING, "Normalize": "2_Normalize"}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"{PACKAGE}.{name}"}
            for i, (name, path) in enumerate(places.items())
        ]
        modes = {f"pooling_mode_{name}": self.pooling == pooling for name, pooling in POOLINGS.items()}
        (folder / POOLING).mkdir(exist_ok=True)
        write_json(folder / POOLING / "config.json", {"word_embedding_dimension": width, **modes})
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.tokenizer.model_max_length})
        write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
        write_json(folder / MODULES, modules)


def load_sentence_encoder(name: str, max_length: int | None = None) -> SentenceEncoder:
    """The encoder NAME (Hub name or folder) in fp32, with the pooling of its sentence-transformers files, or the mean
    over positions if there are none.

    Args:
        max_length: Maximum number of tokens, which is saved with the tokenizer (default: that of the tokenizer).

    Raises UserError if it cannot be read, or if its embedding is not a mean or the first hidden state.
    """
    with reading(name, "a text encoder", NO_DOWNLOAD):
        tokenizer, model = load_tokenizer(AutoTokenizer, name), load_model(AutoModel, name, whole=False)
        modules, pooling = _json(name, MODULES), _json(name, f"{POOLING}/config.json")
    if model.config.is_encoder_decoder or tokenizer.pad_token_id is None:
        raise UserError(f"{name} is a {type(model).__name__}, not a text encoder: pass one such as BERT as --teacher")
    found, notes = _pooling_of(name, modules or [], pooling), list[str]()
    if found is None:
        found = "mean"
        notes.append(f"{name} names no pooling: the embedding is the mean of its last hidden states")
    accepted = inspect.signature(model.forward).parameters  # DistilBERT takes no token_type_ids
    tokenizer.model_input_names = [column for column in tokenizer.model_input_names if column in accepted]
    if (most := max_positions(model)) < (max_length or 0):
        raise UserError(f"--max_length {max_length}: {name} takes at most {most} tokens")
    tokenizer.model_max_length = min(max_length or tokenizer.model_max_length, most)
    return SentenceEncoder(model, tokenizer, found, notes)


def _json(name: str, file: str) -> Any:
    """The content of a JSON file of a model in a folder or on the Hub; None if there is none."""
    try:
        path = cached_file(name, file)
    except OSError:
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _pooling_of(name: str, modules: list[dict[str, Any]], config: dict[str, Any] | None) -> Pooling | None:
    """The pooling that the files of sentence-transformers name; None if there are none."""
    others = [kind for module in modules if (kind := str(module["type"]).rpartition(".")[2]) not in SUPPORTED]
    if others:
        raise UserError(f"{name} has a module {others[0]}, which is not supported: pass another --teacher")
    if config is None:
        return None
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    named = config.get("pooling_mode", modes)
    modes = [SHORT_NAMES.get(mode, mode) for mode in ([named] if isinstance(named, str) else named)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"the pooling of {name} is {' and '.join(modes) or 'none'}, and only {', '.join(POOLINGS)} are supported: "
            "pass another --teacher"
        )
    return POOLINGS[modes[0]]


def tiny_sentence_encoder(texts: Iterable[str], max_length: int) -> SentenceEncoder:
    """A small BERT with random weights, and a vocabulary from the texts. Texts with shared words are similar to it."""
    tokenizer = BertTokenizer(vocab=vocabulary(texts), do_lower_case=True, model_max_length=max_length)
    return SentenceEncoder(BertModel(tiny_config(tokenizer)), tokenizer, notes=[f"{TINY_BERT} has random weights"])
