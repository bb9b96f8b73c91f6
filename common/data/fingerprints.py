"""Fingerprints of the inputs of a run: models with their configuration, and tokenizers."""

import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kd.common.training.teacher_outputs import outputs_key

IGNORED = {"_name_or_path", "transformers_version"}  # a folder may be moved, or saved again as it was


def fingerprint_of(given: nn.Module | PreTrainedTokenizerBase) -> str:
    """A hash of all that decides what a model or tokenizer computes, wherever its files are."""
    if isinstance(given, nn.Module):
        configurations: list[Any] = [getattr(given, name, None) for name in ("config", "generation_config")]
        return outputs_key(given, *(_words(one.to_dict()) for one in configurations if hasattr(one, "to_dict")))
    backend = getattr(given, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": given.get_vocab()}
    rules |= {"padding": None, "truncation": None, "special": given.special_tokens_map}  # use changes the first two
    return hashlib.sha256(_words(rules).encode()).hexdigest()


def _words(settings: dict[str, Any]) -> str:
    kept = {name: value for name, value in settings.items() if name not in IGNORED}
    return json.dumps(kept, sort_keys=True, default=str)
