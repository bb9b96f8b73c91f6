"""Keys and codes of a stage on disk, so that a run that is continued trains the values without its encoder.

A folder has one safetensors file: the bottleneck with its keys, their statistics, and the codes of each split. A key
in its metadata identifies all that determines them, SHA256SUMS its content. After a kill it is complete or absent.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.common.utils.errors import UserError
from kd.common.utils.files import find_damage, writing_folder

FILE = "codes.safetensors"
Tensors = dict[str, Tensor]


def stored_tensors(folder: Path, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """The tensors that an earlier call stored in `folder` under this key, memory-mapped, or those of `compute`, which
    are stored. Several processes compute together, and the main process writes.

    Raises UserError if the folder is damaged or has tensors of another key.
    """
    if folder.exists():
        damage = find_damage(folder)
        if damage is None:
            with safe_open(folder / FILE, "pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return load_file(folder / FILE)
            damage = f"{folder} has codes of other data, keys or of another encoder"
        raise UserError(f"{damage}: remove {folder}, and they are computed again")
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    PartialState().wait_for_everyone()  # no process looks for the folder after this
    if PartialState().is_main_process:
        with writing_folder(folder) as partial:
            save_file(found, partial / FILE, {"key": key})
    return found


def pack_codes(split: str, codes: list[Tensor]) -> Tensors:
    """Codes (codebooks,) or (positions, codebooks) of each sample as one tensor and the numbers of positions."""
    if codes[0].dim() == 1:
        return {split: torch.stack(codes)}
    return {split: torch.cat(codes), f"{split}_positions": torch.tensor([len(sample) for sample in codes])}


def unpack_codes(split: str, tensors: Tensors) -> list[Tensor]:
    """The inverse of `pack_codes`."""
    positions = tensors.get(f"{split}_positions")
    return list(tensors[split] if positions is None else tensors[split].split(positions.tolist()))
