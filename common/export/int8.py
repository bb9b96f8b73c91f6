"""Dynamic int8 quantization in torch, for inference on a CPU.

Weights are int8 and activations are scaled at run time, so no calibration data is needed. The implementation uses
`torch._int_mm` because torch.ao.quantization is deprecated and cannot be saved as safetensors, and its successor
torchao is slower than fp32 without a compiler.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_model
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck


class Int8Linear(nn.Module):
    """A linear layer with int8 weights (one scale per output), int8 activations (one scale per row) and int32 sums.

    Quantization is symmetric with scales max|x| / 127 (Q8BERT, arXiv:1910.06188).
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


class Int8Bottleneck(DiscreteKeyValueBottleneck):
    """A bottleneck for inference whose values are int8 with one scale per key; its linear decoder is int8 too.

    Keys stay fp32: rounding them would change codes. What fits keys or counts labels is left out.
    """

    def __init__(self, bottleneck: DiscreteKeyValueBottleneck) -> None:
        nn.Module.__init__(self)
        for name in ("codebooks", "codebook_size", "dim", "key_dim", "value_dim"):
            setattr(self, name, getattr(bottleneck, name))
        values, scale = _to_int8(rearrange(bottleneck.values.detach(), "c k value -> (c k) value"))
        self.register_buffer("keys", bottleneck.keys)
        self.register_buffer("projection", bottleneck.projection)
        self.register_buffer("values", values)  # (C * K, value_dim)
        self.register_buffer("scale", scale)  # (C * K, 1)
        linear = bottleneck.decoder
        self.decoder = None if linear is None else Int8Linear(linear)  # type: ignore[assignment]
        self.label_counts = None

    scale: Tensor

    def fetch(self, rows: Tensor, weights: Tensor) -> Tensor:
        scaled = F.embedding(rows, self.scale) * rearrange(weights, "bag n -> bag n 1")
        return (F.embedding(rows, self.values) * scaled).sum(1)


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes rows (rows, width); returns int8 values and scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round().to(torch.int8), scale


INT8: dict[type[nn.Module], Any] = {
    nn.Linear: Int8Linear,
    nn.Embedding: Int8Embedding,
    DiscreteKeyValueBottleneck: Int8Bottleneck,
}


def quantize_dynamic(model: nn.Module) -> Any:
    """Returns a copy of `model` in eval mode with int8 linear layers, embeddings and values of bottlenecks, stored as
    plain tensors.

    Subclasses of nn.Linear and nn.Embedding stay fp32, because other modules may read their weights.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in INT8:
                setattr(module, name, INT8[type(child)](child))
    return model


def rounding_bound(model: nn.Module) -> float:
    """Largest change of an output of `model` by `quantize_dynamic`: half a step of the values of each codebook,
    averaged over the codebooks. It is infinite if anything but the values of a mean decoder becomes int8.
    """
    rounded: list[Any] = [module for module in model.modules() if type(module) in INT8]
    if len(rounded) != 1 or getattr(rounded[0], "decoder", model) is not None:
        return math.inf
    return float(rounded[0].values.detach().abs().amax((1, 2)).mean()) / 254


def load_int8(model: nn.Module, path: str | Path) -> Any:
    """Loads a quantized model from a file of `safetensors.torch.save_model`. `model` defines the architecture; its
    weights are not used.
    """
    quantized = quantize_dynamic(model)
    load_model(quantized, path)
    return quantized
