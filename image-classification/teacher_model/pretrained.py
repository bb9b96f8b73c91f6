"""Teachers whose weights are part of this project, in the folder weights: `--teacher pretrained:NAME`."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from kd.common.utils.errors import UserError
from kd.common.utils.files import find_damage
from kd.image_classification.teacher_model.backbones.names import PRETRAINED

WEIGHTS = Path(__file__).parent / "weights"


def pretrained_names() -> list[str]:
    """The names of the teachers."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/config.json"))


def pretrained_folder(name: str) -> Path:
    """The folder of the teacher `pretrained:NAME`. Raises UserError for an unknown name and for a damaged folder."""
    names, folder = pretrained_names(), WEIGHTS / name.removeprefix(PRETRAINED)
    if folder.name not in names:
        choices = ", ".join(f"{PRETRAINED}{known}" for known in names)
        raise UserError(f"unknown teacher {name}: choose from {choices}")
    if damage := find_damage(folder):
        raise UserError(f"{damage}: restore this file of the repository, or pass another --teacher")
    return folder


def save_half_precision(model: nn.Module, folder: Path) -> None:
    """Writes the weights of a model to a folder: matrices and kernels in fp16, biases and batch norms as they are."""
    state = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()}
    if any(not torch.isfinite(tensor).all() for tensor in state.values()):
        raise UserError("some weights are too large for fp16, so the teacher cannot be stored")
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"}
    )
