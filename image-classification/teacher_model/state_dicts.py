"""State dicts of other projects: reads them from files, and renames their tensors to those of an ImageClassifier.

Tensors are matched by name rules for the naming of each family of networks. Where these fail they are matched in their
order. Either way each tensor of the file must have its counterpart of the same shape.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kd.common.utils.errors import UserError, reason_of
from kd.image_classification.teacher_model.backbones.mobile import STAGES

State = dict[str, Tensor]
CONTAINERS = ("model", "state_dict", "net", "network", "model_state_dict", "student", "teacher")  # in this order
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")  # of wrappers
COUNTER = "num_batches_tracked"  # of batch norms; the old format lacks it, and it has no effect on outputs
SAFE = (argparse.Namespace, np.dtype, type(np.dtype("float32")), type(np.dtype("float64")), type(np.dtype("int64")))
# Inert values that training scripts save next to the weights; torch loads no other class.
NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


# ---- files ----


def read_state_dict(path: str | Path) -> State:
    """The tensors by name in a file of torch.save or safetensors, in fp32 and without the prefixes of wrappers.

    Raises UserError for a file with anything but numbers, tensors and text, which is not unpickled, and for a file
    without a state dict.
    """
    contents = _read(Path(path))
    state = _find_state(path, contents)
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    damaged = next((n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if damaged is not None:
        raise UserError(f"the weights of {path} are damaged: {damaged} is not finite")
    while (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)) is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read(path: Path) -> object:
    scalar: Any = np.float64(0).__reduce__()[0]  # the function that restores a number of numpy
    allowed: list[Any] = [*SAFE, *((scalar, name) for name in NUMPY_SCALARS)]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"the weights of {path} are damaged or truncated ({reason_of(error)})") from error
    except Exception as error:  # torch has other exceptions for each kind of damage
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked is None:
            raise UserError(f"cannot read weights from {path}: {reason_of(error).rstrip('.')}") from error
        raise UserError(
            f"{path} contains more than tensors ({blocked[1]}) and is not unpickled: save the weights alone, with "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _find_state(path: str | Path, contents: object) -> State:
    if _is_state(contents):
        return dict(contents)  # type: ignore[call-overload]
    entries = contents if isinstance(contents, Mapping) else {}
    found = [name for name, value in entries.items() if _is_state(value)]
    chosen = next((name for name in CONTAINERS if name in found), found[0] if len(found) == 1 else None)
    if chosen is not None:
        return dict(entries[chosen])
    held = f"a dictionary of {', '.join(map(str, entries))}" if entries else type(contents).__name__
    raise UserError(f"{path} has no state dict, but {held}: save torch.save(model.state_dict(), FILE)")


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


# ---- names ----

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
HEAD: list[Rule] = [(r"^(?:fc|linear|classifier|head|output|logits|last_linear)(?:\.0)?\.(weight|bias)$", r"head.\1")]
RESIDUAL: list[Rule] = [
    (r"^conv([2-5])_x\.", lambda m: f"layer{int(m[1]) - 1}."),
    (r"^conv1\.([01])\.", lambda m: ("conv1.", "bn1.")[int(m[1])]),
    (r"\.residual_function\.(\d)\.", lambda m: f".{('conv', 'bn')[int(m[1]) % 3]}{int(m[1]) // 3 + 1}."),
    (r"^(?:block|stage|stage_|layers\.)(\d)\.(?:layer\.)?", r"layer\1."),
    (r"\.(?:downsample|skip|shortcut_conv|identity)\.", ".shortcut."),
    (r"\.convShortcut\.", ".shortcut."),
    (r"^bn1\.|^bn\.|^norm\.", "bn1."),
]
WIDE: list[Rule] = [*RESIDUAL[:-1], (r"^bn1\.", "bn.")]  # the batch norm after the last stage
VGG: list[Rule] = [
    (r"^block(\d)\.(\d+)\.", lambda m: f"{_group(int(m[1]))}.{int(m[2]) // 3}.{int(m[2]) % 3}."),
]
MOBILE: list[Rule] = [
    (r"^conv1\.", "stem."),
    (r"^conv2\.", "last."),
    (
        r"^blocks\.(\d+)\.(\d+)\.conv\.(\d+)\.",
        lambda m: f"{_mobile_block(int(m[1]), int(m[2]))}.layers.{int(m[3]) // 3}.{int(m[3]) % 3}.",
    ),
]
SHUFFLE: list[Rule] = [
    (r"^(conv|bn)1\.", lambda m: f"stem.{('conv', 'bn').index(m[1])}."),
    (r"^(conv|bn)2\.", lambda m: f"last.{('conv', 'bn').index(m[1])}."),
]
SHUFFLE_V1: list[Rule] = [
    *SHUFFLE,
    (
        r"^(layer\d\.\d+)\.(conv|bn)([123])\.",
        lambda m: f"{m[1]}.{('reduce', 'depthwise', 'expand')[int(m[3]) - 1]}.{('conv', 'bn').index(m[2])}.",
    ),
]
SHUFFLE_V2: list[Rule] = [
    *SHUFFLE,
    (
        r"^(layer\d\.0)\.(conv|bn)([12])\.",
        lambda m: f"{m[1]}.short_branch.{int(m[3]) - 1}.{('conv', 'bn').index(m[2])}.",
    ),
    (r"^(layer\d\.0)\.(conv|bn)([345])\.", lambda m: f"{m[1]}.branch.{int(m[3]) - 3}.{('conv', 'bn').index(m[2])}."),
    (r"^(layer\d\.\d+)\.(conv|bn)([123])\.", lambda m: f"{m[1]}.branch.{int(m[3]) - 1}.{('conv', 'bn').index(m[2])}."),
]
FAMILIES: dict[str, list[Rule]] = {  # the start of an architecture's name: rules, each applied to every name
    "resnet": RESIDUAL,
    "wrn": WIDE,
    "vgg": VGG,
    "mobilenetv2": MOBILE,
    "shufflenetv1": SHUFFLE_V1,
    "shufflenetv2": SHUFFLE_V2,
}


def rename(state: State, target: State, architecture: str) -> tuple[State, str]:
    """The tensors of `state` by the names of `target`, the state dict of an untrained classifier of this architecture,
    and how they were matched, "name" or "order".

    Raises UserError unless every tensor has its counterpart of the same shape. The counters of batch norms may lack.
    """
    wanted = {name: value for name, value in target.items() if not name.endswith(COUNTER)}
    state = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    renamed = {_rename(name, architecture): value for name, value in state.items()}
    order = {name: value for name, value in zip(wanted, state.values(), strict=False)}
    for how, found in ("name", renamed), ("order", order):
        if len(found) == len(state) and _shapes(found) == _shapes(wanted):
            return target | found, how
    raise UserError(
        f"the weights do not fit {architecture}: {_misfit(renamed, state, wanted)}; pass another "
        "--teacher_architecture, or the network of your code, package.module:factory"
    )


def _rename(name: str, architecture: str) -> str:
    rules = next((rules for start, rules in FAMILIES.items() if architecture.startswith(start)), [])
    for pattern, replacement in HEAD:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return f"backbone.{name}"


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _misfit(renamed: State, state: State, wanted: State) -> str:
    """The first difference, in the words of the file where possible."""
    if len(state) != len(wanted):
        return f"the file has {len(state)} tensors, the architecture {len(wanted)}"
    pairs = zip(renamed, state, strict=False) if len(renamed) == len(state) else []
    for name, original in pairs:
        if name in wanted and wanted[name].shape != state[original].shape:
            return f"{original} has shape {tuple(state[original].shape)}, not {tuple(wanted[name].shape)}"
    rows = zip(state.items(), wanted.values(), strict=True)
    name, value, other = next((n, v, w) for (n, v), w in rows if v.shape != w.shape)
    return f"{name} has shape {tuple(value.shape)}; the architecture has {tuple(other.shape)} in its place"


def _group(number: int) -> str:
    """The group of convolutions of a VGG: the first is the stem."""
    return f"layer{number}" if number else "stem"


def _mobile_block(row: int, number: int) -> str:
    """The path of block `number` in row `row` of MobileNetV2's table."""
    for stage, rows in enumerate(STAGES, 1):
        if row < len(rows):
            return f"layer{stage}.{sum(repeats for _, _, repeats, _ in rows[:row]) + number}"
        row -= len(rows)
    return f"blocks.{row}.{number}"  # of no MobileNetV2
