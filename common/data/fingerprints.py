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

NOT_HASHED = {"_name_or_path", "transformers_version"}  # these change when a folder is moved or saved again


def data_fingerprint(parts: Iterable[object]) -> str:
    """Hashes parts in order: bytes and arrays by their bytes, anything else by its JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module | PreTrainedTokenizerBase) -> str:
    """Hashes everything that determines the outputs of a model or tokenizer, wherever its files are."""
    if isinstance(model, nn.Module):
        configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
        return outputs_key(
            model, *(_config_json(config.to_dict()) for config in configs if hasattr(config, "to_dict"))
        )
    backend = getattr(model, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": model.get_vocab()}
    rules |= {"padding": None, "truncation": None, "special": model.special_tokens_map}  # calls change the first two
    return hashlib.sha256(_config_json(rules).encode()).hexdigest()


def _config_json(config: dict[str, Any]) -> str:
    hashed = {name: value for name, value in config.items() if name not in NOT_HASHED}
    return json.dumps(hashed, sort_keys=True, default=str)


def outputs_key(teacher: nn.Module, *parts: object) -> str:
    """Key of cached teacher outputs: hashes the weights and `parts` (data, precision, names of features)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashlib.sha256("\n".join([digest.hexdigest(), *map(str, parts)]).encode()).hexdigest()


def dataset_hash(dataset: Dataset) -> str:
    """Hashes the sample ids and model inputs of a dataset: all columns except `labels` and `length`."""
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
