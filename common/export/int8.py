"""int8 weights in torch, for inference on a CPU.

Dynamic quantisation keeps weights in int8 and scales activations at run time, so it needs no calibration data. It is
implemented here, on `torch._int_mm`: torch.ao.quantization is deprecated, its weights are no safetensors, and its
successor torchao does the same arithmetic through tensor subclasses, which without a compiler are slower than fp32.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output, and int8 activations, one scale per row; sums in int32.

    Symmetric, with scales max|x| / 127 (Q8BERT, arXiv:1910.06188). For inference on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _to_int8(linear.weight.detach())
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale.squeeze(-1))  # (out,)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = _to_int8(x.reshape(-1, x.shape[-1]))
        y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding table with int8 weights and one scale per row."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        weight, scale = _to_int8(embedding.weight.detach())
        self.register_buffer("weight", weight)  # (rows, width)
        self.register_buffer("scale", scale)  # (rows, 1)

    weight: Tensor
    scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * F.embedding(ids, self.scale)


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (rows, width) as int8 and their scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round().to(torch.int8), scale


INT8: dict[type[nn.Module], Any] = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}


def quantize_dynamic(model: nn.Module) -> Any:
    """A copy of `model`, for inference on a CPU, with all its linear layers and embeddings in int8.

    Subclasses of the two are kept: their users may read their weights. Its `state_dict` holds plain tensors.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in INT8:
                setattr(module, name, INT8[type(child)](child))
    return model


def load_int8(model: nn.Module, path: str | Path) -> Any:
    """A quantised model that `safetensors.torch.save_model` wrote, in the architecture of `model`, whose own weights
    are not used.
    """
    quantized = quantize_dynamic(model)
    load_model(quantized, path)
    return quantized
