"""Reading saved models: in fp32, with weights that fit, and with an error of one line where that fails.

`from_pretrained` alone loads half-precision weights in half precision, fills in random numbers for weights that are
missing, and raises whatever its parsers raise. All models and tokenizers of this project are read here.
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

from kd.common.data.readers import reason_of
from kd.common.data.sources import offline_if_unreachable, shorten
from kd.common.utils.errors import UserError
from kd.common.utils.finite import non_finite_tensor

WRAPPERS = re.compile(r"((?:module\.|_orig_mod\.|model\.)+)")  # DataParallel, torch.compile, attributes of a wrapper
POOLER = re.compile(r"(^|\.)pooler\.")
LAYER = re.compile(r"(^|\.)\d+\.")
HARMLESS = re.compile(  # unknown weights of parts that a model of another head lacks, and buffers no longer stored
    r"(^|\.)(pooler|cls|lm_head|lm_predictions|mask_predictions|generator_predictions|generator_lm_head|mlm|"
    r"vocab_(projector|transform|layer_norm)|discriminator_predictions|qa_outputs|position_ids|masked_bias|inv_freq|"
    r"final_logits_bias)(\.|$)|\.attn\.bias$"
)
SHOWN = 3  # names of weights in a message


@contextmanager
def reading(name: str | Path, what: str, instead: str = "") -> Iterator[None]:
    """Whatever fails while the files of NAME (a folder, or a name on the Hub) are read becomes a UserError of one line
    with its cause. `what`: what NAME should be, as "a text encoder"; `instead`: what else may be passed for a
    name on the Hub.
    """
    try:
        if Path(name).is_file():
            raise UserError(f"{shorten(name)} is a file: pass a folder with config.json and weights, or a Hub name")
        with offline_if_unreachable(str(name)):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each parser has its own kinds for a file that is damaged, or of something else
        raise UserError(_explain(str(name), what, instead, error)) from error


def load_model(
    kind: Any, name: str | Path, whole: bool = True, notes: list[str] | None = None, **settings: Any
) -> Any:
    """`kind.from_pretrained(name, **settings)` in fp32. Raises UserError where weights are missing or unknown; without
    `whole` a head may be missing, whose weights are then random, and other heads are left out. What was changed to
    make the weights fit is printed and added to `notes`.
    """
    model, misfit, prefix = _load(kind, name, whole, settings)
    if prefix:
        model, misfit, _ = _load(kind, name, whole, settings | {"key_mapping": {f"^{re.escape(prefix)}": ""}})
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


def load_tokenizer(kind: Any, name: str | Path) -> Any:
    """`kind.from_pretrained(name)`. Raises UserError where there are no files of a tokenizer."""
    tokenizer = kind.from_pretrained(str(name), trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{shorten(name)} has no tokenizer: save it there with tokenizer.save_pretrained")
    return tokenizer


def stage_loader(kind: Any, load: Callable[[Any, str | Path], Any] = load_model) -> Callable[[str | Path], Any]:
    """What `Run.stage` reads a finished stage with: `load` is load_model or load_tokenizer."""

    def read(folder: str | Path) -> Any:
        with reading(folder, "a finished stage"):
            return load(kind, folder)

    return read


def _load(kind: Any, name: str | Path, whole: bool, settings: dict[str, Any]) -> tuple[Any, str, str]:
    """The model, what is wrong with its weights, and the prefix of all unknown names where others are missing."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # no table of missing and unknown weights
    try:
        model, info = kind.from_pretrained(
            str(name),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            trust_remote_code=False,
            weights_only=True,
            **settings,
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
        key for key in info["unexpected_keys"] if not HARMLESS.search(key) and (whole or LAYER.search(key))
    )
    parts = {"missing": missing, "unknown": unknown, "of another size": resized}
    misfit = "; ".join(f"{part}: {_some(keys)}" for part, keys in parts.items() if keys)
    prefixes = {found.group() if (found := WRAPPERS.match(key)) else "" for key in unknown}
    return model, misfit, prefixes.pop() if len(prefixes) == 1 and missing else ""


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _explain(name: str, what: str, instead: str, error: Exception) -> str:
    cause = reason_of(error).rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        cause = "a .bin file is damaged, or holds more than tensors and is therefore not unpickled"
    elif isinstance(error, SafetensorError):
        cause = f"its weights are damaged or cut short ({cause})"
    elif "trust_remote_code" in str(error):
        cause = "it needs code of its own, which is not run"
    elif isinstance(error, KeyError):
        cause = f"no {cause}"
    if not os.path.isdir(name):  # Path.is_dir raises where a name is too long
        return (
            f"no model {shorten(name)}: it is no folder with config.json, weights and what else {what} needs, and the "
            f"Hugging Face Hub has no such model or cannot be reached ({cause})" + (f"; {instead}" if instead else "")
        )
    if not {"config.json", "tokenizer.json"} & set(os.listdir(name)):
        return f"no model in {shorten(name)}: it has no config.json; name the folder of {what}, as a run's student"
    return f"cannot read {what} from {shorten(name)}: {cause}"
