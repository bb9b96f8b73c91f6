"""Fingerprints: hashes of data, of models with their configuration, and of tokenizers."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

IGNORED = {"_name_or_path", "transformers_version"}  # a folder may be moved, or saved again as it was


def data_fingerprint(parts: Iterable[object]) -> str:
    """A hash of parts in their order: bytes and arrays by their bytes, anything else by its JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module | PreTrainedTokenizerBase) -> str:
    """A hash of all that decides what a model or tokenizer computes, wherever its files are."""
    if isinstance(model, nn.Module):
        configurations: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
        return outputs_key(model, *(_json(one.to_dict()) for one in configurations if hasattr(one, "to_dict")))
    backend = getattr(model, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": model.get_vocab()}
    rules |= {"padding": None, "truncation": None, "special": model.special_tokens_map}  # use changes the first two
    return hashlib.sha256(_json(rules).encode()).hexdigest()


def _json(settings: dict[str, Any]) -> str:
    kept = {name: value for name, value in settings.items() if name not in IGNORED}
    return json.dumps(kept, sort_keys=True, default=str)


def outputs_key(teacher: nn.Module, *parts: object) -> str:
    """Key of a teacher's outputs: a hash of its weights and of whatever else decides them (data, precision, names)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashlib.sha256("\n".join([digest.hexdigest(), *map(str, parts)]).encode()).hexdigest()


def dataset_hash(dataset: Dataset) -> str:
    """A hash of the sample ids and model inputs of a dataset: all columns but `labels` and `length`."""
    names = sorted(set(dataset.column_names) - {"labels", "length"})
    digest = hashlib.sha256(repr(names).encode())
    rows = dataset.select_columns(names).with_format("arrow")
    for batch in rows.iter(batch_size=10_000):
        for name in names:
            _update(digest, batch[name].combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if hasattr(array, "flatten") and pa.types.is_nested(array.type):
        digest.update(np.ascontiguousarray(array.value_lengths()).data)
        _update(digest, array.flatten())
    elif pa.types.is_primitive(array.type):
        digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).data)
    else:
        digest.update(repr(array.to_pylist()).encode())
