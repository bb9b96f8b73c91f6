"""Loads saved models and tokenizers in fp32, checks that all weights fit, and reports failures in one line.

`from_pretrained` alone keeps half-precision weights, initializes missing weights at random, and raises the exceptions
of its parsers.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from kd.common.data.sources import offline_if_unreachable, shorten
from kd.common.utils.errors import UserError, reason_of
from kd.common.utils.finite import non_finite_tensor

WRAPPERS = re.compile(r"((?:module\.|_orig_mod\.|model\.)+)")  # DataParallel, torch.compile, attributes of a wrapper
POOLER = re.compile(r"(^|\.)pooler\.")
LAYER = re.compile(r"(^|\.)\d+\.")
IGNORED_WEIGHTS = re.compile(  # weights of other heads, and buffers that are no longer saved
    r"(^|\.)(pooler|cls|lm_head|lm_predictions|mask_predictions|generator_predictions|generator_lm_head|mlm|"
    r"vocab_(projector|transform|layer_norm)|discriminator_predictions|qa_outputs|position_ids|masked_bias|inv_freq|"
    r"final_logits_bias)(\.|$)|\.attn\.bias$"
)
MAX_NAMES = 3  # names of weights in a message


@contextmanager
def reading(name: str | Path, expected: str, instead: str = "") -> Iterator[None]:
    """Turns any exception while the files of `name` are read into a UserError of one line.

    Args:
        name: a folder, or a name on the Hub.
        expected: the expected contents, such as "a text encoder", for the message.
        instead: an alternative for the user if the Hub has no such model.
    """
    try:
        if Path(name).is_file():
            raise UserError(f"{shorten(name)} is a file: pass a folder with config.json and weights, or a Hub name")
        with offline_if_unreachable(str(name)):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each parser raises other types for a damaged file or an unknown format
        raise UserError(_explain(str(name), expected, instead, error)) from error


def load_model(kind: Any, name: str | Path, whole: bool = True, notes: list[str] | None = None, **kwargs: Any) -> Any:
    """Calls `kind.from_pretrained(name, **kwargs)` in fp32. Raises UserError for weights that do not fit.

    Args:
        whole: if False, a missing head is initialized at random, and weights of other heads are ignored.
        notes: receives a note, which is also printed, if a prefix of the weights' names was removed.
    """
    model, misfit, prefix = _load(kind, name, whole, kwargs)
    if prefix:
        model, misfit, _ = _load(kind, name, whole, kwargs | {"key_mapping": {f"^{re.escape(prefix)}": ""}})
    if misfit:
        raise UserError(f"the weights of {shorten(name)} do not fit its config.json: {misfit}")
    if prefix:
        note = f"the weights of {shorten(name)} are read without the prefix {prefix!r} of their names"
        print(f"note: {note}")
        if notes is not None:
            notes.append(note)
    if (tensor := non_finite_tensor(model)) is not None:
        raise UserError(f"the weights of {shorten(name)} are damaged: {tensor} is not finite")
    return model


def load_tokenizer(kind: Any, name: str | Path, **kwargs: Any) -> Any:
    """Calls `kind.from_pretrained(name, **kwargs)`. Raises UserError if `name` has no tokenizer."""
    tokenizer = kind.from_pretrained(str(name), trust_remote_code=False, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{shorten(name)} has no tokenizer: save it there with tokenizer.save_pretrained")
    return tokenizer


def stage_loader(kind: Any, load: Callable[[Any, str | Path], Any] = load_model) -> Callable[[str | Path], Any]:
    """The function with which `Run.stage` loads a finished stage. `load`: load_model or load_tokenizer."""

    def read(folder: str | Path) -> Any:
        with reading(folder, "a finished stage"):
            return load(kind, folder)

    return read


def _load(kind: Any, name: str | Path, whole: bool, kwargs: dict[str, Any]) -> tuple[Any, str, str]:
    """The model, a description of the weights that do not fit, and a prefix that all unknown weights share, if any."""
    transformers_logging.disable_progress_bar()  # an error is one line, also on stderr
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # hides its table of missing and unknown weights
    try:
        model, info = kind.from_pretrained(
            str(name),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            trust_remote_code=False,
            weights_only=True,
            **kwargs,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    base = f"{model.base_model_prefix}."
    has_head = any(key.startswith(base) for key in model.state_dict())

    def needed(key: str) -> bool:
        return whole or ((key.startswith(base) or not has_head) and not POOLER.search(key))

    missing = sorted(filter(needed, info["missing_keys"]))
    resized = sorted(f"{key} {tuple(a)} instead of {tuple(b)}" for key, a, b in info["mismatched_keys"] if needed(key))
    unknown = sorted(
        key for key in info["unexpected_keys"] if not IGNORED_WEIGHTS.search(key) and (whole or LAYER.search(key))
    )
    parts = {"missing": missing, "unknown": unknown, "of another size": resized}
    misfit = "; ".join(f"{part}: {_some(keys)}" for part, keys in parts.items() if keys)
    prefixes = {found.group() if (found := WRAPPERS.match(key)) else "" for key in unknown}
    return model, misfit, prefixes.pop() if len(prefixes) == 1 and missing else ""


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:MAX_NAMES]) + (f" and {len(keys) - MAX_NAMES} more" if len(keys) > MAX_NAMES else "")


def _explain(name: str, expected: str, instead: str, error: Exception) -> str:
    cause = reason_of(error).rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        cause = "a .bin file is damaged, or contains more than tensors and is not unpickled"
    elif isinstance(error, SafetensorError):
        cause = f"its weights are damaged or truncated ({cause})"
    elif "trust_remote_code" in str(error):
        cause = "it needs custom code, which is not executed"
    elif isinstance(error, KeyError):
        cause = f"no {cause}"
    if not os.path.isdir(name):  # Path.is_dir raises for a name that is too long
        return (
            f"no model {shorten(name)}: it is not a folder with the files of {expected}, and the Hugging Face Hub has "
            f"no such model or cannot be reached ({cause})" + (f"; {instead}" if instead else "")
        )
    if not {"config.json", "tokenizer.json"} & set(os.listdir(name)):
        return f"no model in {shorten(name)}: it has no config.json; pass a folder of {expected}, as RUN/student"
    return f"cannot read {expected} from {shorten(name)}: {cause}"
